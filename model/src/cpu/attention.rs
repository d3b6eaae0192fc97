//! Attention of new tokens to their own sequence's cache, each at its own length.

use rayon::prelude::*;

use super::cache::LayerCache;
use super::panel::{LANES, Output, Rows, TILE_ROWS, prefetch, tile};
use crate::ops::{AttentionShape, vector};

/// The new tokens of one sequence among the packed rows of a pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Span<'a> {
    /// Its first row.
    pub row: usize,
    /// Its rows.
    pub rows: usize,
    /// Position of the first in the sequence.
    pub start: usize,
    /// The sequence's blocks.
    pub blocks: &'a [u32],
}

/// Every query against the cached keys up to its own position, written before.
///
/// - `q`: `[t, heads * head_dim]`
/// - `out`: the same shape
pub(crate) fn attend(q: &[f32], cache: &LayerCache, spans: &[Span], shape: AttentionShape, out: &mut [f32]) {
    let width = shape.q_width();
    // SAFETY: each job has rows and heads of its own, and `out` is touched again only when all are done.
    let out = unsafe { Output::shared(out, width) };
    let jobs = spans
        .iter()
        .flat_map(|span| (0..shape.kv_heads).map(move |head| (span, head)));
    let jobs: Vec<(&Span, usize)> = jobs.collect();
    let read: usize = spans
        .iter()
        .map(|s| (s.start + s.rows) * s.rows.div_ceil(TILE_ROWS))
        .sum();
    let run = |(span, head): &(&Span, usize)| {
        let head = Head {
            q: Rows { data: q, stride: width },
            cache,
            shape,
            head: *head,
        };
        head.run(span, &out);
    };
    // Each cached token costs about two multiplications per element of its keys and values.
    if read * shape.kv_width() < SERIAL_BELOW || jobs.len() == 1 {
        return jobs.iter().for_each(run);
    }
    let parts = 8 * rayon::current_num_threads();
    jobs.par_chunks(jobs.len().div_ceil(parts))
        .for_each(|jobs| jobs.iter().for_each(run));
}

/// Elements of keys below which the work is not shared out.
const SERIAL_BELOW: usize = 1 << 16;

/// Blocks that are asked for before they are needed: the blocks of a sequence lie scattered, so that the processor does
/// not guess the next.
const AHEAD: usize = 2;

/// One key and value head, and the query heads that it serves.
struct Head<'a> {
    q: Rows<'a>,
    cache: &'a LayerCache,
    shape: AttentionShape,
    head: usize,
}

impl Head<'_> {
    fn run(&self, span: &Span, out: &Output) {
        let group = self.shape.heads / self.shape.kv_heads;
        let first_head = self.head * group;
        let mut scores = Vec::new();
        for i in 0..span.rows {
            if span.rows > 1 && i % TILE_ROWS > 0 {
                continue;
            }
            // Several tokens: a tile of them for one query head after the other. One token: its query heads are the tile.
            let tokens = (span.rows - i).min(TILE_ROWS);
            let tiles: Vec<Tile> = match span.rows {
                1 => (0..group)
                    .step_by(TILE_ROWS)
                    .map(|h| Tile::heads(span, first_head + h, (group - h).min(TILE_ROWS)))
                    .collect(),
                _ => (0..group)
                    .map(|h| Tile::tokens(span, i, tokens, first_head + h))
                    .collect(),
            };
            for tile in tiles {
                self.tile(span, &tile, &mut scores, out);
            }
        }
    }

    fn tile(&self, span: &Span, rows: &Tile, scores: &mut Vec<f32>, out: &Output) {
        let d = self.shape.head_dim;
        let end = rows.position + rows.tokens; // one past the last visible position
        let begin = self.shape.first_visible(rows.position) / LANES * LANES;
        let width = (end - begin).div_ceil(LANES) * LANES;
        scores.clear();
        scores.resize(rows.count() * width, 0.0);
        let blocks = &span.blocks[begin / LANES..end.div_ceil(LANES)];
        let (stride, q) = match rows.tokens {
            1 => (d, self.q.from(rows.row).columns_from(rows.head * d)),
            _ => (self.q.stride, self.q.from(rows.row).columns_from(rows.head * d)),
        };
        let q = Rows { data: q.data, stride };
        // SAFETY: this thread's own, and read only between the products.
        let to = unsafe { Output::shared(scores, width) };
        for (b, &block) in blocks.iter().enumerate() {
            tile(
                q,
                rows.count(),
                self.cache.keys(block, self.head),
                &to,
                (0, b * LANES),
                false,
            );
        }
        for (r, scores) in scores.chunks_exact_mut(width).enumerate() {
            let position = rows.position + if rows.tokens == 1 { 0 } else { r };
            let (first, last) = (self.shape.first_visible(position) - begin, position - begin);
            scores[..first].fill(0.0);
            scores[last + 1..].fill(0.0);
            let visible = &mut scores[first..=last];
            visible.iter_mut().for_each(|s| *s *= self.shape.scale());
            vector::softmax(visible);
        }
        self.mix(
            rows,
            blocks,
            end - begin,
            Rows {
                data: scores,
                stride: width,
            },
            out,
        );
    }

    /// The values weighted by the scores.
    fn mix(&self, rows: &Tile, blocks: &[u32], tokens: usize, weights: Rows, out: &Output) {
        let d = self.shape.head_dim;
        let mut sums = [0f32; TILE_ROWS * LANES];
        for p in 0..d.div_ceil(LANES) {
            // SAFETY: this thread's own, and read only when all is added up.
            let to = unsafe { Output::shared(&mut sums, LANES) };
            for (b, &block) in blocks.iter().enumerate() {
                // No further than the last token: what lies behind it belongs to nobody.
                let count = (tokens - b * LANES).min(LANES);
                if let Some(&next) = blocks.get(b + AHEAD) {
                    prefetch(self.cache.values(next, self.head, p));
                }
                let values = &self.cache.values(block, self.head, p)[..count];
                tile(
                    weights.columns_from(b * LANES),
                    rows.count(),
                    values,
                    &to,
                    (0, 0),
                    b > 0,
                );
            }
            let columns = (d - p * LANES).min(LANES);
            for (r, sums) in sums.chunks_exact(LANES).take(rows.count()).enumerate() {
                let (row, head) = rows.place(r);
                out.part(row, head * d + p * LANES, columns)
                    .copy_from_slice(&sums[..columns]);
            }
        }
    }
}

/// Rows that are multiplied together: several tokens of one query head, or several query heads of one token.
struct Tile {
    row: usize,
    position: usize,
    tokens: usize,
    head: usize,
    heads: usize,
}

impl Tile {
    fn tokens(span: &Span, first: usize, tokens: usize, head: usize) -> Self {
        Self {
            row: span.row + first,
            position: span.start + first,
            tokens,
            head,
            heads: 1,
        }
    }

    fn heads(span: &Span, head: usize, heads: usize) -> Self {
        Self {
            row: span.row,
            position: span.start,
            tokens: 1,
            head,
            heads,
        }
    }

    fn count(&self) -> usize {
        self.tokens * self.heads
    }

    /// Packed row and query head of the tile's r-th row.
    fn place(&self, r: usize) -> (usize, usize) {
        match self.tokens {
            1 => (self.row, self.head + r),
            _ => (self.row + r, self.head),
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Result, Tensor};

    use super::*;
    use crate::ModelConfig;
    use crate::cpu::HostCache;
    use crate::ops::attend_stock;
    use crate::ops::testing::{assert_close, random};

    /// A prefill of nine tokens behind two, and a decode step behind 35, in blocks that lie scattered.
    fn check(shape: AttentionShape) -> Result<()> {
        let config = ModelConfig {
            num_key_value_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            ..crate::testing::config()
        };
        let mut cache = HostCache::new(&config, 8);
        let cache = &mut cache.layers[0];
        let sequences = [(9, 2, vec![5]), (1, 35, vec![7, 0, 3])];
        let q = random(&[10, shape.q_width()], 3)?;
        let (mut spans, mut wants, mut row) = (Vec::new(), Vec::new(), 0);
        for (i, (rows, start, blocks)) in sequences.iter().enumerate() {
            let tokens = start + rows;
            let k = random(&[tokens, shape.kv_width()], 10 + i as u64)?;
            let v = random(&[tokens, shape.kv_width()], 20 + i as u64)?;
            for (position, (k, v)) in k.to_vec2()?.iter().zip(v.to_vec2()?).enumerate() {
                cache.write(blocks, position, k, &v);
            }
            wants.push(attend_stock(&q.narrow(0, row, *rows)?, &k, &v, *start, shape)?);
            spans.push(Span {
                row,
                rows: *rows,
                start: *start,
                blocks,
            });
            row += rows;
        }
        let mut got = vec![0f32; 10 * shape.q_width()];
        attend(&q.flatten_all()?.to_vec1::<f32>()?, cache, &spans, shape, &mut got);
        let got = Tensor::from_vec(got, (10, shape.q_width()), &Device::Cpu)?;
        assert_close(&got, &Tensor::cat(&wants, 0)?, 1e-5)
    }

    #[test]
    fn scattered_blocks_attend_as_whole_sequences() -> Result<()> {
        for (heads, kv_heads, head_dim) in [(4, 2, 8), (3, 3, 20), (8, 1, 16)] {
            for window in [None, Some(3), Some(20)] {
                check(AttentionShape {
                    heads,
                    kv_heads,
                    head_dim,
                    window,
                })?;
            }
        }
        Ok(())
    }
}
