//! Attention of new tokens to their own sequence's cache, each at its own length.
//!
//! A job takes queries and keys as their linear layers gave them: it norms and turns them, puts its own heads' keys and
//! values into the cache, and attends. So nothing is done by one thread alone between the products and attention.

mod one;
#[cfg(test)]
mod tests;
mod tiles;

use std::cell::RefCell;
use std::ops::Range;

use super::cache::{HostCache, LayerCache, SharedLayer, Stored};
use super::instructions::Instructions;
use super::panel::{LANES, Output};
use super::share::each;
use crate::ops::{AttentionShape, RopeTable, rms_norm_in_place, vector};
use one::One;
use tiles::Strip;

/// The new tokens of one sequence among the packed rows of a pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span<'a> {
    /// Its first row.
    pub row: usize,
    /// Its rows.
    pub rows: usize,
    /// Position of the first in the sequence.
    pub start: usize,
    /// The sequence's blocks, which no other span has.
    pub blocks: &'a [u32],
}

/// What attention is of.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a> {
    /// `[t, heads * head_dim]`, as the linear layer gave them; `[spans, heads * head_dim]` where `lasts`.
    pub q: &'a [f32],
    /// Whether each span's last token alone attends.
    pub lasts: bool,
    /// `[t, kv_heads * head_dim]`, as the queries.
    pub k: &'a [f32],
    /// As the keys.
    pub v: &'a [f32],
    /// The norms of each head of queries and keys, `[head_dim]`, where the model has them.
    pub norms: Option<(&'a [f32], &'a [f32])>,
    pub eps: f32,
    pub rope: &'a RopeTable,
    pub shape: AttentionShape,
}

/// Puts the new tokens' keys and values into the cache, and attends with each query to all up to its own position.
///
/// - `out`: as the queries
pub(crate) fn attend(attention: &Attention, cache: &mut HostCache, layer: usize, spans: &[Span], out: &mut [f32]) {
    match cache {
        HostCache::F32(layers) => attend_in(attention, &mut layers[layer], spans, out),
        HostCache::F16(layers) => attend_in(attention, &mut layers[layer], spans, out),
    }
}

fn attend_in<L: Stored>(attention: &Attention, cache: &mut LayerCache<L>, spans: &[Span], out: &mut [f32]) {
    let shape = attention.shape;
    // SAFETY: each job has heads of a span of its own, whose blocks are that span's alone, and those that attend to what
    // others have written begin when these are done.
    let cache = unsafe { cache.shared() };
    // SAFETY: each job has rows and heads of its own, and `out` is touched again only when all are done.
    let out = unsafe { Output::shared(out, shape.q_width()) };
    let (step, best) = (Step { attention, cache, out }, Instructions::best());
    let threads = threads_for(spans, shape);

    let first = heads_of(spans, shape, threads);
    each(first.len(), threads, |i| {
        let (number, ref heads) = first[i];
        let span = &spans[number];
        let alone = span.rows == 1;
        if !alone {
            heads.clone().for_each(|head| step.write(span, head));
        }
        if let Some(query) = &attention.only_query(number, span) {
            let (step, heads) = (&step, heads.clone());
            with_scratch(|scratch| {
                best.run(One {
                    step,
                    span: query,
                    new: alone.then_some(span),
                    heads,
                    scratch,
                })
            });
        }
    });
    if attention.lasts {
        return;
    }
    let second = strips_of(spans, shape);
    each(second.len(), threads, |i| {
        let (span, kv_head, ref rows) = second[i];
        let (step, rows) = (&step, rows.clone());
        with_scratch(|scratch| {
            best.run(Strip {
                step,
                span,
                kv_head,
                rows,
                scratch,
            });
        });
    });
}

impl Attention<'_> {
    /// The last token of span number `number` with the row of its query, where no other token of the span attends.
    fn only_query<'a>(&self, number: usize, span: &Span<'a>) -> Option<Span<'a>> {
        let row = if self.lasts { number } else { span.row };
        (self.lasts || span.rows == 1).then_some(Span {
            row,
            rows: 1,
            start: span.start + span.rows - 1,
            blocks: span.blocks,
        })
    }
}

/// Each cached token costs about two multiplications per element of its keys and values.
fn threads_for(spans: &[Span], shape: AttentionShape) -> usize {
    let costs = spans.iter().map(|s| s.rows * (s.start + s.rows) * shape.q_width());
    (costs.sum::<usize>() / COST_PER_THREAD).clamp(1, rayon::current_num_threads())
}

/// What is put into the cache together, and attended to at once where one token attends: the number of a span, and key and
/// value heads.
fn heads_of(spans: &[Span], shape: AttentionShape, threads: usize) -> Vec<(usize, Range<usize>)> {
    let steps = spans.iter().filter(|s| s.rows == 1).count();
    let together = (steps * shape.kv_heads / (8 * threads)).clamp(1, HEADS);
    let of = |(number, span): (usize, &Span)| {
        let size = if span.rows == 1 { together } else { 1 };
        let firsts = (0..shape.kv_heads).step_by(size);
        firsts.map(move |head| (number, head..(head + size).min(shape.kv_heads)))
    };
    spans.iter().enumerate().flat_map(of).collect()
}

/// What attends when all of a prompt is in the cache: its rows, some at a time, for each key and value head.
fn strips_of<'a>(spans: &'a [Span<'a>], shape: AttentionShape) -> Vec<(&'a Span<'a>, usize, Range<usize>)> {
    let of = |span: &'a Span<'a>| {
        let strip = |row: usize| row..(row + STRIP).min(span.rows);
        let strips = move |head| (0..span.rows).step_by(STRIP).map(move |row| (span, head, strip(row)));
        (0..shape.kv_heads).flat_map(strips)
    };
    spans.iter().filter(|s| s.rows > 1).flat_map(of).collect()
}

/// Multiplications that are worth a thread.
const COST_PER_THREAD: usize = 1 << 14;
/// Key and value heads that a decode step reads together: they lie side by side, and one head's sums would wait for
/// themselves.
const HEADS: usize = 4;
/// New tokens of a prompt that a job attends with: several tiles.
const STRIP: usize = 48;

/// One layer's attention under way.
struct Step<'a, L> {
    attention: &'a Attention<'a>,
    cache: SharedLayer<'a, L>,
    out: Output,
}

/// What a job needs room for.
#[derive(Default)]
struct Scratch {
    /// Queries, `[rows, head_dim]`.
    q: Vec<f32>,
    /// Scores and then weights, `[rows, tokens]`.
    scores: Vec<f32>,
    /// What the weights have to be multiplied by to add up to 1, `[rows]`.
    inverses: Vec<f32>,
    /// Weighted sums of the values, `[rows, head_dim / 16, 16]`.
    sums: Vec<f32>,
}

/// A thread's own, kept from job to job.
fn with_scratch(f: impl FnOnce(&mut Scratch)) {
    thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());
    SCRATCH.with_borrow_mut(f);
}

impl<L: Stored> Step<'_, L> {
    /// Puts one head of all new tokens of a span into the cache.
    fn write(&self, span: &Span, head: usize) {
        let Attention { k, v, norms, eps, .. } = *self.attention;
        let shape = self.attention.shape;
        let d = shape.head_dim;
        let mut local = [0f32; 256];
        let mut large = Vec::new();
        let key = match local.get_mut(..d) {
            Some(key) => key,
            None => {
                large.resize(d, 0.0);
                &mut large[..]
            }
        };
        for i in 0..span.rows {
            let at = (span.row + i) * shape.kv_width() + head * d;
            key.copy_from_slice(&k[at..at + d]);
            if let Some((_, norm)) = norms {
                rms_norm_in_place(key, norm, eps);
            }
            let position = span.start + i;
            self.attention.rope.turn(key, position as u32, 1.0);
            let place = (span.blocks[position / LANES], position % LANES);
            self.cache.write(place, head, key, &v[at..at + d]);
        }
    }

    /// A head's query as the scores take it: normed, turned and scaled.
    fn query(&self, row: usize, position: usize, head: usize, to: &mut [f32]) {
        let Attention { q, norms, eps, .. } = *self.attention;
        let shape = self.attention.shape;
        let at = row * shape.q_width() + head * shape.head_dim;
        to.copy_from_slice(&q[at..at + shape.head_dim]);
        if let Some((norm, _)) = norms {
            rms_norm_in_place(to, norm, eps);
        }
        self.attention.rope.turn(to, position as u32, 1.0);
        let scale = shape.scale();
        to.iter_mut().for_each(|x| *x *= scale);
    }
}

/// Turns scores into weights that are still to be multiplied by what is returned; those outside of `seen` are 0.
#[inline(always)]
fn weigh(scores: &mut [f32], seen: Range<usize>) -> f32 {
    scores[..seen.start].fill(0.0);
    scores[seen.end..].fill(0.0);
    1.0 / vector::exp_all(&mut scores[seen])
}
