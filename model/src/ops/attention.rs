//! Causal attention over packed sequences: the training path, with a backward.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor};

use super::{floats, has_kernel, host_floats};
use crate::ModelConfig;
use crate::cpu::{Attended, Sequences, attend_packed, attend_packed_backward};

/// Sizes of an attention layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttentionShape {
    /// Heads of the queries.
    pub heads: usize,
    /// Heads of keys and values; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// A token sees itself and at most `window - 1` tokens before it.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Those of a model's layers.
    pub fn of(config: &ModelConfig) -> Self {
        Self {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            window: config.sliding_window,
        }
    }

    /// Elements of a query row.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Elements of a key or value row.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The key and value head that a query head reads.
    pub fn kv_head(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads)
    }

    /// The query heads that a key and value head serves.
    pub fn query_heads(&self, kv_head: usize) -> Range<usize> {
        let group = self.heads / self.kv_heads;
        kv_head * group..(kv_head + 1) * group
    }

    /// `1 / sqrt(head_dim)`.
    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// The first position that a token at `position` sees.
    pub fn first_visible(&self, position: usize) -> usize {
        self.window.map_or(0, |w| (position + 1).saturating_sub(w))
    }
}

/// Attention of every token to those before it in its own sequence.
///
/// - `q`: `[t, heads * head_dim]`; `k`, `v`: `[t, kv_heads * head_dim]`
/// - `lengths`: tokens of each sequence, in packed order, summing to `t`
///
/// Returns `[t, heads * head_dim]`.
pub(crate) fn packed_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    lengths: &Arc<[usize]>,
    shape: AttentionShape,
) -> Result<Tensor> {
    if !has_kernel(q) {
        return stock(q, k, v, lengths, shape);
    }
    let op = PackedAttention {
        sequences: Sequences::new(lengths),
        shape,
        log_sums: OnceLock::new(),
    };
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    q.apply_op3(&k, &v, op)
}

fn stock(q: &Tensor, k: &Tensor, v: &Tensor, lengths: &[usize], shape: AttentionShape) -> Result<Tensor> {
    let mut outputs = Vec::with_capacity(lengths.len());
    let mut start = 0;
    for &n in lengths {
        let part = |x: &Tensor| x.narrow(0, start, n);
        outputs.push(attend_stock(&part(q)?, &part(k)?, &part(v)?, 0, shape)?);
        start += n;
    }
    Tensor::cat(&outputs, 0)
}

/// Attention of one sequence with candle's ops: the queries stand at positions `start..`, the keys at `0..`.
pub(crate) fn attend_stock(q: &Tensor, k: &Tensor, v: &Tensor, start: usize, shape: AttentionShape) -> Result<Tensor> {
    let (queries, keys) = (q.dim(0)?, k.dim(0)?);
    let split = |x: &Tensor, rows, heads| x.reshape((rows, heads, shape.head_dim))?.transpose(0, 1)?.contiguous();
    let repeat = |x: Tensor| -> Result<Tensor> {
        let groups = shape.heads / shape.kv_heads;
        x.unsqueeze(1)?
            .expand((shape.kv_heads, groups, keys, shape.head_dim))?
            .reshape((shape.heads, keys, shape.head_dim))
    };
    let q = split(q, queries, shape.heads)?;
    let k = repeat(split(k, keys, shape.kv_heads)?)?.contiguous()?;
    let v = repeat(split(v, keys, shape.kv_heads)?)?.contiguous()?;
    let mask: Vec<f32> = (0..queries * keys)
        .map(|i| (start + i / keys, i % keys))
        .map(|(at, key)| {
            if key > at || key < shape.first_visible(at) {
                f32::NEG_INFINITY
            } else {
                0.0
            }
        })
        .collect();
    let mask = Tensor::from_vec(mask, (1, queries, keys), q.device())?;
    let scores = (q.matmul(&k.transpose(1, 2)?)?.to_dtype(DType::F32)? * f64::from(shape.scale()))?;
    let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?.to_dtype(q.dtype())?;
    weights.matmul(&v)?.transpose(0, 1)?.reshape((queries, shape.q_width()))
}

struct PackedAttention {
    sequences: Sequences,
    shape: AttentionShape,
    /// What the forward pass left for the backward pass.
    log_sums: OnceLock<Vec<f32>>,
}

impl CustomOp3 for PackedAttention {
    fn name(&self) -> &'static str {
        "packed-attention"
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
        let inputs = [floats(q, lq, "q")?, floats(k, lk, "k")?, floats(v, lv, "v")?];
        let mut out = vec![0f32; inputs[0].len()];
        let mut log_sums = vec![0f32; self.sequences.queries() * self.shape.heads];
        attend_packed(inputs, &self.sequences, self.shape, &mut out, &mut log_sums);
        // An op runs forward once.
        let _ = self.log_sums.set(log_sums);
        Ok((CpuStorage::F32(out), lq.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let zeros = |x: &Tensor| vec![0f32; x.elem_count()];
        let (mut dq, mut dk, mut dv) = (zeros(q), zeros(k), zeros(v));
        let grad = grad.contiguous()?;
        let of = Attended {
            q: &host_floats(q)?,
            k: &host_floats(k)?,
            v: &host_floats(v)?,
            out: &host_floats(out)?,
            log_sums: self.log_sums.get().map_or(&[], Vec::as_slice),
            grad: &host_floats(&grad)?,
        };
        let grads = [Some(&mut dq[..]), Some(&mut dk[..]), Some(&mut dv[..])];
        attend_packed_backward(of, &self.sequences, self.shape, grads);
        let tensor = |data, like: &Tensor| Tensor::from_vec(data, like.shape(), like.device()).map(Some);
        Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_same_op, random};
    use super::*;

    /// Lengths around the sizes of a tile, a panel and a block of queries.
    fn check(shape: AttentionShape) -> Result<()> {
        let lengths: Arc<[usize]> = Arc::from([3, 1, 35, 70].as_slice());
        let inputs = [
            random(&[109, shape.q_width()], 1)?,
            random(&[109, shape.kv_width()], 2)?,
            random(&[109, shape.kv_width()], 3)?,
        ];
        assert_same_op(
            &inputs,
            |t| packed_attention(&t[0], &t[1], &t[2], &lengths, shape),
            |t| stock(&t[0], &t[1], &t[2], &lengths, shape),
            2e-5,
        )
    }

    #[test]
    fn kernel_equals_the_composition_with_grouped_heads() -> Result<()> {
        for head_dim in [8, 16, 20] {
            check(AttentionShape {
                heads: 4,
                kv_heads: 2,
                head_dim,
                window: None,
            })?;
        }
        Ok(())
    }

    #[test]
    fn a_window_hides_what_is_far_back() -> Result<()> {
        for window in [2, 19] {
            check(AttentionShape {
                heads: 2,
                kv_heads: 2,
                head_dim: 4,
                window: Some(window),
            })?;
        }
        Ok(())
    }

    #[test]
    fn rows_that_ask_alone_get_what_they_get_among_all() -> Result<()> {
        let shape = AttentionShape {
            heads: 2,
            kv_heads: 1,
            head_dim: 16,
            window: Some(30),
        };
        let (lengths, asked) = ([40, 5, 20], [7u32, 8, 39, 45, 64]);
        let all = Sequences::new(&lengths);
        let some = Sequences::asked(&lengths, &asked);
        let of = |seed, width| random(&[65, width], seed)?.flatten_all()?.to_vec1::<f32>();
        let (q, k, v, grad) = (of(1, 32)?, of(2, 16)?, of(3, 16)?, of(4, 32)?);
        let pick = |x: &[f32]| -> Vec<f32> {
            asked
                .iter()
                .flat_map(|&r| x[r as usize * 32..][..32].iter().copied())
                .collect()
        };
        // The gradient of rows that do not ask is 0.
        let mut whole_grad = vec![0f32; grad.len()];
        for &row in &asked {
            let at = row as usize * 32..(row as usize + 1) * 32;
            whole_grad[at.clone()].copy_from_slice(&grad[at]);
        }
        let run = |q: &[f32], grad: &[f32], sequences: &Sequences| {
            let (mut out, mut log_sums) = (vec![0f32; q.len()], vec![0f32; q.len() / 16]);
            attend_packed([q, &k, &v], sequences, shape, &mut out, &mut log_sums);
            let (mut dq, mut dk, mut dv) = (vec![7f32; q.len()], vec![7f32; k.len()], vec![7f32; v.len()]);
            let of = Attended {
                q,
                k: &k,
                v: &v,
                out: &out,
                log_sums: &log_sums,
                grad,
            };
            let grads = [Some(&mut dq[..]), Some(&mut dk[..]), Some(&mut dv[..])];
            attend_packed_backward(of, sequences, shape, grads);
            [out, dq, dk, dv]
        };
        let [out, dq, dk, dv] = run(&q, &whole_grad, &all);
        let want = [pick(&out), pick(&dq), dk, dv];
        for (got, want) in run(&pick(&q), &pick(&grad), &some).iter().zip(&want) {
            assert_eq!(got.len(), want.len());
            assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-5));
        }
        Ok(())
    }
}
