//! Makes the bundled model from a seed: its tokenizer, its weights, its model folder.

mod folder;
mod init;
mod packing;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use lengthwise_model::{Llama, ModelConfig, ModelError, RopeScaling, Weights};

use crate::files::{FileError, beside, lock_folder};
use crate::language::{Split, examples};
use crate::language_tokenizer::{self, TrainTokenizerError};
use crate::optim::{AdamW, AdamWConfig, Gradients, LearningRate, Muon, MuonConfig, Schedule};
use crate::packed::{Objective, PackedExamples};

use packing::Packer;

/// How the bundled model is made.
#[derive(Debug, Clone, PartialEq)]
pub struct PretrainConfig {
    /// Everything random comes from it.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: usize,
    /// Tokens of a step's batch, instructions counted.
    pub batch_tokens: usize,
    /// Peak learning rate of the matrices (Muon).
    pub matrix_learning_rate: f64,
    /// Peak learning rate of everything else (AdamW).
    pub learning_rate: f64,
    /// Width of the hidden states; a multiple of 32, the width of a head.
    pub hidden_size: usize,
    /// Transformer blocks.
    pub layers: usize,
}

impl Default for PretrainConfig {
    fn default() -> Self {
        Self {
            seed: 0,
            steps: 3000,
            batch_tokens: 2560,
            matrix_learning_rate: 1.5e-2,
            learning_rate: 4e-3,
            hidden_size: 128,
            layers: 5,
        }
    }
}

/// Steps of linear warm-up.
const WARMUP_STEPS: usize = 100;
/// Largest joint norm of a step's gradients.
const MAX_GRAD_NORM: f64 = 1.0;
/// Examples of each family that the tokenizer is trained on.
const TOKENIZER_EXAMPLES: usize = 300;
/// Parts of a batch that run side by side.
const SHARDS: usize = 2;
/// Longest prompt and answer together.
const MAX_POSITIONS: usize = 1024;

/// How far a run is.
#[derive(Debug, Clone, Copy)]
pub struct PretrainProgress {
    /// Steps done.
    pub step: usize,
    /// Mean loss of this step's answer tokens, in nats.
    pub loss: f64,
    /// Tokens of this step's batch.
    pub tokens: usize,
}

/// Why no model was made.
#[derive(Debug, thiserror::Error)]
pub enum PretrainError {
    /// The tokenizer could not be trained.
    #[error(transparent)]
    Tokenizer(#[from] TrainTokenizerError),
    /// A text could not be encoded.
    #[error("the tokenizer failed: {0}")]
    Encode(tokenizers::Error),
    /// The network failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The loss is not a number any more.
    #[error("the loss is {loss} at step {step}: lower the learning rate")]
    Diverged {
        /// Steps done.
        step: usize,
        /// The loss.
        loss: f64,
    },
    /// The folder has other files in it.
    #[error("{path} is not empty: choose another --output, or remove it")]
    NotEmpty {
        /// The folder.
        path: String,
    },
    /// The folder cannot be made, or another process writes it.
    #[error(transparent)]
    File(#[from] FileError),
    /// The folder cannot be written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl From<candle_core::Error> for PretrainError {
    fn from(err: candle_core::Error) -> Self {
        Self::Model(err.into())
    }
}

/// Trains the model and writes its folder in Hugging Face layout, which must be empty or missing.
///
/// # Errors
/// The loss diverged, or the folder is not empty or cannot be written.
pub fn pretrain(
    config: &PretrainConfig,
    output: &Path,
    progress: &mut dyn FnMut(PretrainProgress),
) -> Result<(), PretrainError> {
    let _lock = lock_folder(output)?;
    check_empty(output)?;
    let corpus = language_tokenizer::corpus(config.seed, TOKENIZER_EXAMPLES);
    let tokenizer = language_tokenizer::train_tokenizer(&corpus, language_tokenizer::VOCAB_SIZE)?;
    let model = model_config(config);
    let parameters = init::parameters(&model, config.seed)?;
    let tensors: HashMap<String, Tensor> = parameters.clone().into_iter().collect();
    let llama = Llama::new(&model, &Weights::from_tensors(tensors, DType::F32, &Device::Cpu))?;
    let mut optimisers = Optimisers::new(&parameters, config)?;
    let mut packer = Packer::new(&tokenizer, (config.batch_tokens / SHARDS).max(1));
    let mut chunk = 0;
    for step in 0..config.steps {
        let mut batch = Vec::with_capacity(SHARDS);
        while batch.len() < SHARDS {
            match packer.take() {
                Some(shard) => batch.push(shard),
                None => {
                    chunk += 1;
                    // Fresh examples for ever: chunk 0 would be the tokenizer's seed.
                    packer.fill(&examples(Split::Train, config.seed.wrapping_add(chunk << 20), 256))?;
                }
            }
        }
        let loss = optimisers.step(&llama, &parameters, &batch, step)?;
        if !loss.is_finite() {
            return Err(PretrainError::Diverged { step, loss });
        }
        progress(PretrainProgress {
            step: step + 1,
            loss,
            tokens: batch.iter().map(PackedExamples::tokens).sum(),
        });
    }
    // Beside it first, so that the folder is empty or whole.
    let failed = |path: &Path, source| PretrainError::Io {
        path: path.display().to_string(),
        source,
    };
    let output = output.canonicalize().map_err(|err| failed(output, err))?;
    let staged = beside(&output, &format!(".tmp-{}", std::process::id()));
    std::fs::create_dir(&staged).map_err(|err| failed(&staged, err))?;
    let written = folder::write(&staged, &model, &tokenizer, &parameters)
        .and_then(|()| std::fs::rename(&staged, &output).map_err(|err| failed(&output, err)));
    if written.is_err() {
        // The first error is the one to tell.
        let _ = std::fs::remove_dir_all(&staged);
    }
    written
}

/// Somebody's model may be in there, or anything else.
fn check_empty(folder: &Path) -> Result<(), PretrainError> {
    let path = || folder.display().to_string();
    let mut entries = std::fs::read_dir(folder).map_err(|source| PretrainError::Io { path: path(), source })?;
    match entries.next() {
        Some(_) => Err(PretrainError::NotEmpty { path: path() }),
        None => Ok(()),
    }
}

/// The two optimisers of a run: Muon for the blocks' matrices, AdamW for embeddings and norms.
struct Optimisers {
    muon: Muon,
    adamw: AdamW,
    matrix_rate: LearningRate,
    rate: LearningRate,
}

impl Optimisers {
    fn new(parameters: &BTreeMap<String, Tensor>, config: &PretrainConfig) -> Result<Self, PretrainError> {
        let is_matrix = |name: &str, p: &Tensor| p.rank() == 2 && name != init::EMBEDDING;
        let (matrices, rest) = parameters.clone().into_iter().partition(|(name, p)| is_matrix(name, p));
        let rate = |peak| LearningRate {
            peak,
            warmup_steps: WARMUP_STEPS,
            total_steps: config.steps,
            schedule: Schedule::Linear,
        };
        Ok(Self {
            muon: Muon::new(matrices, MuonConfig::default())?,
            adamw: AdamW::new(
                rest,
                AdamWConfig {
                    beta2: 0.95,
                    ..AdamWConfig::default()
                },
            )?,
            matrix_rate: rate(config.matrix_learning_rate),
            rate: rate(config.learning_rate),
        })
    }

    /// One optimiser step; returns the batch's loss before it.
    fn step(
        &mut self,
        llama: &Llama,
        parameters: &BTreeMap<String, Tensor>,
        batch: &[PackedExamples],
        step: usize,
    ) -> Result<f64, PretrainError> {
        let targets: usize = batch.iter().map(PackedExamples::answer_tokens).sum();
        let objective = Objective {
            llama,
            adapter: None,
            parameters,
            dropout: None,
            checkpointing: false,
        };
        let mut grads = Gradients::default();
        let loss = objective.gradients(batch, targets as f64, &mut grads)?;
        grads.clip(MAX_GRAD_NORM)?;
        self.muon.step(&grads, self.matrix_rate.at(step))?;
        self.adamw.step(&grads, self.rate.at(step))?;
        Ok(loss)
    }
}

/// The config.json of the bundled model.
fn model_config(config: &PretrainConfig) -> ModelConfig {
    ModelConfig {
        model_type: "llama".to_owned(),
        vocab_size: language_tokenizer::VOCAB_SIZE,
        hidden_size: config.hidden_size,
        // 8/3 of the width, as Llama, in multiples of 32.
        intermediate_size: (config.hidden_size * 8 / 3).div_ceil(32) * 32,
        num_hidden_layers: config.layers,
        num_attention_heads: config.hidden_size / 32,
        num_key_value_heads: config.hidden_size / 32,
        head_dim: 32,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        max_position_embeddings: MAX_POSITIONS,
        tie_word_embeddings: true,
        attention_bias: false,
        qk_norm: false,
        sliding_window: None,
        bos_token_id: Some(0),
        eos_token_ids: vec![1],
        dtype: Some("float16".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_other_files_is_left_as_it_is() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("config.json"), "{}")?;
        let config = PretrainConfig {
            steps: 1,
            ..PretrainConfig::default()
        };
        let err = pretrain(&config, dir.path(), &mut |_| ())
            .expect_err("not empty")
            .to_string();
        assert!(err.contains("is not empty"), "{err}");
        assert_eq!(std::fs::read_to_string(dir.path().join("config.json"))?, "{}");
        Ok(())
    }
}
