//! Causal attention of whole sequences that lie packed, forward and backward: the training path.
//!
//! No matrix of scores is kept: the forward pass notes each row's log-sum-exp, and the backward pass computes the
//! weights of a few queries at a time again (as FlashAttention, arXiv 2205.14135). What lies behind a query is skipped.

mod backward;

use std::ops::Range;

use rayon::prelude::*;

use super::backward::turn;
use super::columns::narrow_tile;
use super::panel::{LANES, Lane, Output, Rows, TILE_ROWS, tile};
use crate::ops::{AttentionShape, vector};

pub(crate) use backward::{Attended, attend_packed_backward};

/// Where the sequences lie among the packed rows, and which of their tokens ask.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sequences {
    spans: Vec<Span>,
    /// Of every query in its sequence, ascending there.
    positions: Vec<usize>,
}

#[derive(Debug, Clone, PartialEq)]
struct Span {
    /// Packed row of the first token.
    row: usize,
    rows: usize,
    queries: Range<usize>,
}

impl Sequences {
    /// Every token asks.
    pub fn new(lengths: &[usize]) -> Self {
        let tokens = lengths.iter().sum::<usize>() as u32;
        Self::asked(lengths, &(0..tokens).collect::<Vec<_>>())
    }

    /// The packed rows `asked`, ascending, ask.
    pub fn asked(lengths: &[usize], asked: &[u32]) -> Self {
        let (mut spans, mut positions, mut row) = (Vec::new(), Vec::new(), 0);
        for &rows in lengths {
            let first = positions.len();
            let within = |&&packed: &&u32| (row..row + rows).contains(&(packed as usize));
            positions.extend(asked.iter().filter(within).map(|&packed| packed as usize - row));
            spans.push(Span {
                row,
                rows,
                queries: first..positions.len(),
            });
            row += rows;
        }
        assert_eq!(positions.len(), asked.len(), "a row behind the last sequence");
        Self { spans, positions }
    }

    /// The same sequences, of which the packed rows `asked`, ascending, ask.
    pub fn asked_by(&self, asked: &[u32]) -> Self {
        Self::asked(&self.spans.iter().map(|span| span.rows).collect::<Vec<_>>(), asked)
    }

    /// How many tokens ask.
    pub fn queries(&self) -> usize {
        self.positions.len()
    }

    /// Runs `f` for every sequence and key head, on several threads.
    fn each(&self, shape: AttentionShape, f: impl Fn(&mut Scratch, &Span, usize) + Sync) {
        let jobs: Vec<(&Span, usize)> = self
            .spans
            .iter()
            .filter(|span| span.rows > 0)
            .flat_map(|span| (0..shape.kv_heads).map(move |head| (span, head)))
            .collect();
        jobs.into_par_iter()
            .for_each_init(Scratch::default, |scratch, (span, head)| f(scratch, span, head));
    }
}

/// A job's own buffers.
#[derive(Default)]
struct Scratch {
    /// Sixteen keys to a panel, `[head_dim, 16]` each.
    keys: Vec<Lane>,
    /// The values likewise.
    values: Vec<Lane>,
    /// Sixteen elements of every key or value to a panel, `[tokens, 16]` each.
    rows: Vec<Lane>,
    /// Sixteen elements of a block's queries to a panel, `[queries, 16]` each.
    queries: Vec<Lane>,
    /// The gradients of their outputs likewise.
    grads: Vec<Lane>,
    /// `[queries, keys]`, those of a strip or of a block.
    weights: Vec<f32>,
    /// As the weights.
    scores: Vec<f32>,
}

/// Panels of sixteen rows, turned: `[ceil(rows / 16)][d]`.
fn pack_turned(data: Rows, rows: usize, d: usize, out: &mut Vec<Lane>) {
    out.resize(rows.div_ceil(LANES) * d, Lane::ZERO);
    for (p, panel) in out.chunks_exact_mut(d).enumerate() {
        for (c, lanes) in panel.chunks_mut(LANES).enumerate() {
            let from = data.from(p * LANES).columns_from(c * LANES);
            turn(from, (rows - p * LANES).min(LANES), lanes);
        }
    }
}

/// Panels of sixteen columns: `[ceil(d / 16)][rows]`.
fn pack(data: Rows, rows: usize, d: usize, out: &mut Vec<Lane>) {
    out.resize(d.div_ceil(LANES) * rows, Lane::ZERO);
    for (p, panel) in out.chunks_exact_mut(rows).enumerate() {
        let (column, width) = (p * LANES, (d - p * LANES).min(LANES));
        for (r, lane) in panel.iter_mut().enumerate() {
            let row = &data.data[r * data.stride + column..][..width];
            lane.0[..width].copy_from_slice(row);
            lane.0[width..].fill(0.0);
        }
    }
}

/// A tile that may be narrower than a panel.
#[inline(always)]
fn tile_of(a: Rows, rows: usize, panel: &[Lane], out: &Output, at: (usize, usize), columns: usize) {
    match columns {
        LANES => tile(a, rows, panel, out, at, false),
        _ => narrow_tile(a, rows, (panel, panel.len()), out, (at.0, at.1, columns), false),
    }
}

/// Consecutive queries of one sequence.
struct Strip {
    /// Their rows.
    queries: Range<usize>,
    /// The keys that any of them sees, and a few before, so that it begins with a panel.
    keys: Range<usize>,
}

impl Strip {
    fn new(queries: Range<usize>, positions: &[usize], shape: AttentionShape) -> Self {
        let begin = shape.first_visible(positions[queries.start]) / LANES * LANES;
        let end = positions[queries.end - 1] + 1;
        Self {
            queries,
            keys: begin..end,
        }
    }

    /// Strips of at most `size` queries of `all`.
    fn cut<'a>(
        all: &Range<usize>,
        size: usize,
        positions: &'a [usize],
        shape: AttentionShape,
    ) -> impl Iterator<Item = Self> + use<'a> {
        let end = all.end;
        let parts = all.clone().step_by(size);
        parts.map(move |first| Self::new(first..(first + size).min(end), positions, shape))
    }

    fn width(&self) -> usize {
        self.keys.len().div_ceil(LANES) * LANES
    }

    /// `left panelᵀ` over the strip's keys, into columns from `column` on.
    fn products(&self, left: Rows, panels: &[Lane], d: usize, out: &Output, (row, column): (usize, usize)) {
        let first = self.keys.start / LANES;
        let count = self.width() / LANES;
        for (b, panel) in panels[first * d..][..count * d].chunks_exact(d).enumerate() {
            tile(left, self.queries.len(), panel, out, (row, column + b * LANES), false);
        }
    }
}

/// Attention of every query to the tokens of its sequence up to itself.
///
/// - `q`: `[queries, heads * head_dim]`; `k`, `v`: `[t, kv_heads * head_dim]`
/// - `out`: as `q`; `log_sums`: `[queries, heads]`, the logarithm of what the weights were divided by
pub(crate) fn attend_packed(
    [q, k, v]: [&[f32]; 3],
    sequences: &Sequences,
    shape: AttentionShape,
    out: &mut [f32],
    log_sums: &mut [f32],
) {
    let (d, width) = (shape.head_dim, shape.q_width());
    // SAFETY: each job has queries and heads of its own, and both are touched again only when all are done.
    let (out, log_sums) = unsafe { (Output::shared(out, width), Output::shared(log_sums, shape.heads)) };
    sequences.each(shape, |scratch, span, kv_head| {
        let at = |data| head_rows(data, span.row, shape.kv_width(), kv_head * d);
        pack_turned(at(k), span.rows, d, &mut scratch.keys);
        pack(at(v), span.rows, d, &mut scratch.rows);
        for head in shape.query_heads(kv_head) {
            for strip in Strip::cut(&span.queries, TILE_ROWS, &sequences.positions, shape) {
                let (first, rows, columns) = (strip.queries.start, strip.queries.len(), strip.width());
                scratch.weights.resize(rows * columns, 0.0);
                // SAFETY: this thread's own, and read only between the products.
                let to = unsafe { Output::shared(&mut scratch.weights, columns) };
                strip.products(head_rows(q, first, width, head * d), &scratch.keys, d, &to, (0, 0));
                for (r, weights) in scratch.weights.chunks_exact_mut(columns).enumerate() {
                    let position = sequences.positions[first + r];
                    let seen = visible(position, strip.keys.start, shape);
                    weights[..seen.start].fill(0.0);
                    weights[seen.end..].fill(0.0);
                    let weights = &mut weights[seen];
                    weights.iter_mut().for_each(|s| *s *= shape.scale());
                    let (largest, sum) = vector::softmax(weights);
                    log_sums.part(first + r, head, 1)[0] = largest + sum.ln();
                }
                let weights = Rows {
                    data: &scratch.weights,
                    stride: columns,
                };
                for (p, values) in scratch.rows.chunks_exact(span.rows).enumerate() {
                    let at = (first, head * d + p * LANES);
                    let columns = (d - p * LANES).min(LANES);
                    tile_of(weights, rows, &values[strip.keys.clone()], &out, at, columns);
                }
            }
        }
    });
}

fn head_rows(data: &[f32], first: usize, stride: usize, column: usize) -> Rows<'_> {
    Rows {
        data: &data[first * stride + column..],
        stride,
    }
}

/// What a query sees, counted from key `begin`.
fn visible(position: usize, begin: usize, shape: AttentionShape) -> Range<usize> {
    shape.first_visible(position) - begin..position + 1 - begin
}
