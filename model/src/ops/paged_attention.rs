//! Attention over a KV cache of tensors: every sequence's rows are gathered and attended to with candle's operations.

use candle_core::{Result, Tensor};

use super::attention::{AttentionShape, attend_stock};

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

/// Copies the rows of `src` to the rows `slots` of `cache`, in place.
///
/// - `cache`: `[rows, width]`, `src`: `[t, width]`, one slot per row of `src`
pub(crate) fn write_rows(cache: &Tensor, src: &Tensor, slots: &[u32]) -> Result<()> {
    let src = src.to_dtype(cache.dtype())?.contiguous()?;
    let mut done = 0;
    for run in slots.chunk_by(|a, b| a + 1 == *b) {
        cache.slice_set(&src.narrow(0, done, run.len())?.contiguous()?, 0, run[0] as usize)?;
        done += run.len();
    }
    Ok(())
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

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

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
