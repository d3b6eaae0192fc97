//! A linear layer's weight, in the form that its products read.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};

use crate::cpu::PackedMatrix;
use crate::{ModelError, Quantization, Weights, ops};

/// A weight `[out, in]` and a bias `[out]`.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    pub weight: Weight,
    pub bias: Option<Tensor>,
}

/// A weight `[out, in]`.
#[derive(Debug, Clone)]
pub(super) enum Weight {
    /// Frozen, f32 or 8 bits, in main memory.
    Packed(Arc<PackedMatrix>),
    /// Trained itself, or of another dtype or on another device.
    Plain(Tensor),
}

impl Weight {
    /// Takes the weight `name` of `shape`, and stores it as the weights are to be.
    pub fn load(weights: &Weights, name: &str, shape: [usize; 2]) -> std::result::Result<Self, ModelError> {
        let weight = Self::new(weights.get(name, &shape)?)?;
        Ok(weight.quantized(weights.quantization()))
    }

    /// The weight in fewer bits, where it is frozen and not so already.
    pub fn quantized(self, quantization: Option<Quantization>) -> Self {
        match (self, quantization) {
            (Self::Packed(weight), Some(Quantization::Q8_0)) if !weight.is_quantized() => {
                Self::Packed(Arc::new(weight.quantized()))
            }
            (weight, _) => weight,
        }
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Packed(weight) => weight.bytes(),
            Self::Plain(weight) => weight.elem_count() * weight.dtype().size_in_bytes(),
        }
    }

    /// Packs the weight where the CPU path can run it.
    pub fn new(weight: Tensor) -> Result<Self> {
        if !ops::has_kernel(&weight) || weight.is_variable() {
            return Ok(Self::Plain(weight));
        }
        let (out, input) = weight.dims2()?;
        let weight = weight.contiguous()?;
        let packed = PackedMatrix::pack(&ops::host_floats(&weight)?, out, input);
        Ok(Self::Packed(Arc::new(packed)))
    }

    /// `x wᵀ`.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Packed(weight) => ops::packed_linear(x, weight),
            Self::Plain(weight) => ops::linear(x, weight, None),
        }
    }

    /// The weight with `delta` (`[out, in]`, f32) added, in its own dtype, and rounded anew where it has 8 bits.
    pub fn add(&self, delta: &Tensor) -> Result<Self> {
        let quantization = self
            .packed()
            .and_then(|w| w.is_quantized().then_some(Quantization::Q8_0));
        let weight = match self {
            Self::Packed(packed) => Tensor::from_vec(packed.unpack(), packed.shape(), &Device::Cpu)?,
            Self::Plain(weight) => weight.clone(),
        };
        let sum = (weight.to_dtype(DType::F32)? + delta)?;
        Ok(Self::new(sum.to_dtype(weight.dtype())?.detach())?.quantized(quantization))
    }

    /// The weight as a tensor, `[out, in]`; a copy where it is packed.
    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    pub fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Packed(packed) => Tensor::from_vec(packed.unpack(), packed.shape(), &Device::Cpu),
            Self::Plain(weight) => Ok(weight.clone()),
        }
    }

    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    pub fn plain(&self) -> Option<&Tensor> {
        match self {
            Self::Packed(_) => None,
            Self::Plain(weight) => Some(weight),
        }
    }

    pub fn packed(&self) -> Option<&Arc<PackedMatrix>> {
        match self {
            Self::Packed(weight) => Some(weight),
            Self::Plain(_) => None,
        }
    }
}

impl Linear {
    /// `x wᵀ + bias`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.weight.product(x)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}
