//! A head on the network that predicts the distribution of a response's length.
//!
//! One forward pass over the prompt is all that it needs: nothing is decoded.

mod bins;
mod distribution;
mod file;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Tensor, Var};

pub use bins::LengthBins;
pub use distribution::{LengthDistribution, QUANTILES, largest_of};

use crate::{Adapter, Llama, ModelError};

const WEIGHT: &str = "length_head.weight";
const BIAS: &str = "length_head.bias";

/// What a head predicts, and how its figures are read; saved as `length_head.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct LengthHeadConfig {
    /// The bins.
    pub bins: LengthBins,
    /// Whether the length question is asked after the instruction.
    pub asks_length: bool,
    /// Standard deviation by which the labels were spread, in the logarithm of the length.
    pub smoothing: f64,
    /// Samples of an instruction, the largest of which the estimate's `max_tokens` stands for.
    pub samples: u32,
    /// The logits are divided by it, so that the quantiles hold what they say.
    pub temperature: f64,
    /// The quantile that `max_tokens` is; `0.5^(1 / samples)` unless it was fitted.
    pub point_probability: f64,
}

/// `softmax(W h + b)` over the bins, `h` the last position's hidden state behind the network's last norm.
#[derive(Debug, Clone)]
pub struct LengthHead {
    /// How it is read.
    pub config: LengthHeadConfig,
    /// `[bins, hidden]`, f32.
    weight: Tensor,
    /// `[bins]`, f32.
    bias: Tensor,
}

impl LengthHead {
    /// A new head that says the same of every prompt: a weight of zero, and a bias of the logarithm of `marginal`, the
    /// share of each bin. Both are variables.
    ///
    /// # Errors
    /// No memory.
    pub fn init(
        config: LengthHeadConfig,
        hidden_size: usize,
        marginal: &[f32],
        device: &Device,
    ) -> Result<Self, ModelError> {
        // A bin without an example stays possible.
        let floor = 1e-2 / marginal.len() as f32;
        let bias: Vec<f32> = marginal.iter().map(|share| (share + floor).ln()).collect();
        let bins = config.bins.len();
        Ok(Self {
            config,
            weight: Var::zeros((bins, hidden_size), DType::F32, device)?.as_tensor().clone(),
            bias: Var::from_tensor(&Tensor::from_vec(bias, bins, device)?)?
                .as_tensor()
                .clone(),
        })
    }

    /// Weight and bias by name.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        BTreeMap::from([
            (WEIGHT.to_owned(), self.weight.clone()),
            (BIAS.to_owned(), self.bias.clone()),
        ])
    }

    /// The same head with variables, to be trained on.
    ///
    /// # Errors
    /// No memory.
    pub fn trainable(&self) -> Result<Self, ModelError> {
        let var = |t: &Tensor| Ok::<_, ModelError>(Var::from_tensor(&t.detach())?.as_tensor().clone());
        Ok(Self {
            config: self.config.clone(),
            weight: var(&self.weight)?,
            bias: var(&self.bias)?,
        })
    }

    /// The same values without a graph.
    #[must_use]
    pub fn frozen(&self) -> Self {
        Self {
            config: self.config.clone(),
            weight: self.weight.detach(),
            bias: self.bias.detach(),
        }
    }

    /// Where its values lie.
    pub fn device(&self) -> &Device {
        self.weight.device()
    }

    /// The logits of every prompt, one per bin: a prefill each, as many in one pass as have `pass_tokens` tokens together.
    ///
    /// # Errors
    /// A prompt that is empty or longer than the model's context, or the device failed.
    pub fn predict(
        &self,
        llama: &Llama,
        adapter: Option<&Adapter>,
        prompts: &[&[u32]],
        pass_tokens: usize,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        let mut logits = Vec::with_capacity(prompts.len());
        let mut rest = prompts;
        while !rest.is_empty() {
            let mut tokens = 0;
            let fitting = rest.iter().take_while(|prompt| {
                tokens += prompt.len();
                tokens <= pass_tokens
            });
            let (pass, later) = rest.split_at(fitting.count().max(1));
            let hidden = llama.last_hidden(pass, adapter, None)?.to_device(self.device())?;
            logits.extend(self.logits(&hidden)?.to_vec2::<f32>()?);
            rest = later;
        }
        Ok(logits)
    }

    /// The logits of a hidden state that a pass gave ([`crate::Wanted::Hidden`]), one per bin.
    ///
    /// # Errors
    /// Another width than the network's, or the device failed.
    pub fn read(&self, hidden: &[f32]) -> Result<Vec<f32>, ModelError> {
        let hidden = Tensor::from_slice(hidden, (1, hidden.len()), self.device())?;
        Ok(self.logits(&hidden)?.flatten_all()?.to_vec1()?)
    }

    /// - `hidden`: `[n, hidden]`, f32; returns `[n, bins]`, f32
    ///
    /// # Errors
    /// Another width, or the device failed.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        Ok(hidden.matmul(&self.weight.t()?)?.broadcast_add(&self.bias)?)
    }

    /// The summed cross-entropy `-Σ label log softmax(logits)` divided by `divisor`, in nats, with its graph.
    ///
    /// - `hidden`: `[n, hidden]`, f32; `labels`: `[n, bins]`, each row a distribution
    ///
    /// # Errors
    /// Shapes that differ, or the device failed.
    pub fn loss(&self, hidden: &Tensor, labels: &Tensor, divisor: f64) -> Result<Tensor, ModelError> {
        let log_p = candle_nn::ops::log_softmax(&self.logits(hidden)?, D::Minus1)?;
        Ok((log_p * labels)?.sum_all()?.affine(-1.0 / divisor, 0.0)?)
    }

    /// A distribution for every row of logits.
    ///
    /// # Errors
    /// A logit that is not finite.
    pub fn distributions(&self, logits: &[Vec<f32>]) -> Result<Vec<LengthDistribution<'_>>, ModelError> {
        let (bins, temperature) = (&self.config.bins, self.config.temperature);
        let one =
            |row: &Vec<f32>| LengthDistribution::from_logits(bins, row, temperature).ok_or(ModelError::NonFiniteLogits);
        logits.iter().map(one).collect()
    }
}
