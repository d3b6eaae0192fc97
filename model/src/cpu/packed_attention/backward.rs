//! The gradients of packed attention.

use super::super::panel::{LANES, Lane, Output, Rows, TILE_ROWS};
use super::super::turned::tile_turned;
use super::{Scratch, Sequences, Span, Strip, head_rows, pack, pack_turned, tile_of, visible};
use crate::ops::{AttentionShape, vector};

/// Queries whose weights are computed again together: with 512 keys both matrices take 200 KB.
const BLOCK: usize = 8 * TILE_ROWS;

/// What a pass of [`attend_packed`] read and gave, and the gradient of what it gave.
#[derive(Clone, Copy)]
pub(crate) struct Attended<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub out: &'a [f32],
    pub log_sums: &'a [f32],
    pub grad: &'a [f32],
}

/// The gradients of queries, keys and values, those that are wanted; what they held before is overwritten.
///
/// With P the weights: dV = Pᵀ dO, dP = dO Vᵀ, dS = P (dP - Σ O dO), dQ = dS K, dK = dSᵀ Q.
pub(crate) fn attend_packed_backward(
    of: Attended,
    sequences: &Sequences,
    shape: AttentionShape,
    [dq, dk, dv]: [Option<&mut [f32]>; 3],
) {
    let (d, q_width, kv_width) = (shape.head_dim, shape.q_width(), shape.kv_width());
    // SAFETY: each job has rows and heads of its own, and the gradients are touched again only when all are done.
    let shared = |grad: Option<&mut [f32]>, width| grad.map(|g| unsafe { Output::shared(g, width) });
    let to = Gradients {
        dq: shared(dq, q_width),
        dk: shared(dk, kv_width),
        dv: shared(dv, kv_width),
    };
    sequences.each(shape, |scratch, span, kv_head| {
        let at = |data| head_rows(data, span.row, kv_width, kv_head * d);
        pack_turned(at(of.k), span.rows, d, &mut scratch.keys);
        pack_turned(at(of.v), span.rows, d, &mut scratch.values);
        pack(at(of.k), span.rows, d, &mut scratch.rows);
        for out in [&to.dk, &to.dv].into_iter().flatten() {
            (span.row..span.row + span.rows).for_each(|row| out.part(row, kv_head * d, d).fill(0.0));
        }
        for head in shape.query_heads(kv_head) {
            for block in Strip::cut(&span.queries, BLOCK, &sequences.positions, shape) {
                let job = Job {
                    of,
                    positions: &sequences.positions,
                    shape,
                    span,
                    head,
                    block,
                };
                job.weights(scratch, to.dq.as_ref());
                job.keys_and_values(scratch, &to);
            }
        }
    });
}

#[derive(Clone, Copy)]
struct Gradients {
    dq: Option<Output>,
    dk: Option<Output>,
    dv: Option<Output>,
}

/// The backward pass of one head for a block of queries.
struct Job<'a> {
    of: Attended<'a>,
    positions: &'a [usize],
    shape: AttentionShape,
    span: &'a Span,
    head: usize,
    block: Strip,
}

impl<'a> Job<'a> {
    /// Rows of queries, or what is laid out as they are, of this head.
    fn rows(&self, data: &'a [f32], first: usize) -> Rows<'a> {
        head_rows(data, first, self.shape.q_width(), self.head * self.shape.head_dim)
    }

    /// Fills `weights` with P and `scores` with dS, and the queries' gradients.
    fn weights(&self, scratch: &mut Scratch, dq: Option<&Output>) {
        let (d, columns) = (self.shape.head_dim, self.block.width());
        let size = self.block.queries.len() * columns;
        scratch.weights.resize(size, 0.0);
        scratch.scores.resize(size, 0.0);
        for strip in Strip::cut(&self.block.queries, TILE_ROWS, self.positions, self.shape) {
            let first = strip.queries.start;
            let (row, column) = (
                first - self.block.queries.start,
                strip.keys.start - self.block.keys.start,
            );
            // SAFETY: this thread's own, and read only between the products.
            let (weights, scores) = unsafe {
                (
                    Output::shared(&mut scratch.weights, columns),
                    Output::shared(&mut scratch.scores, columns),
                )
            };
            strip.products(self.rows(self.of.q, first), &scratch.keys, d, &weights, (row, column));
            strip.products(
                self.rows(self.of.grad, first),
                &scratch.values,
                d,
                &scores,
                (row, column),
            );
            for query in strip.queries.clone() {
                let at = (query - self.block.queries.start) * columns..;
                let (p, s) = (&mut scratch.weights[at.clone()], &mut scratch.scores[at]);
                self.row(query, &mut p[..columns], &mut s[..columns]);
            }
            if let Some(dq) = dq {
                let left = Rows {
                    data: &scratch.scores[row * columns + column..],
                    stride: columns,
                };
                for (p, keys) in scratch.rows.chunks_exact(self.span.rows).enumerate() {
                    let at = (first, self.head * d + p * LANES);
                    let width = (d - p * LANES).min(LANES);
                    tile_of(left, strip.queries.len(), &keys[strip.keys.clone()], dq, at, width);
                }
            }
        }
    }

    /// P from scores and dS from dP, of one query; 0 where it does not see.
    fn row(&self, query: usize, weights: &mut [f32], scores: &mut [f32]) {
        let (d, scale) = (self.shape.head_dim, self.shape.scale());
        let seen = visible(self.positions[query], self.block.keys.start, self.shape);
        for row in [&mut *weights, &mut *scores] {
            row[..seen.start].fill(0.0);
            row[seen.end..].fill(0.0);
        }
        let mean = vector::dot(
            &self.rows(self.of.out, query).data[..d],
            &self.rows(self.of.grad, query).data[..d],
        );
        let log_sum = self.of.log_sums[query * self.shape.heads + self.head];
        for (p, s) in weights[seen.clone()].iter_mut().zip(&mut scores[seen]) {
            *p = vector::exp(*p * scale - log_sum);
            *s = *p * (*s - mean) * scale;
        }
    }

    /// Adds what the block's queries give to the gradients of the keys and values that they see.
    fn keys_and_values(&self, scratch: &mut Scratch, to: &Gradients) {
        let (d, columns) = (self.shape.head_dim, self.block.width());
        let (first, count) = (self.block.queries.start, self.block.queries.len());
        let pairs = [
            (&to.dv, self.of.grad, &scratch.weights, &mut scratch.grads),
            (&to.dk, self.of.q, &scratch.scores, &mut scratch.queries),
        ];
        let positions = &self.positions[self.block.queries.clone()];
        let kv_column = self.shape.kv_head(self.head) * d;
        for (out, right, left, packed) in pairs {
            let Some(out) = out else { continue };
            pack(self.rows(right, first), count, d, packed);
            for key in self.block.keys.clone().step_by(TILE_ROWS) {
                let keys = (self.block.keys.end - key).min(TILE_ROWS);
                // The queries from the first key's own on, to the last that still sees the last key.
                let begin = positions.partition_point(|&p| p < key);
                let end = positions.partition_point(|&p| self.shape.first_visible(p) < key + keys);
                if begin >= end {
                    continue;
                }
                let left = Rows {
                    data: &left[begin * columns + key - self.block.keys.start..],
                    stride: columns,
                };
                for (p, panel) in packed.chunks_exact(count).enumerate() {
                    let at = (self.span.row + key, kv_column + p * LANES);
                    add_turned(left, keys, &panel[begin..end], out, at, (d - p * LANES).min(LANES));
                }
            }
        }
    }
}

/// `out += aᵀ panel`, of a panel that may be narrower than sixteen.
#[inline(always)]
fn add_turned(a: Rows, rows: usize, panel: &[Lane], out: &Output, (row, column): (usize, usize), columns: usize) {
    if columns == LANES {
        return tile_turned(a, rows, panel, out, (row, column), true);
    }
    let mut sums = [0f32; TILE_ROWS * LANES];
    // SAFETY: this thread's own, and read only when the product is there.
    let to = unsafe { Output::shared(&mut sums, LANES) };
    tile_turned(a, rows, panel, &to, (0, 0), false);
    for (r, sums) in sums.chunks_exact(LANES).take(rows).enumerate() {
        let out = out.part(row + r, column, columns);
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
    }
}
