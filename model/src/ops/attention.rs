//! Causal attention over packed sequences: the training path, with a backward.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Result, Shape, Tensor};
use rayon::prelude::*;

use super::matrix::{Mat, product};
use super::{floats, has_kernel, to_floats, vector};
use crate::ModelConfig;

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
        lengths: lengths.clone(),
        shape,
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

/// Softmax weights of one head: `weights[i]` over the keys that the query at i sees, 0 elsewhere.
fn causal_weights(q: Mat, k: Mat, shape: &AttentionShape, weights: &mut Vec<f32>) {
    let n = q.rows;
    weights.resize(n * n, 0.0);
    product(q, k.transposed(), shape.scale(), weights, n, false);
    for (i, row) in weights.chunks_exact_mut(n).enumerate() {
        let first = shape.first_visible(i);
        row[..first].fill(0.0);
        row[i + 1..].fill(0.0);
        vector::softmax(&mut row[first..=i]);
    }
}

/// Attention of one whole sequence; `out` holds its rows.
fn attend(q: &[f32], k: &[f32], v: &[f32], shape: &AttentionShape, out: &mut [f32]) {
    let (d, q_width, kv_width) = (shape.head_dim, shape.q_width(), shape.kv_width());
    let n = q.len() / q_width;
    let mut weights = Vec::new();
    for head in 0..shape.heads {
        let kv = shape.kv_head(head) * d;
        let q = Mat::new(&q[head * d..], n, d, q_width);
        causal_weights(q, Mat::new(&k[kv..], n, d, kv_width), shape, &mut weights);
        product(
            Mat::new(&weights, n, n, n),
            Mat::new(&v[kv..], n, d, kv_width),
            1.0,
            &mut out[head * d..],
            q_width,
            false,
        );
    }
}

/// A sequence's rows of queries, keys, values and of the output or its gradient.
struct Rows<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    grad: &'a [f32],
}

/// Gradients of one sequence. With P the weights: dV = Pᵀ dO, dP = dO Vᵀ, dS = P (dP - Σ P dP), dQ = dS K, dK = dSᵀ Q.
fn attend_backward(rows: &Rows, shape: &AttentionShape, dq: &mut [f32], dk: &mut [f32], dv: &mut [f32]) {
    let (d, q_width, kv_width) = (shape.head_dim, shape.q_width(), shape.kv_width());
    let n = rows.q.len() / q_width;
    let mut weights = Vec::new();
    let mut scores = vec![0f32; n * n];
    for head in 0..shape.heads {
        let kv = shape.kv_head(head) * d;
        let q = Mat::new(&rows.q[head * d..], n, d, q_width);
        let k = Mat::new(&rows.k[kv..], n, d, kv_width);
        let v = Mat::new(&rows.v[kv..], n, d, kv_width);
        let grad = Mat::new(&rows.grad[head * d..], n, d, q_width);
        causal_weights(q, k, shape, &mut weights);
        product(
            Mat::new(&weights, n, n, n).transposed(),
            grad,
            1.0,
            &mut dv[kv..],
            kv_width,
            true,
        );
        product(grad, v.transposed(), 1.0, &mut scores, n, false);
        for (p, s) in weights.chunks_exact(n).zip(scores.chunks_exact_mut(n)) {
            let mean = vector::dot(p, s);
            for (s, p) in s.iter_mut().zip(p) {
                *s = p * (*s - mean);
            }
        }
        let ds = Mat::new(&scores, n, n, n);
        product(ds, k, shape.scale(), &mut dq[head * d..], q_width, false);
        product(ds.transposed(), q, shape.scale(), &mut dk[kv..], kv_width, true);
    }
}

struct PackedAttention {
    lengths: Arc<[usize]>,
    shape: AttentionShape,
}

impl PackedAttention {
    /// Cuts a packed buffer of `width` elements per token into its sequences.
    fn split<'a>(&self, mut data: &'a [f32], width: usize) -> Vec<&'a [f32]> {
        let cut = |&n: &usize| {
            let (head, tail) = data.split_at(n * width);
            data = tail;
            head
        };
        self.lengths.iter().map(cut).collect()
    }

    fn split_mut<'a>(&self, mut data: &'a mut [f32], width: usize) -> Vec<&'a mut [f32]> {
        let cut = |&n: &usize| {
            let (head, tail) = std::mem::take(&mut data).split_at_mut(n * width);
            data = tail;
            head
        };
        self.lengths.iter().map(cut).collect()
    }
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
        let (q, k, v) = (floats(q, lq, "q")?, floats(k, lk, "k")?, floats(v, lv, "v")?);
        let (q_width, kv_width) = (self.shape.q_width(), self.shape.kv_width());
        let mut out = vec![0f32; q.len()];
        let inputs = self
            .split(q, q_width)
            .into_iter()
            .zip(self.split(k, kv_width))
            .zip(self.split(v, kv_width));
        let work: Vec<_> = inputs.zip(self.split_mut(&mut out, q_width)).collect();
        work.into_par_iter()
            .for_each(|(((q, k), v), out)| attend(q, k, v, &self.shape, out));
        Ok((CpuStorage::F32(out), lq.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (q_shape, kv_shape, device) = (q.shape(), k.shape(), q.device());
        let (q, k, v, grad) = (to_floats(q)?, to_floats(k)?, to_floats(v)?, to_floats(grad)?);
        let (q_width, kv_width) = (self.shape.q_width(), self.shape.kv_width());
        let (mut dq, mut dk, mut dv) = (vec![0f32; q.len()], vec![0f32; k.len()], vec![0f32; v.len()]);
        let inputs = self.split(&q, q_width).into_iter().zip(self.split(&k, kv_width));
        let inputs = inputs.zip(self.split(&v, kv_width)).zip(self.split(&grad, q_width));
        let outputs = self
            .split_mut(&mut dq, q_width)
            .into_iter()
            .zip(self.split_mut(&mut dk, kv_width));
        let work: Vec<_> = inputs.zip(outputs.zip(self.split_mut(&mut dv, kv_width))).collect();
        work.into_par_iter().for_each(|((((q, k), v), grad), ((dq, dk), dv))| {
            attend_backward(&Rows { q, k, v, grad }, &self.shape, dq, dk, dv);
        });
        let tensor = |data, shape: &Shape| Tensor::from_vec(data, shape, device).map(Some);
        Ok((tensor(dq, q_shape)?, tensor(dk, kv_shape)?, tensor(dv, kv_shape)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_same_op, random};
    use super::*;

    fn check(shape: AttentionShape) -> Result<()> {
        let lengths: Arc<[usize]> = Arc::from([3, 1, 5].as_slice());
        let inputs = [
            random(&[9, shape.q_width()], 1)?,
            random(&[9, shape.kv_width()], 2)?,
            random(&[9, shape.kv_width()], 3)?,
        ];
        assert_same_op(
            &inputs,
            |t| packed_attention(&t[0], &t[1], &t[2], &lengths, shape),
            |t| stock(&t[0], &t[1], &t[2], &lengths, shape),
            1e-5,
        )
    }

    #[test]
    fn kernel_equals_the_composition_with_grouped_heads() -> Result<()> {
        check(AttentionShape {
            heads: 4,
            kv_heads: 2,
            head_dim: 8,
            window: None,
        })
    }

    #[test]
    fn a_window_hides_what_is_far_back() -> Result<()> {
        check(AttentionShape {
            heads: 2,
            kv_heads: 2,
            head_dim: 4,
            window: Some(2),
        })
    }
}
