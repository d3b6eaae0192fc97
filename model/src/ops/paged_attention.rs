//! Attention over the KV cache: each row reads its own sequence's blocks at its own length, so that nothing is
//! spent on padding.

use candle_core::{CpuStorage, CustomOp3, InplaceOp2, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::attention::{AttentionShape, attend, attend_stock};
use super::{floats, has_kernel, vector};

/// Queries of one sequence in a packed batch, and where its keys and values lie in the cache.
#[derive(Debug, Clone)]
pub(crate) struct CachedRow {
    /// Tokens in this pass.
    pub queries: usize,
    /// Position of the first of them: the tokens cached before.
    pub start: usize,
    /// Cache row of every position up to the last query.
    pub slots: Vec<u32>,
}

/// From this many queries on a sequence is worth gathering its keys for matrix products.
const GATHER_FROM: usize = 8;

/// Copies the rows of `src` to the rows `slots` of `cache`, in place.
///
/// - `cache`: `[rows, width]`, `src`: `[t, width]`, one slot per row of `src`
pub(crate) fn write_rows(cache: &Tensor, src: &Tensor, slots: &[u32]) -> Result<()> {
    if has_kernel(cache) {
        return cache.inplace_op2(&src.contiguous()?, &WriteRows { slots });
    }
    let src = src.to_dtype(cache.dtype())?.contiguous()?;
    let mut done = 0;
    for run in slots.chunk_by(|a, b| a + 1 == *b) {
        cache.slice_set(&src.narrow(0, done, run.len())?.contiguous()?, 0, run[0] as usize)?;
        done += run.len();
    }
    Ok(())
}

struct WriteRows<'a> {
    slots: &'a [u32],
}

impl InplaceOp2 for WriteRows<'_> {
    fn name(&self) -> &'static str {
        "write-rows"
    }

    fn cpu_fwd(&self, cache: &mut CpuStorage, lc: &Layout, src: &CpuStorage, ls: &Layout) -> Result<()> {
        let (_, width) = lc.shape().dims2()?;
        let src = floats(src, ls, self.name())?;
        let CpuStorage::F32(cache) = cache else {
            candle_core::bail!("write-rows: expected f32");
        };
        for (row, &slot) in src.chunks_exact(width).zip(self.slots) {
            let at = slot as usize * width;
            cache[at..at + width].copy_from_slice(row);
        }
        Ok(())
    }
}

/// Attention of every query to its own sequence's cached keys, itself included (write them first).
///
/// - `q`: `[t, heads * head_dim]`; `k`, `v`: the cache, `[rows, kv_heads * head_dim]`
///
/// Returns `[t, heads * head_dim]`.
pub(crate) fn paged_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    rows: &[CachedRow],
    shape: AttentionShape,
) -> Result<Tensor> {
    if has_kernel(q) && has_kernel(k) {
        return q.contiguous()?.apply_op3_no_bwd(k, v, &PagedAttention { rows, shape });
    }
    let mut outputs = Vec::with_capacity(rows.len());
    let mut start = 0;
    for row in rows {
        let slots = Tensor::new(row.slots.as_slice(), q.device())?;
        let gather = |cache: &Tensor| cache.index_select(&slots, 0)?.to_dtype(q.dtype());
        let q = q.narrow(0, start, row.queries)?;
        outputs.push(attend_stock(&q, &gather(k)?, &gather(v)?, row.start, shape)?);
        start += row.queries;
    }
    Tensor::cat(&outputs, 0)
}

struct PagedAttention<'a> {
    rows: &'a [CachedRow],
    shape: AttentionShape,
}

impl PagedAttention<'_> {
    fn one(&self, row: &CachedRow, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) {
        if row.queries >= GATHER_FROM {
            let gather = |cache: &[f32]| {
                let width = self.shape.kv_width();
                let rows = row.slots.iter().map(|&s| s as usize * width);
                rows.flat_map(|at| cache[at..at + width].iter().copied())
                    .collect::<Vec<_>>()
            };
            return attend(q, &gather(k), &gather(v), row.start, &self.shape, out);
        }
        let width = self.shape.q_width();
        for (i, (q, out)) in q.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
            self.token(&row.slots[..row.start + i + 1], q, k, v, out);
        }
    }

    /// One query against the cache rows `slots`, all heads: the keys are read once, in order.
    fn token(&self, slots: &[u32], q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim: d,
            ..
        } = self.shape;
        let (width, scale, group) = (self.shape.kv_width(), self.shape.scale(), heads / kv_heads);
        let slots = &slots[self.shape.first_visible(slots.len() - 1)..];
        let n = slots.len();
        let mut scores = vec![0f32; heads * n];
        for (i, &slot) in slots.iter().enumerate() {
            let key = &k[slot as usize * width..][..width];
            for (kv, key) in key.chunks_exact(d).enumerate() {
                for head in kv * group..(kv + 1) * group {
                    scores[head * n + i] = vector::dot(&q[head * d..][..d], key) * scale;
                }
            }
        }
        scores.chunks_exact_mut(n).for_each(|s| _ = vector::softmax(s));
        for (i, &slot) in slots.iter().enumerate() {
            let value = &v[slot as usize * width..][..width];
            for (kv, value) in value.chunks_exact(d).enumerate() {
                for head in kv * group..(kv + 1) * group {
                    vector::axpy(scores[head * n + i], value, &mut out[head * d..][..d]);
                }
            }
        }
    }
}

impl CustomOp3 for PagedAttention<'_> {
    fn name(&self) -> &'static str {
        "paged-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        lq: &Layout,
        k: &CpuStorage,
        lk: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) = (floats(q, lq, "q")?, floats(k, lk, "k")?, floats(v, lv, "v")?);
        let mut out = vec![0f32; q.len()];
        let width = self.shape.q_width();
        let mut work = Vec::with_capacity(self.rows.len());
        let (mut q_left, mut out_left) = (q, out.as_mut_slice());
        for row in self.rows {
            let (q, q_rest) = q_left.split_at(row.queries * width);
            let (out, out_rest) = out_left.split_at_mut(row.queries * width);
            (q_left, out_left) = (q_rest, out_rest);
            work.push((row, q, out));
        }
        work.into_par_iter()
            .for_each(|(row, q, out)| self.one(row, q, k, v, out));
        Ok((CpuStorage::F32(out), lq.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, random};
    use super::*;
    use candle_core::{DType, Device};

    /// Two sequences whose cache rows lie scattered: one prefill of nine tokens, one decode step.
    fn check(window: Option<usize>) -> Result<()> {
        let shape = AttentionShape {
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            window,
        };
        let (k, v) = (random(&[32, shape.kv_width()], 1)?, random(&[32, shape.kv_width()], 2)?);
        let rows = [
            CachedRow {
                queries: 9,
                start: 2,
                slots: vec![5, 3, 9, 8, 0, 1, 2, 30, 31, 29, 11],
            },
            CachedRow {
                queries: 1,
                start: 3,
                slots: vec![20, 10, 21, 12],
            },
        ];
        let q = random(&[10, shape.q_width()], 3)?;
        let got = paged_attention(&q, &k, &v, &rows, shape)?;
        let mut wants = Vec::new();
        for (row, first) in rows.iter().zip([0, 9]) {
            let slots = Tensor::new(row.slots.as_slice(), &Device::Cpu)?;
            let (k, v) = (k.index_select(&slots, 0)?, v.index_select(&slots, 0)?);
            wants.push(attend_stock(
                &q.narrow(0, first, row.queries)?,
                &k,
                &v,
                row.start,
                shape,
            )?);
        }
        assert_close(&got, &Tensor::cat(&wants, 0)?, 1e-5)
    }

    #[test]
    fn scattered_rows_attend_as_gathered_ones() -> Result<()> {
        check(None)
    }

    #[test]
    fn a_window_holds_over_the_cache() -> Result<()> {
        check(Some(3))
    }

    #[test]
    fn rows_are_written_where_the_slots_say() -> Result<()> {
        let cache = Tensor::zeros((6, 2), DType::F32, &Device::Cpu)?;
        write_rows(&cache, &Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?, &[4, 1])?;
        let got = cache.to_vec2::<f32>()?;
        assert_eq!(
            (&got[4], &got[1], &got[0]),
            (&vec![1., 2.], &vec![3., 4.], &vec![0., 0.])
        );
        Ok(())
    }
}
