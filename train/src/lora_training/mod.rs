//! LoRA fine-tuning: a frozen model, an adapter, and prompts with their answers or the lengths of those.

mod activation;
mod calibrate;
mod checkpoint;
mod curve;
mod data;
mod fingerprint;
mod found;
mod objective;
mod order;
mod run;
#[cfg(test)]
mod tests;
mod tuned;

use std::path::PathBuf;

use lengthwise_core::RequestId;
use lengthwise_model::{LoraConfig, ModelError};
use serde::{Deserialize, Serialize};

use crate::files::FileError;
use crate::optim::Schedule;

pub use activation::invocation_tokens;
pub use found::check_output;
pub use objective::{HeadObjective, TrainExample, TrainObjective, TrainTarget};
pub use run::{TrainOutcome, train};

/// How an adapter is trained; the defaults are the published ones.
#[derive(Debug, Clone, PartialEq)]
pub struct LoraTrainingConfig {
    /// What the adapter is trained to do.
    pub objective: TrainObjective,
    /// Rank, scale, dropout and layers of the adapter.
    pub lora: LoraConfig,
    /// Passes over the data.
    pub epochs: usize,
    /// Most optimiser steps, whatever `epochs` says.
    pub max_steps: Option<usize>,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// How it falls.
    pub schedule: Schedule,
    /// Share of the steps in which it rises.
    pub warmup_ratio: f64,
    /// Examples in one forward pass.
    pub batch_size: usize,
    /// Forward passes per optimiser step.
    pub gradient_accumulation_steps: usize,
    /// Keep no activations but those between layers and compute the others again for the backward pass: a fraction of
    /// the memory for a third more arithmetic, and the same gradients.
    pub gradient_checkpointing: bool,
    /// Largest joint norm of a step's gradients; 0: not clipped.
    pub max_grad_norm: f64,
    /// Weight decay of AdamW.
    pub weight_decay: f64,
    /// Of the adapter's initial values, the order of the examples and the dropout.
    pub seed: u64,
    /// Steps between checkpoints.
    pub save_steps: usize,
    /// Steps between evaluations, where there is evaluation data.
    pub eval_steps: usize,
}

impl Default for LoraTrainingConfig {
    fn default() -> Self {
        Self {
            objective: TrainObjective::Number,
            lora: LoraConfig::default(),
            epochs: 3,
            max_steps: None,
            learning_rate: 2e-5,
            schedule: Schedule::Cosine,
            warmup_ratio: 0.03,
            batch_size: 16,
            gradient_accumulation_steps: 1,
            gradient_checkpointing: false,
            max_grad_norm: 1.0,
            weight_decay: 0.0,
            seed: 0,
            save_steps: 100,
            eval_steps: 100,
        }
    }
}

/// What belongs to one run besides its data.
pub struct TrainRun<'a> {
    /// The base model.
    pub model: &'a lengthwise_model::LoadedModel,
    /// Where the adapter, its checkpoints and the loss curve go.
    pub output: PathBuf,
    /// Go on from the last checkpoint in `output`.
    pub resume: bool,
    /// Asked after every step and between the batches of an evaluation: whether the run is to end early, with a checkpoint.
    pub stop: &'a dyn Fn() -> bool,
}

impl<'a> TrainRun<'a> {
    /// A run from its first step to its last.
    pub fn new(model: &'a lengthwise_model::LoadedModel, output: PathBuf) -> Self {
        Self {
            model,
            output,
            resume: false,
            stop: &|| false,
        }
    }
}

/// One line of the loss curve, `loss.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Optimiser steps done.
    pub step: usize,
    /// Passes over the data done.
    pub epoch: f64,
    /// Mean loss of the step's answer tokens, or of its prompts with a head, in nats.
    pub loss: f64,
    /// The step's learning rate.
    pub learning_rate: f64,
    /// Joint norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Mean loss over the evaluation data, where the step ended with an evaluation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
}

/// How far a run is.
#[derive(Debug, Clone)]
pub struct TrainProgress {
    /// The step just done.
    pub point: CurvePoint,
    /// Steps of the whole run.
    pub total_steps: usize,
    /// Tokens of this step.
    pub tokens: usize,
}

/// Why no adapter was trained.
#[derive(Debug, thiserror::Error)]
pub enum LoraTrainingError {
    /// There is nothing to train on.
    #[error("there are no training examples")]
    NoExamples,
    /// A setting cannot be.
    #[error("{name} is {got}, it must be at least {least}")]
    Setting {
        /// Its name.
        name: &'static str,
        /// What was asked for.
        got: usize,
        /// The least allowed.
        least: usize,
    },
    /// An example without sampled lengths, which a head learns.
    #[error(
        "example \"{id}\" of the {set} data has no lengths, which the head objective needs: make the pairs with `lengthwise \
         label`"
    )]
    NoLengths {
        /// The example.
        id: RequestId,
        /// `training` or `evaluation`.
        set: &'static str,
    },
    /// An example does not fit the model's context.
    #[error(
        "example \"{id}\" of the {set} data has {got} tokens, the model takes at most {max}: leave it out or shorten it"
    )]
    ExampleTooLong {
        /// The example.
        id: RequestId,
        /// `training` or `evaluation`.
        set: &'static str,
        /// Its tokens.
        got: usize,
        /// Positions of the model.
        max: usize,
    },
    /// Nothing stands behind the instruction, where an adapter could begin.
    #[error(
        "the model's template puts nothing behind the instruction, so that an activated adapter has no place to begin: \
         ask the length question, or train without --alora"
    )]
    NoInvocation,
    /// The adapter would change nothing of an example.
    #[error(
        "example \"{id}\" of the {set} data does not hold the adapter's invocation tokens, at which it begins: leave it \
         out, or train without --alora"
    )]
    NotInvoked {
        /// The example.
        id: RequestId,
        /// `training` or `evaluation`.
        set: &'static str,
    },
    /// There are results in the output folder already.
    #[error("{} holds an unfinished run; go on with --resume or choose another folder", path.display())]
    Unfinished {
        /// The folder.
        path: PathBuf,
    },
    /// The output folder holds an adapter, which training would replace.
    #[error("{} holds an adapter already: choose another --output, or remove it", path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
    },
    /// The checkpoint or the finished adapter was made with other settings or data.
    #[error(
        "the run in {} has other settings or data{differences}: repeat them, or choose another --output", path.display()
    )]
    OtherRun {
        /// The folder.
        path: PathBuf,
        /// What differs: ` (seed 1, now 2)`.
        differences: String,
    },
    /// The run was asked to end early.
    #[error(
        "stopped after step {step} of {total}, which {} keeps; the same command with --resume goes on from there",
        path.display()
    )]
    Stopped {
        /// Steps done.
        step: usize,
        /// Steps of the whole run.
        total: usize,
        /// The checkpoint.
        path: PathBuf,
    },
    /// A file of the run.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file of the run is damaged.
    #[error("{}: {reason}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The loss is not a number any more.
    #[error("the loss is {loss} at step {step}: lower the learning rate; the last checkpoint is kept")]
    Diverged {
        /// The step.
        step: usize,
        /// The loss.
        loss: f64,
    },
    /// The network failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl From<candle_core::Error> for LoraTrainingError {
    fn from(err: candle_core::Error) -> Self {
        Self::Model(err.into())
    }
}
