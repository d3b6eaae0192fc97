//! The network's weights as the GPU path reads them: addresses, with the projections of one input side by side.

use candle_core::{DType, Result, Tensor, TensorId, bail};

use super::Gpu;
use super::kernels::LowRank;
use super::work::Address;
use crate::lora::{Adapter, LinearKind};
use crate::network::Llama;
use crate::ops::AttentionShape;

/// Addresses of one layer's weights; 0 where the model has none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerWeights {
    pub input_norm: Address,
    /// `[(heads + 2 kv_heads) * head_dim, hidden]`.
    pub qkv: Address,
    pub bias: Address,
    pub q_norm: Address,
    pub k_norm: Address,
    pub o: Address,
    pub post_norm: Address,
    /// `[2 * intermediate, hidden]`.
    pub gate_up: Address,
    pub down: Address,
}

/// All weights of a network.
pub(crate) struct GpuWeights {
    pub embed: Address,
    pub norm: Address,
    pub lm_head: Address,
    pub layers: Vec<LayerWeights>,
    /// `[positions, head_dim / 2]` f32.
    pub cos: Address,
    pub sin: Address,
    pub shape: AttentionShape,
    pub eps: f32,
    /// What the addresses point into.
    _held: Vec<Tensor>,
}

impl GpuWeights {
    /// # Errors
    /// The model's sizes are none that the kernels take, or there is no memory for what has to be copied.
    pub fn new(gpu: &Gpu, llama: &Llama) -> Result<Self> {
        let config = llama.config();
        let pack = 16 / llama.dtype().size_in_bytes();
        for (name, size) in [
            ("hidden_size", config.hidden_size),
            ("intermediate_size", config.intermediate_size),
            ("head_dim", config.head_dim),
        ] {
            if !size.is_multiple_of(pack) {
                bail!("{name} of {size} is no multiple of {pack}");
            }
        }
        if config.head_dim > 32 * pack {
            bail!("head_dim of {} is more than {}", config.head_dim, 32 * pack);
        }
        let mut held = Vec::new();
        let (cos, sin) = llama.rope_tables()?;
        let (cos, sin) = (hold(gpu, &mut held, &[cos])?, hold(gpu, &mut held, &[sin])?);
        let layers = (0..config.num_hidden_layers)
            .map(|layer| layer_weights(gpu, llama, layer, &mut held))
            .collect::<Result<_>>()?;
        Ok(Self {
            embed: hold(gpu, &mut held, &[llama.embed_tokens().clone()])?,
            norm: hold(gpu, &mut held, &[llama.last_norm().clone()])?,
            lm_head: hold(gpu, &mut held, &[llama.head_weight()?])?,
            layers,
            cos,
            sin,
            shape: AttentionShape::of(config),
            eps: config.rms_norm_eps as f32,
            _held: held,
        })
    }
}

fn layer_weights(gpu: &Gpu, llama: &Llama, layer: usize, held: &mut Vec<Tensor>) -> Result<LayerWeights> {
    use LinearKind::*;
    let parts = llama.layer_parts(layer)?;
    let mut weight = |kinds: &[LinearKind]| {
        let tensors: Vec<Tensor> = kinds.iter().map(|kind| parts.weights[*kind as usize].clone()).collect();
        hold(gpu, held, &tensors)
    };
    let (qkv, o) = (weight(&[QProj, KProj, VProj])?, weight(&[OProj])?);
    let (gate_up, down) = (weight(&[GateProj, UpProj])?, weight(&[DownProj])?);
    let mut optional = |tensors: &[Tensor]| match tensors {
        [] => Ok(0),
        tensors => hold(gpu, held, tensors),
    };
    Ok(LayerWeights {
        input_norm: optional(&[parts.input_norm])?,
        qkv,
        bias: optional(&parts.qkv_bias)?,
        q_norm: optional(parts.q_norm.as_slice())?,
        k_norm: optional(parts.k_norm.as_slice())?,
        o,
        post_norm: optional(&[parts.post_norm])?,
        gate_up,
        down,
    })
}

/// The address of tensors that lie one behind the other: where they do not yet, of a copy that does.
fn hold(gpu: &Gpu, held: &mut Vec<Tensor>, tensors: &[Tensor]) -> Result<Address> {
    let mut next = gpu.address(&tensors[0])?;
    let mut adjacent = true;
    for tensor in tensors {
        adjacent &= gpu.address(tensor)? == next;
        next += (tensor.elem_count() * tensor.dtype().size_in_bytes()) as Address;
    }
    if adjacent {
        held.extend_from_slice(tensors);
        return gpu.address(&tensors[0]);
    }
    let all = Tensor::cat(tensors, 0)?;
    let address = gpu.address(&all)?;
    held.push(all);
    Ok(address)
}

/// What tells an adapter from every other, past ones too: the identity of its first factor. Its factors stay where they
/// are while it lives, trained ones too.
pub(crate) fn adapter_id(adapter: &Adapter, layers: usize) -> Option<TensorId> {
    (0..layers)
        .flat_map(|layer| LinearKind::ALL.map(|kind| (layer, kind)))
        .find_map(|(layer, kind)| adapter.pair(layer, kind))
        .map(|pair| pair.a.id())
}

/// An adapter's term of one layer, where it has one; its factors must be f32 on the GPU, as they are loaded.
///
/// - `out_stride`: elements from one row of the layer's output to the next
pub(crate) fn low_rank(
    gpu: &Gpu,
    adapter: &Adapter,
    layer: usize,
    kind: LinearKind,
    out_stride: usize,
) -> Result<Option<LowRank>> {
    let Some(pair) = adapter.pair(layer, kind) else {
        return Ok(None);
    };
    let (rank, inputs) = pair.a.dims2()?;
    let outputs = pair.b.dim(0)?;
    if pair.a.dtype() != DType::F32 || pair.b.dtype() != DType::F32 {
        bail!("the adapter's factors must be f32");
    }
    Ok(Some(LowRank {
        a: gpu.address(&pair.a)?,
        b: gpu.address(&pair.b)?,
        rank,
        inputs,
        outputs,
        out_stride,
    }))
}
