//! What a run trains: an adapter, and a length head where that is the objective.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::Tensor;
use lengthwise_model::{Adapter, LengthBins, LengthHead, LengthHeadConfig, Llama, ModelError, largest_of};

use super::data::Encoded;
use super::{HeadObjective, LoraTrainingConfig, TrainObjective};

/// An adapter with its head, if it has one.
#[derive(Clone)]
pub(super) struct Tuned {
    pub adapter: Adapter,
    pub head: Option<LengthHead>,
}

impl Tuned {
    /// Variables that change nothing yet: the adapter's term is zero, the head says the marginal of `train`.
    pub fn init(llama: &Llama, config: &LoraTrainingConfig, train: &[Encoded]) -> Result<Self, ModelError> {
        Ok(Self {
            adapter: Adapter::init(llama.config(), config.lora.clone(), config.seed, llama.device())?,
            head: match &config.objective {
                TrainObjective::Number => None,
                TrainObjective::Head(objective) => Some(head(llama, objective, train)?),
            },
        })
    }

    /// Every variable by name.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        let mut tensors = self.adapter.tensors();
        tensors.extend(self.head.iter().flat_map(LengthHead::tensors));
        tensors
    }

    /// The same values without a graph.
    pub fn frozen(&self) -> Result<Self, ModelError> {
        Ok(Self {
            adapter: self.adapter.frozen()?,
            head: self.head.as_ref().map(LengthHead::frozen),
        })
    }

    /// The same values as variables.
    pub fn trainable(&self) -> Result<Self, ModelError> {
        Ok(Self {
            adapter: self.adapter.trainable()?,
            head: self.head.as_ref().map(LengthHead::trainable).transpose()?,
        })
    }

    /// Writes the folder; the adapter's config, which is written last, tells that it is whole.
    pub fn save(&self, folder: &Path, base_model: &str) -> Result<(), ModelError> {
        match &self.head {
            Some(head) => head.save(folder)?,
            // A head that an earlier run left would be read as this adapter's.
            None => LengthHead::remove(folder)?,
        }
        self.adapter.save(folder, base_model)
    }

    pub fn load(folder: &Path, llama: &Llama) -> Result<Self, ModelError> {
        let (model, device) = (llama.config(), llama.device());
        let head = LengthHead::is_in(folder).then(|| LengthHead::load(folder, model.hidden_size, device));
        Ok(Self {
            adapter: Adapter::load(folder, model, device)?,
            head: head.transpose()?,
        })
    }
}

fn head(llama: &Llama, objective: &HeadObjective, train: &[Encoded]) -> Result<LengthHead, ModelError> {
    let bins = LengthBins::new(objective.max_tokens);
    let mut marginal = vec![0f32; bins.len()];
    for example in train {
        let label = bins.soft_label(example.lengths(), objective.smoothing);
        marginal.iter_mut().zip(label).for_each(|(sum, share)| *sum += share);
    }
    marginal
        .iter_mut()
        .for_each(|share| *share /= train.len().max(1) as f32);
    let samples = median(train.iter().map(|e| e.lengths().len() as u32).collect()).max(1);
    let config = LengthHeadConfig {
        bins,
        asks_length: objective.asks_length,
        smoothing: objective.smoothing,
        samples,
        temperature: 1.0,
        // Short enough to be read back from JSON as it is.
        point_probability: (largest_of(samples) * 1e4).round() / 1e4,
    };
    LengthHead::init(config, llama.config().hidden_size, &marginal, llama.device())
}

fn median(mut values: Vec<u32>) -> u32 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}
