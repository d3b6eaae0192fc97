//! A prompt's attention: tiles of several queries of one head.

use std::ops::Range;

use super::{Scratch, Span, Step, weigh};
use crate::cpu::cache::Stored;
use crate::cpu::instructions::Kernel;
use crate::cpu::panel::{LANES, Output, Rows, tile_of};
use crate::cpu::registers::Vector;

/// The new tokens `rows` of a span, counted from its first, for the query heads of one key and value head.
pub(super) struct Strip<'a, L> {
    pub step: &'a Step<'a, L>,
    pub span: &'a Span<'a>,
    pub kv_head: usize,
    pub rows: Range<usize>,
    pub scratch: &'a mut Scratch,
}

impl<L: Stored> Kernel for Strip<'_, L> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        for head in self.step.attention.shape.query_heads(self.kv_head) {
            for first in self.rows.clone().step_by(V::ROWS) {
                let count = (self.rows.end - first).min(V::ROWS);
                self.step
                    .tile::<V>(self.span, (self.kv_head, head), (first, count), self.scratch);
            }
        }
    }
}

impl<L: Stored> Step<'_, L> {
    #[inline(always)]
    fn tile<V: Vector>(
        &self,
        span: &Span,
        (kv_head, head): (usize, usize),
        (first, count): (usize, usize),
        scratch: &mut Scratch,
    ) {
        let shape = self.attention.shape;
        let (d, position) = (shape.head_dim, span.start + first);
        let end = position + count; // one past the last visible position
        let begin = shape.first_visible(position) / LANES * LANES;
        let blocks = &span.blocks[begin / LANES..end.div_ceil(LANES)];
        let width = blocks.len() * LANES;

        scratch.q.resize(count * d, 0.0);
        for (r, q) in scratch.q.chunks_exact_mut(d).enumerate() {
            self.query(span.row + first + r, position + r, head, q);
        }
        let q = Rows {
            data: &scratch.q,
            stride: d,
        };
        scratch.scores.resize(count * width, 0.0);
        // SAFETY: this thread's own, and read only when the products are done.
        let out = unsafe { Output::shared(&mut scratch.scores, width) };
        for (b, &block) in blocks.iter().enumerate() {
            let keys = self.cache.keys(block, kv_head);
            tile_of::<V, _, 1>(q, count, ([keys], d), &out, (0, b * LANES), false, &[]);
        }
        scratch.inverses.clear();
        for (r, scores) in scratch.scores.chunks_exact_mut(width).enumerate() {
            let seen = shape.first_visible(position + r) - begin..position + r + 1 - begin;
            scratch.inverses.push(weigh(scores, seen));
        }
        self.mix::<V>(span, (kv_head, head), (first, end - begin), blocks, scratch);
    }

    /// The values weighted by the scores.
    #[inline(always)]
    fn mix<V: Vector>(
        &self,
        span: &Span,
        (kv_head, head): (usize, usize),
        (first, tokens): (usize, usize),
        blocks: &[u32],
        scratch: &mut Scratch,
    ) {
        let d = self.attention.shape.head_dim;
        let weights = Rows {
            data: &scratch.scores,
            stride: blocks.len() * LANES,
        };
        let count = scratch.inverses.len();
        scratch.sums.resize(count * LANES, 0.0);
        for p in 0..d.div_ceil(LANES) {
            // SAFETY: this thread's own, and read only when all is added up.
            let to = unsafe { Output::shared(&mut scratch.sums, LANES) };
            for (b, &block) in blocks.iter().enumerate() {
                // No further than the last token: what lies behind it belongs to nobody.
                let tokens = (tokens - b * LANES).min(LANES);
                let values = &self.cache.values(block, kv_head)[p * LANES..][..tokens];
                let weights = weights.columns_from(b * LANES);
                tile_of::<V, _, 1>(weights, count, ([values], tokens), &to, (0, 0), b > 0, &[]);
            }
            let columns = (d - p * LANES).min(LANES);
            for ((r, sums), inverse) in scratch.sums.chunks_exact(LANES).enumerate().zip(&scratch.inverses) {
                let out = self.out.part(span.row + first + r, head * d + p * LANES, columns);
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = sum * inverse;
                }
            }
        }
    }
}
