//! The low-rank factors and their forward pass.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use candle_core::{DType, Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{LinearKind, LoraConfig};
use crate::cpu::PackedMatrix;
use crate::{ModelConfig, ModelError};

/// The factors of one linear layer, f32: `a` is `[r, in]`, `b` is `[out, r]`.
#[derive(Debug, Clone)]
pub(crate) struct LoraPair {
    pub a: Tensor,
    pub b: Tensor,
    packed: OnceLock<Arc<PackedPair>>,
}

/// The factors as the CPU path multiplies them.
#[derive(Debug)]
pub(crate) struct PackedPair {
    pub a: PackedMatrix,
    pub b: PackedMatrix,
}

impl LoraPair {
    pub fn new(a: Tensor, b: Tensor) -> Self {
        Self {
            a,
            b,
            packed: OnceLock::new(),
        }
    }

    /// The factors in panels, made once; anew every time while they are trained.
    pub fn packed(&self) -> candle_core::Result<Arc<PackedPair>> {
        if let Some(packed) = self.packed.get() {
            return Ok(packed.clone());
        }
        let pack = |t: &Tensor| {
            let (outputs, inputs) = t.dims2()?;
            Ok::<_, candle_core::Error>(PackedMatrix::pack(&t.flatten_all()?.to_vec1::<f32>()?, outputs, inputs))
        };
        let packed = Arc::new(PackedPair {
            a: pack(&self.a)?,
            b: pack(&self.b)?,
        });
        if self.a.is_variable() || self.b.is_variable() {
            return Ok(packed);
        }
        Ok(self.packed.get_or_init(|| packed).clone())
    }
}

/// A LoRA adapter of one model.
#[derive(Debug, Clone)]
pub struct Adapter {
    config: LoraConfig,
    pairs: BTreeMap<(usize, LinearKind), LoraPair>,
}

impl Adapter {
    /// A new adapter whose factors are variables: `a` uniform in ±1/sqrt(in), as PEFT's Kaiming initialisation with
    /// a = √5, and `b` zero, so that it changes nothing before it is trained.
    ///
    /// # Errors
    /// A rank of 0, or no memory.
    pub fn init(model: &ModelConfig, config: LoraConfig, seed: u64, device: &Device) -> Result<Self, ModelError> {
        if config.r == 0 {
            return Err(ModelError::AdapterMismatch {
                reason: "a rank of 0; it must be at least 1".to_owned(),
            });
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut pairs = BTreeMap::new();
        for layer in 0..model.num_hidden_layers {
            for &kind in config.target_modules.kinds() {
                let (out, input) = kind.shape(model);
                let bound = 1.0 / (input as f32).sqrt();
                let a: Vec<f32> = (0..config.r * input).map(|_| rng.random_range(-bound..bound)).collect();
                let a = Var::from_tensor(&Tensor::from_vec(a, (config.r, input), device)?)?;
                let b = Var::zeros((out, config.r), DType::F32, device)?;
                pairs.insert(
                    (layer, kind),
                    LoraPair::new(a.as_tensor().clone(), b.as_tensor().clone()),
                );
            }
        }
        Ok(Self { config, pairs })
    }

    pub(super) fn from_parts(config: LoraConfig, pairs: BTreeMap<(usize, LinearKind), LoraPair>) -> Self {
        Self { config, pairs }
    }

    /// The settings.
    pub fn config(&self) -> &LoraConfig {
        &self.config
    }

    /// Every factor under PEFT's name for it, in the order of the names.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        let mut tensors = BTreeMap::new();
        for ((layer, kind), pair) in &self.pairs {
            tensors.insert(peft_name(*layer, *kind, 'A'), pair.a.clone());
            tensors.insert(peft_name(*layer, *kind, 'B'), pair.b.clone());
        }
        tensors
    }

    /// The same adapter with every factor a variable, to be trained on.
    ///
    /// # Errors
    /// No memory.
    pub fn trainable(&self) -> Result<Self, ModelError> {
        self.map(|t| Ok(Var::from_tensor(&t.detach())?.as_tensor().clone()))
    }

    /// A copy of the values as they are now, without a graph: for forward passes that are not trained on.
    ///
    /// # Errors
    /// No memory.
    pub fn frozen(&self) -> Result<Self, ModelError> {
        self.map(|t| Ok(t.detach().copy()?))
    }

    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor, ModelError>) -> Result<Self, ModelError> {
        let pair = |p: &LoraPair| Ok::<_, ModelError>(LoraPair::new(f(&p.a)?, f(&p.b)?));
        let pairs = self
            .pairs
            .iter()
            .map(|(key, p)| Ok((*key, pair(p)?)))
            .collect::<Result<_, ModelError>>()?;
        Ok(Self {
            config: self.config.clone(),
            pairs,
        })
    }

    pub(crate) fn pair(&self, layer: usize, kind: LinearKind) -> Option<&LoraPair> {
        self.pairs.get(&(layer, kind))
    }

    /// `scale * B A`, `[out, in]` in f32: what merging adds to the weight.
    pub(crate) fn delta(&self, layer: usize, kind: LinearKind) -> candle_core::Result<Option<Tensor>> {
        match self.pair(layer, kind) {
            Some(pair) => Ok(Some((pair.b.matmul(&pair.a)? * self.config.scale())?)),
            None => Ok(None),
        }
    }

    /// `scale * B A x`: the low-rank term alone, in the dtype of `x`; the factors stay f32.
    ///
    /// - `x`: `[t, in]`; returns `[t, out]`
    pub(crate) fn low_rank(
        &self,
        pair: &LoraPair,
        x: &Tensor,
        dropout: Option<&Dropout>,
    ) -> candle_core::Result<Tensor> {
        let mut wide = x.to_dtype(DType::F32)?;
        if let Some(dropout) = dropout {
            wide = dropout.apply(&wide)?;
        }
        let low = crate::ops::linear(&wide, &pair.a, None)?; // [t, r]
        let high = crate::ops::linear(&low, &pair.b, None)?; // [t, out]
        (high * self.config.scale())?.to_dtype(x.dtype())
    }
}

/// PEFT's name of a factor.
pub(super) fn peft_name(layer: usize, kind: LinearKind, factor: char) -> String {
    format!(
        "base_model.model.model.layers.{layer}.{}.lora_{factor}.weight",
        kind.path()
    )
}

/// Drops inputs of the low-rank terms during training. Seeded for one forward pass, so that a resumed run drops
/// the same ones.
#[derive(Debug, Clone)]
pub struct Dropout {
    probability: f64,
    rng: RefCell<ChaCha8Rng>,
}

impl Dropout {
    /// Drops each input with `probability`; the others are scaled by `1 / (1 - probability)`.
    pub fn new(probability: f64, seed: u64) -> Self {
        Self {
            probability,
            rng: RefCell::new(ChaCha8Rng::seed_from_u64(seed)),
        }
    }

    /// The settings of a generator for one part of the pass: its probability and a seed that this one draws.
    pub(crate) fn fork(&self) -> Option<(f64, u64)> {
        (self.probability > 0.0).then(|| (self.probability, self.rng.borrow_mut().random()))
    }

    /// Which of `len` inputs are dropped; `None` where that is none.
    pub(crate) fn mask(&self, len: usize) -> Option<Mask> {
        if self.probability <= 0.0 {
            return None;
        }
        // 32 random bits per element; below this threshold it is dropped.
        let threshold = (self.probability * f64::from(u32::MAX)) as u32;
        let mut rng = self.rng.borrow_mut();
        let mut kept = vec![0u64; len.div_ceil(64)];
        for i in 0..len {
            kept[i / 64] |= u64::from(rng.random::<u32>() >= threshold) << (i % 64);
        }
        Some(Mask {
            kept,
            scale: (1.0 / (1.0 - self.probability)) as f32,
        })
    }

    fn apply(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let Some(mask) = self.mask(x.elem_count()) else {
            return Ok(x.clone());
        };
        let mut factors = vec![1f32; x.elem_count()];
        mask.apply(&mut factors);
        x * Tensor::from_vec(factors, x.shape(), x.device())?
    }
}

/// Inputs that are dropped, and what the others are multiplied by.
#[derive(Debug, Clone)]
pub(crate) struct Mask {
    /// One bit per element.
    kept: Vec<u64>,
    scale: f32,
}

impl Mask {
    /// The same of these rows alone, of `width` elements each.
    pub fn of_rows(&self, rows: &[u32], width: usize) -> Self {
        let mut kept = vec![0u64; (rows.len() * width).div_ceil(64)];
        let from = rows
            .iter()
            .flat_map(|&row| (0..width).map(move |i| row as usize * width + i));
        for (to, from) in from.enumerate() {
            kept[to / 64] |= (self.kept[from / 64] >> (from % 64) & 1) << (to % 64);
        }
        Self { kept, ..*self }
    }

    /// Drops and scales the elements of `x`.
    pub fn apply(&self, x: &mut [f32]) {
        for (bits, x) in self.kept.iter().zip(x.chunks_mut(64)) {
            for (i, x) in x.iter_mut().enumerate() {
                *x = if bits >> i & 1 == 1 { *x * self.scale } else { 0.0 };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropout_drops_its_share_and_keeps_the_mean() -> candle_core::Result<()> {
        let x = Tensor::ones((100, 100), DType::F32, &Device::Cpu)?;
        let y = Dropout::new(0.25, 7).apply(&x)?.flatten_all()?.to_vec1::<f32>()?;
        let dropped = y.iter().filter(|v| **v == 0.0).count();
        assert!((2300..2700).contains(&dropped), "{dropped}");
        assert!(y.iter().all(|v| *v == 0.0 || (*v - 4.0 / 3.0).abs() < 1e-6));
        let again = Dropout::new(0.25, 7).apply(&x)?.flatten_all()?.to_vec1::<f32>()?;
        assert_eq!(y, again, "the same seed drops the same inputs");
        Ok(())
    }
}
