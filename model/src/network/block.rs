//! One transformer block: attention and feed-forward, each behind a norm and around a residual.

use candle_core::{Result, Tensor};

use super::linear::{Linear, Weight};
use super::pass::{Attention, Pass};
use crate::lora::LinearKind;
use crate::ops::{self, AttentionShape};
use crate::{ModelConfig, ModelError, Weights};

/// The linear layers by what they multiply, in the order of [`LinearKind::ALL`].
const SAME_INPUT: [&[LinearKind]; 4] = [
    &[LinearKind::QProj, LinearKind::KProj, LinearKind::VProj],
    &[LinearKind::OProj],
    &[LinearKind::GateProj, LinearKind::UpProj],
    &[LinearKind::DownProj],
];

#[derive(Debug, Clone)]
pub(super) struct Block {
    /// In the order of [`LinearKind::ALL`].
    pub linears: [Linear; 7],
    pub input_norm: Tensor,
    pub post_attention_norm: Tensor,
    /// Norms over each head of queries and keys, where the model has them (Qwen3).
    pub qk_norms: Option<(Tensor, Tensor)>,
    pub shape: AttentionShape,
    pub eps: f64,
}

impl Block {
    pub fn load(config: &ModelConfig, weights: &Weights, layer: usize) -> std::result::Result<Self, ModelError> {
        let at = |name: &str| format!("model.layers.{layer}.{name}.weight");
        let linear = |kind: LinearKind, weight: Tensor| {
            let has_bias =
                config.attention_bias && matches!(kind, LinearKind::QProj | LinearKind::KProj | LinearKind::VProj);
            let bias = format!("model.layers.{layer}.{}.bias", kind.path());
            let out = weight.dim(0)?;
            Ok::<_, ModelError>(Linear {
                weight: Weight::new(weight)?.quantized(weights.quantization()),
                bias: has_bias.then(|| weights.get(&bias, &[out])).transpose()?,
            })
        };
        let mut linears = Vec::with_capacity(LinearKind::ALL.len());
        for same_input in SAME_INPUT {
            let part = |kind: &LinearKind| (at(&kind.path()), kind.shape(config).into());
            let parts: Vec<(String, [usize; 2])> = same_input.iter().map(part).collect();
            for (kind, weight) in same_input.iter().zip(weights.get_adjacent(&parts)?) {
                linears.push(linear(*kind, weight)?);
            }
        }
        let norm = |name: &str, width| weights.get(&at(name), &[width]);
        let qk_norms = match config.qk_norm {
            true => Some((
                norm("self_attn.q_norm", config.head_dim)?,
                norm("self_attn.k_norm", config.head_dim)?,
            )),
            false => None,
        };
        Ok(Self {
            linears: linears
                .try_into()
                .unwrap_or_else(|_| unreachable!("as many as there are kinds")),
            input_norm: norm("input_layernorm", config.hidden_size)?,
            post_attention_norm: norm("post_attention_layernorm", config.hidden_size)?,
            qk_norms,
            shape: AttentionShape::of(config),
            eps: config.rms_norm_eps,
        })
    }

    /// Whether the CPU path's own layer trains it: frozen f32 weights in main memory.
    pub fn runs_on_host(&self) -> bool {
        let frozen = |t: &Tensor| ops::has_kernel(t) && !t.track_op();
        let heads = self.qk_norms.iter().flat_map(|(q, k)| [q, k]);
        let norms = [&self.input_norm, &self.post_attention_norm];
        let mut plain = norms
            .into_iter()
            .chain(heads)
            .chain(self.linears.iter().filter_map(|l| l.bias.as_ref()));
        self.linears.iter().all(|l| l.weight.packed().is_some()) && plain.all(frozen)
    }

    /// Whether nothing of it is trained itself.
    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    pub fn is_frozen(&self) -> bool {
        let heads = self.qk_norms.iter().flat_map(|(q, k)| [q, k]);
        let norms = [&self.input_norm, &self.post_attention_norm];
        let plain = self.linears.iter().flat_map(|l| l.bias.iter().chain(l.weight.plain()));
        !norms.into_iter().chain(heads).chain(plain).any(Tensor::track_op)
    }

    pub fn linear_mut(&mut self, kind: LinearKind) -> &mut Linear {
        &mut self.linears[kind as usize]
    }

    /// - `x`: `[tokens, hidden]`
    /// - `wanted`: the rows that anyone reads, where that is not all: behind the last layer's attention the others are
    ///   spared
    ///
    /// Returns `[tokens, hidden]`, or `[wanted, hidden]`.
    pub fn forward(&self, x: &Tensor, layer: usize, pass: &Pass, wanted: Option<&Tensor>) -> Result<Tensor> {
        let normed = ops::rms_norm(x, &self.input_norm, self.eps)?;
        let mixed = self.attention(&normed, layer, pass)?;
        let (x, mixed) = match wanted {
            Some(rows) => (x.index_select(rows, 0)?, mixed.index_select(rows, 0)?),
            None => (x.clone(), mixed),
        };
        let x = (x + self.linear(LinearKind::OProj, &mixed, layer, pass)?)?;
        let normed = ops::rms_norm(&x, &self.post_attention_norm, self.eps)?;
        let gate = self.linear(LinearKind::GateProj, &normed, layer, pass)?;
        let up = self.linear(LinearKind::UpProj, &normed, layer, pass)?;
        let down = self.linear(LinearKind::DownProj, &ops::swiglu(&gate, &up)?, layer, pass)?;
        x + down
    }

    /// What each token takes of those before it, `[tokens, heads * head_dim]`.
    fn attention(&self, x: &Tensor, layer: usize, pass: &Pass) -> Result<Tensor> {
        let shape = self.shape;
        let q = self.heads(LinearKind::QProj, x, layer, pass)?;
        let k = self.heads(LinearKind::KProj, x, layer, pass)?;
        let v = self.linear(LinearKind::VProj, x, layer, pass)?;
        match &pass.attention {
            Attention::Packed(lengths) => ops::packed_attention(&q, &k, &v, lengths, shape),
            Attention::Cached { keys, values, rows } => {
                let (keys, values) = (&keys[layer], &values[layer]);
                let slots: Vec<u32> = rows.iter().flat_map(|r| r.slots[r.start..].iter().copied()).collect();
                ops::write_rows(keys, &k, &slots)?;
                ops::write_rows(values, &v, &slots)?;
                ops::paged_attention(&q, keys, values, rows, shape)
            }
        }
    }

    /// Queries or keys with their positions turned in, `[tokens, heads * head_dim]`.
    fn heads(&self, kind: LinearKind, x: &Tensor, layer: usize, pass: &Pass) -> Result<Tensor> {
        let is_query = kind == LinearKind::QProj;
        let heads = if is_query {
            self.shape.heads
        } else {
            self.shape.kv_heads
        };
        let flat = self.linear(kind, x, layer, pass)?;
        let mut split = flat.reshape((x.dim(0)?, heads, self.shape.head_dim))?;
        if let Some((q_norm, k_norm)) = &self.qk_norms {
            split = ops::rms_norm(&split, if is_query { q_norm } else { k_norm }, self.eps)?;
        }
        ops::rope(&split, &pass.positions, pass.rope)?.reshape(flat.shape())
    }

    fn linear(&self, kind: LinearKind, x: &Tensor, layer: usize, pass: &Pass) -> Result<Tensor> {
        let linear = &self.linears[kind as usize];
        let base = linear.forward(x)?;
        let Some((adapter, pair)) = pass.adapter.and_then(|a| Some((a, a.pair(layer, kind)?))) else {
            return Ok(base);
        };
        let term = adapter.low_rank(pair, x, pass.dropout)?;
        match &pass.adapted {
            Some(mask) => base + mask.apply(&term)?,
            None => base + term,
        }
    }
}
