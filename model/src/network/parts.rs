//! The network's weights one by one, for the GPU path.

use candle_core::{Result, Tensor};

use super::Llama;
use crate::gpu::SharedProducts;
use crate::lora::LinearKind;

/// A layer's weights.
pub(crate) struct LayerParts {
    /// In the order of [`LinearKind::ALL`].
    pub weights: Vec<Tensor>,
    /// Biases of queries, keys and values, or none.
    pub qkv_bias: Vec<Tensor>,
    pub input_norm: Tensor,
    pub post_norm: Tensor,
    /// Norms of each head of queries and keys, where the model has them.
    pub q_norm: Option<Tensor>,
    pub k_norm: Option<Tensor>,
}

impl Llama {
    /// How its products are computed, in all its caches.
    pub(crate) fn gpu_products(&self) -> &SharedProducts {
        &self.gpu_products
    }

    /// A layer's weights; copies where the CPU path has packed them.
    pub(crate) fn layer_parts(&self, layer: usize) -> Result<LayerParts> {
        let block = &self.blocks[layer];
        let bias = |kind: LinearKind| block.linears[kind as usize].bias.clone();
        let biases = [LinearKind::QProj, LinearKind::KProj, LinearKind::VProj].map(bias);
        let norms = block.qk_norms.clone();
        Ok(LayerParts {
            weights: block.linears.iter().map(|l| l.weight.tensor()).collect::<Result<_>>()?,
            qkv_bias: biases.into_iter().flatten().collect(),
            input_norm: block.input_norm.clone(),
            post_norm: block.post_attention_norm.clone(),
            q_norm: norms.as_ref().map(|(q, _)| q.clone()),
            k_norm: norms.map(|(_, k)| k),
        })
    }

    /// `[vocab, hidden]`.
    pub(crate) fn embed_tokens(&self) -> &Tensor {
        &self.embed_tokens
    }

    /// `[hidden]`.
    pub(crate) fn last_norm(&self) -> &Tensor {
        &self.norm
    }

    /// `[vocab, hidden]`.
    pub(crate) fn head_weight(&self) -> Result<Tensor> {
        self.lm_head.tensor()
    }

    /// Cosines and sines of every position, `[positions, head_dim / 2]` f32 each.
    pub(crate) fn rope_tables(&self) -> Result<(Tensor, Tensor)> {
        self.rope.tensors(self.device())
    }
}
