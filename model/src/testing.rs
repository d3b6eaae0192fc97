//! What the tests of this crate share.

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor};

use crate::config::RopeScaling;
use crate::{Adapter, Llama, LoraConfig, ModelConfig, Quantization, Weights};

/// A very small Llama with grouped heads.
pub fn config() -> ModelConfig {
    ModelConfig {
        model_type: "llama".to_owned(),
        vocab_size: 50,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        max_position_embeddings: 64,
        tie_word_embeddings: true,
        attention_bias: false,
        qk_norm: false,
        sliding_window: None,
        bos_token_id: Some(0),
        eos_token_ids: vec![1],
        dtype: Some("float32".to_owned()),
    }
}

/// Random weights for [`config`].
pub fn network(config: &ModelConfig) -> anyhow::Result<Llama> {
    Ok(Llama::new(config, &weights(config, DType::F32, &Device::Cpu)?)?)
}

/// [`network`] with 8-bit weights.
pub fn quantized(config: &ModelConfig) -> anyhow::Result<Llama> {
    let weights = weights(config, DType::F32, &Device::Cpu)?.quantized(Some(Quantization::Q8_0))?;
    Ok(Llama::new(config, &weights)?)
}

/// Random weights in `dtype` on `device`.
pub fn weights(config: &ModelConfig, dtype: DType, device: &Device) -> anyhow::Result<Weights> {
    Ok(Weights::from_tensors(tensors(config)?, dtype, device))
}

/// [`weights`] rounded to `dtype`, in f32.
#[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
pub fn rounded_weights(config: &ModelConfig, dtype: DType) -> anyhow::Result<Weights> {
    let mut tensors = tensors(config)?;
    for tensor in tensors.values_mut() {
        *tensor = tensor.to_dtype(dtype)?.to_dtype(DType::F32)?;
    }
    Ok(Weights::from_tensors(tensors, DType::F32, &Device::Cpu))
}

fn tensors(config: &ModelConfig) -> anyhow::Result<HashMap<String, Tensor>> {
    let random = |shape: &[usize], seed| -> Result<Tensor> { crate::ops::testing::random(shape, seed)? * 0.4 };
    let mut tensors = HashMap::new();
    let h = config.hidden_size;
    tensors.insert(
        "model.embed_tokens.weight".to_owned(),
        random(&[config.vocab_size, h], 1)?,
    );
    tensors.insert(
        "model.norm.weight".to_owned(),
        Tensor::ones(h, DType::F32, &Device::Cpu)?,
    );
    for layer in 0..config.num_hidden_layers {
        for (i, kind) in crate::LinearKind::ALL.into_iter().enumerate() {
            let (out, input) = kind.shape(config);
            let name = format!("model.layers.{layer}.{}.weight", kind.path());
            tensors.insert(name, random(&[out, input], (100 * layer + i) as u64)?);
        }
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            let name = format!("model.layers.{layer}.{norm}.weight");
            tensors.insert(name, Tensor::ones(h, DType::F32, &Device::Cpu)?);
        }
        let at = |name: &str| format!("model.layers.{layer}.self_attn.{name}");
        for (i, kind) in crate::LinearKind::ALL
            .into_iter()
            .take(3)
            .enumerate()
            .filter(|_| config.attention_bias)
        {
            let bias = random(&[kind.shape(config).0], (50 + i) as u64)?;
            tensors.insert(at(&format!("{}.bias", kind.name())), bias);
        }
        for (i, norm) in ["q_norm", "k_norm"].into_iter().enumerate().filter(|_| config.qk_norm) {
            let weight = (random(&[config.head_dim], (60 + i) as u64)? + 1.0)?;
            tensors.insert(at(&format!("{norm}.weight")), weight);
        }
    }
    Ok(tensors)
}

/// An adapter of all linear layers that changes what they give.
pub fn adapter(llama: &Llama) -> anyhow::Result<Adapter> {
    adapter_of(llama, "all-linear")
}

/// An adapter of some linear layers that changes what they give.
pub fn adapter_of(llama: &Llama, modules: &str) -> anyhow::Result<Adapter> {
    adapter_from(llama, modules, &[])
}

/// The same adapter, from the last place of the `invocation` tokens on.
pub fn adapter_from(llama: &Llama, modules: &str, invocation: &[u32]) -> anyhow::Result<Adapter> {
    let config = LoraConfig {
        target_modules: modules.parse().map_err(anyhow::Error::msg)?,
        invocation_tokens: invocation.to_vec(),
        ..Default::default()
    };
    let adapter = Adapter::init(llama.config(), config, 5, llama.device())?;
    // B is zero at the start: give it values, or nothing is tested.
    for (name, tensor) in adapter.tensors() {
        if name.contains("lora_B") {
            let values = crate::ops::testing::random(tensor.dims(), name.len() as u64)?;
            tensor.slice_set(&(values * 0.2)?.to_device(llama.device())?, 0, 0)?;
        }
    }
    Ok(adapter)
}
