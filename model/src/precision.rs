//! In how many bits the weights are run.

use std::str::FromStr;

use candle_core::{DType, Device};

use crate::ModelConfig;

/// The dtype that weights are run in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DTypeChoice {
    /// f32 on the CPU, where narrower types are emulated; elsewhere the checkpoint's own.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits with the exponent of f32.
    Bf16,
    /// 16 bits.
    F16,
}

impl DTypeChoice {
    pub(crate) fn resolve(self, config: &ModelConfig, device: &Device) -> DType {
        match (self, config.dtype.as_deref()) {
            (Self::F32, _) => DType::F32,
            (Self::Bf16, _) => DType::BF16,
            (Self::F16, _) => DType::F16,
            (Self::Auto, _) if device.is_cpu() => DType::F32,
            (Self::Auto, Some("float32")) => DType::F32,
            (Self::Auto, Some("float16")) => DType::F16,
            (Self::Auto, _) => DType::BF16,
        }
    }
}

impl DTypeChoice {
    /// The dtype of the KV cache of a model with weights in `weights`, where this is chosen for the cache: `Auto` is the
    /// weights' own.
    pub fn of_cache(self, weights: DType) -> DType {
        match self {
            Self::Auto => weights,
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }
}

/// How the weights of the linear layers and of the head are stored, where that is not the model's dtype. Embeddings, norms,
/// biases, activations and the KV cache keep the dtype.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// 8 bits and one f32 scale for each 32 inputs; on the CPU, in f32.
    Q8_0,
}

impl FromStr for Quantization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "q8_0" => Ok(Self::Q8_0),
            _ => Err("expected q8_0".to_owned()),
        }
    }
}

/// The dtype, and whether the weights are narrower than that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Precision {
    /// The dtype of everything that is not quantised.
    pub dtype: DTypeChoice,
    /// How the weights are quantised.
    pub quantization: Option<Quantization>,
}

impl From<DTypeChoice> for Precision {
    fn from(dtype: DTypeChoice) -> Self {
        Self {
            dtype,
            quantization: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_the_widest_on_the_cpu_and_a_named_dtype_is_obeyed() {
        let config = crate::testing::config();
        assert_eq!(DTypeChoice::Auto.resolve(&config, &Device::Cpu), DType::F32);
        assert_eq!(DTypeChoice::F16.resolve(&config, &Device::Cpu), DType::F16);
    }

    #[test]
    fn the_one_quantization_has_ggmls_name() {
        assert_eq!("q8_0".parse(), Ok(Quantization::Q8_0));
        assert!("q4_0".parse::<Quantization>().is_err());
    }
}
