//! Attention of one token: a decode step's, or a prompt's last where no other is asked for.

use std::ops::Range;

use super::{Scratch, Span, Step, weigh};
use crate::cpu::cache::Stored;
use crate::cpu::instructions::Kernel;
use crate::cpu::panel::{LANES, NEAR, Output, Rows, ask_for, prefetch, tile_of};
use crate::cpu::registers::Vector;

/// The only token of `span` that attends, for some key and value heads. Block by block and within a block head by head,
/// which is how they lie.
pub(super) struct One<'a, L> {
    pub step: &'a Step<'a, L>,
    pub span: &'a Span<'a>,
    /// The same with the row of its keys and values, where they are not in the cache yet.
    pub new: Option<&'a Span<'a>>,
    pub heads: Range<usize>,
    pub scratch: &'a mut Scratch,
}

impl<L: Stored> Kernel for One<'_, L> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let Self {
            step,
            span,
            new,
            heads,
            scratch,
        } = self;
        let shape = step.attention.shape;
        let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let (rows, first) = (heads.len() * group, heads.start * group);
        let end = span.start + 1;
        let begin = shape.first_visible(span.start) / LANES * LANES;
        let blocks = &span.blocks[begin / LANES..end.div_ceil(LANES)];
        let width = blocks.len() * LANES;

        scratch.q.resize(rows * d, 0.0);
        for (r, q) in scratch.q.chunks_exact_mut(d).enumerate() {
            step.query(span.row, span.start, first + r, q);
        }
        scratch.scores.resize(rows * width, 0.0);
        let (wanted, last) = ((heads.start, heads.len()), blocks.len() - 1);
        step.scores::<V>(blocks, 0..last, wanted, scratch);
        // Only now: the block it goes to has been asked for with the others' scores.
        if let Some(new) = new {
            heads.clone().for_each(|head| step.write(new, head));
        }
        step.scores::<V>(blocks, last..last + 1, wanted, scratch);
        scratch.inverses.clear();
        for scores in scratch.scores.chunks_exact_mut(width) {
            let seen = shape.first_visible(span.start) - begin..end - begin;
            scratch.inverses.push(weigh(scores, seen));
        }
        step.mixtures::<V>(blocks, wanted, end - begin, scratch);
        let lanes = d.div_ceil(LANES) * LANES;
        for (r, inverse) in scratch.inverses.iter().enumerate() {
            let out = step.out.part(span.row, (first + r) * d, d);
            for (out, sum) in out.iter_mut().zip(&scratch.sums[r * lanes..]) {
                *out = sum * inverse;
            }
        }
    }
}

impl<L: Stored> Step<'_, L> {
    /// The scores of the blocks in `range`. Asks for each one's next meanwhile, which lies anywhere, so that the processor
    /// would not guess it; behind the last keys the first values.
    #[inline(always)]
    fn scores<V: Vector>(
        &self,
        blocks: &[u32],
        range: Range<usize>,
        (head, heads): (usize, usize),
        scratch: &mut Scratch,
    ) {
        let group = self.attention.shape.heads / self.attention.shape.kv_heads;
        let (d, width) = (self.attention.shape.head_dim, blocks.len() * LANES);
        let q = &scratch.q;
        // SAFETY: this thread's own, and read only when the products are done.
        let out = unsafe { Output::shared(&mut scratch.scores, width) };
        for b in range {
            let keys = |h| self.cache.keys(blocks[b], head + h);
            let next = |h| match blocks.get(b + 1) {
                Some(&next) => self.cache.keys(next, head + h),
                None => self.cache.values(blocks[0], head + h),
            };
            if group > 1 {
                for h in 0..heads {
                    prefetch(next(h));
                    for r in (h * group..(h + 1) * group).step_by(V::ROWS) {
                        let count = ((h + 1) * group - r).min(V::ROWS);
                        let q = Rows { data: q, stride: d }.from(r);
                        tile_of::<V, _, 1>(q, count, ([keys(h)], d), &out, (r, b * LANES), false, &[]);
                    }
                }
                continue;
            }
            let mut h = 0;
            while h < heads {
                let at = (h, b * LANES);
                h += match heads - h {
                    1 => dots::<V, L, 1>(&keys, &next, q, &out, at),
                    2 => dots::<V, L, 2>(&keys, &next, q, &out, at),
                    3 => dots::<V, L, 3>(&keys, &next, q, &out, at),
                    _ => dots::<V, L, 4>(&keys, &next, q, &out, at),
                };
            }
        }
    }

    /// The values of `tokens` tokens weighted by the scores.
    #[inline(always)]
    fn mixtures<V: Vector>(&self, blocks: &[u32], (head, heads): (usize, usize), tokens: usize, scratch: &mut Scratch) {
        let shape = self.attention.shape;
        let (group, width) = (shape.heads / shape.kv_heads, blocks.len() * LANES);
        let lanes = shape.head_dim.div_ceil(LANES) * LANES;
        scratch.sums.clear();
        scratch.sums.resize(heads * group * lanes, 0.0);
        for (b, &block) in blocks.iter().enumerate() {
            // No further than the last token: what lies behind it belongs to nobody.
            let tokens = (tokens - b * LANES).min(LANES);
            let next = *blocks.get(b + 1).unwrap_or(&block);
            let next = self.cache.values(next, head).as_ptr();
            for h in 0..heads {
                let values = self.cache.values(block, head + h);
                let ahead = Ahead {
                    at: next.wrapping_add(h * LANES),
                    apart: heads * LANES,
                };
                for r in h * group..(h + 1) * group {
                    let weights = &scratch.scores[r * width + b * LANES..][..tokens];
                    mix::<V, L>(weights, values, ahead, &mut scratch.sums[r * lanes..][..lanes]);
                }
            }
        }
    }
}

/// A block's scores of `N` heads with a query each, from head `h` on, side by side: one head's sums would wait for each other.
///
/// - `keys`: a head's, `[head_dim, 16 tokens]`
/// - `next`: what is asked for with each, as long
/// - `q`: `[heads, head_dim]`
#[inline(always)]
fn dots<'c, V: Vector, L: Stored + 'c, const N: usize>(
    keys: impl Fn(usize) -> &'c [L],
    next: impl Fn(usize) -> &'c [L],
    q: &[f32],
    out: &Output,
    (h, column): (usize, usize),
) -> usize {
    let keys: [&[L]; N] = std::array::from_fn(|n| keys(h + n));
    let next: [&[L]; N] = std::array::from_fn(|n| next(h + n));
    let d = keys[0].len();
    let q: [&[f32]; N] = std::array::from_fn(|n| &q[(h + n) * d..][..d]);
    let mut sums = [V::zero(); N];
    for i in 0..d {
        for n in 0..N {
            ask_for::<_, NEAR>(&next[n][i]);
            sums[n] = sums[n].plus(q[n][i], keys[n][i].row(0));
        }
    }
    for (n, sum) in sums.into_iter().enumerate() {
        if let Some(to) = out.part(h + n, column, LANES).first_chunk_mut() {
            sum.store(to);
        }
    }
    N
}

/// The next block's values of the heads that are read together, which lie side by side and are asked for meanwhile: a part
/// of them with every panel, so that several pages are read at a time, and each in order.
#[derive(Clone, Copy)]
struct Ahead<L> {
    at: *const L,
    /// From one panel's part to the next panel's.
    apart: usize,
}

impl<L> Ahead<L> {
    /// What is asked for with the panels from `first` on.
    #[inline(always)]
    fn from(self, first: usize) -> Self {
        Self {
            at: self.at.wrapping_add(first * self.apart),
            ..self
        }
    }
}

/// `sums += Σ weights[t] values[t]`, over the tokens of a block.
///
/// - `values`: `[head_dim / 16][16 tokens, 16]`
/// - `sums`: `[head_dim / 16, 16]`
#[inline(always)]
fn mix<V: Vector, L: Stored>(weights: &[f32], values: &[L], ahead: Ahead<L>, sums: &mut [f32]) {
    let mut first = 0;
    let (sums, _) = sums.as_chunks_mut::<LANES>();
    while first < sums.len() {
        let (panels, values, ahead) = ((sums.len() - first).min(4), &values[first * LANES..], ahead.from(first));
        let sums = &mut sums[first..first + panels];
        match panels {
            1 => mix_panels::<V, L, 1>(weights, values, ahead, sums),
            2 => mix_panels::<V, L, 2>(weights, values, ahead, sums),
            3 => mix_panels::<V, L, 3>(weights, values, ahead, sums),
            _ => mix_panels::<V, L, 4>(weights, values, ahead, sums),
        }
        first += panels;
    }
}

#[inline(always)]
fn mix_panels<V: Vector, L: Stored, const P: usize>(
    weights: &[f32],
    values: &[L],
    ahead: Ahead<L>,
    sums: &mut [[f32; LANES]],
) {
    let panels: [&[L]; P] = std::array::from_fn(|p| &values[p * LANES..][..LANES]);
    let mut mixed: [V; P] = std::array::from_fn(|p| V::load(&sums[p]));
    for (t, weight) in weights.iter().enumerate().take(LANES) {
        for p in 0..P {
            ask_for::<_, NEAR>(ahead.from(p).at.wrapping_add(t));
            mixed[p] = mixed[p].plus(*weight, panels[p][t].row(0));
        }
    }
    for (sum, mixed) in sums.iter_mut().zip(mixed) {
        mixed.store(sum);
    }
}
