//! Sampling a model's own responses and keeping their lengths.

mod collection;
mod endpoint;
#[cfg(test)]
mod tests;

use std::path::Path;

use lengthwise_core::{DecodeError, Decoder, RequestId};
use serde::Serialize;

use crate::files::{FileError, InstructionRecord, LengthRecord};

use collection::Collection;
pub use endpoint::{EndpointConfig, EndpointDecoder};

/// What is sampled of every instruction. Another value of any of them is another collection.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CollectConfig {
    /// The model, as it was asked for.
    pub model: String,
    /// dtype that it runs in; `None` where somebody else runs it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// dtype of its KV cache, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_cache_dtype: Option<String>,
    /// One sample, or several, at each.
    pub temperatures: Vec<f32>,
    /// Only the most likely tokens that together have this probability are drawn from; 1: all.
    pub top_p: f32,
    /// Only this many most likely tokens are drawn from; 0: all.
    pub top_k: u32,
    /// Samples at each temperature above 0; at 0 all would be the same.
    pub samples_per_temperature: usize,
    /// Cap on every response, in tokens.
    pub max_new_tokens: u32,
    /// Of all samples.
    pub seed: u64,
    /// Keep the texts too.
    pub save_text: bool,
}

impl CollectConfig {
    /// Temperature and number of every sample of an instruction.
    fn samples(&self) -> Result<Vec<(f32, usize)>, CollectError> {
        let usable = self.temperatures.iter().all(|t| t.is_finite() && *t >= 0.0);
        if self.temperatures.is_empty() || self.samples_per_temperature == 0 || self.max_new_tokens == 0 || !usable {
            return Err(CollectError::NothingToSample);
        }
        let twice = |(i, t): (usize, &f32)| self.temperatures[..i].contains(t).then_some(*t);
        if let Some(temperature) = self.temperatures.iter().enumerate().find_map(twice) {
            return Err(CollectError::TemperatureTwice { temperature });
        }
        // Adding 0 turns -0 into 0.
        let samples =
            |&t: &f32| (0..if t == 0.0 { 1 } else { self.samples_per_temperature }).map(move |k| (t + 0.0, k));
        Ok(self.temperatures.iter().flat_map(samples).collect())
    }
}

/// How far a collection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CollectProgress {
    /// Instructions done, those of an earlier run included.
    pub done: usize,
    /// Instructions in all.
    pub total: usize,
    /// Tokens sampled in this run.
    pub tokens: u64,
}

/// Why a collection ended early; what was finished is kept.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// A file of it.
    #[error(transparent)]
    File(#[from] FileError),
    /// The decoder failed.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// Nothing is to be sampled.
    #[error(
        "there is nothing to sample: give at least one temperature (0 or more), one sample for each and one new token"
    )]
    NothingToSample,
    /// The samples at it could not be told apart.
    #[error("temperature {temperature} is given twice: raise the samples per temperature instead")]
    TemperatureTwice {
        /// The temperature.
        temperature: f32,
    },
    /// An instruction leaves no room in the model's context.
    #[error("instruction {id}: the prompt has {got} tokens, the model takes at most {max}; shorten it or leave it out")]
    TooLong {
        /// The instruction, the first such one.
        id: RequestId,
        /// Its tokens.
        got: usize,
        /// Most tokens that a prompt may have.
        max: usize,
    },
    /// The decoder failed at one instruction.
    #[error("instruction {id}: {endpoint}: {reason}")]
    Endpoint {
        /// The instruction.
        id: RequestId,
        /// The engine's address.
        endpoint: String,
        /// What went wrong.
        reason: String,
    },
    /// No instruction is accepted.
    #[error("the server refused every instruction, {id} for this reason: {reason}")]
    AllRefused {
        /// One of them.
        id: RequestId,
        /// What the server said.
        reason: String,
    },
    /// Every instruction was left out.
    #[error("no instruction can be answered: {too_long} are too long for the model, {refused} were refused")]
    NothingLeft {
        /// Whose prompts do not fit.
        too_long: usize,
        /// That the server would not run.
        refused: usize,
    },
    /// The decoder ended without an error and without all answers.
    #[error("instruction {id} got {got} of its {wanted} samples: the decoder lost the others")]
    Unanswered {
        /// The instruction, the first such one.
        id: RequestId,
        /// Samples that came.
        got: usize,
        /// Samples that were asked for.
        wanted: usize,
    },
    /// The journal holds an instruction that the input does not.
    #[error("{journal} holds instruction {id}, which the input has not, or not so: it belongs to another input")]
    OtherInput {
        /// The journal's output.
        journal: String,
        /// The instruction.
        id: RequestId,
    },
    /// The journal holds a line that is no record.
    #[error("the unfinished {journal} is damaged in line {line}: remove that line from {journal}.partial")]
    Damaged {
        /// The journal's output.
        journal: String,
        /// The line in the journal.
        line: usize,
    },
}

/// A collection: of which instructions, how, and where to.
#[derive(Debug, Clone, Copy)]
pub struct CollectJob<'a> {
    /// Sampled in this order; the output has it too.
    pub instructions: &'a [InstructionRecord],
    /// What is sampled.
    pub config: &'a CollectConfig,
    /// `lengths.jsonl`.
    pub output: &'a Path,
    /// Leave out instructions that are too long for the model's context, with a warning.
    pub skip_too_long: bool,
}

/// What a collection came to.
#[derive(Debug, Clone, PartialEq)]
pub struct CollectSummary {
    /// In the order of the input.
    pub records: Vec<LengthRecord>,
    /// Instructions that an earlier run had finished.
    pub resumed: usize,
    /// Instructions that were left out as too long.
    pub too_long: Vec<RequestId>,
    /// Instructions that the server refused, which are left out too.
    pub refused: Vec<RequestId>,
    /// Tokens sampled in this run.
    pub tokens: u64,
}

impl CollectJob<'_> {
    /// Samples every instruction and writes `lengths.jsonl` in the order of the input. A killed run goes on where it
    /// was: the samples depend on the seed, the instruction's id and their number, not on the batch, so the file is
    /// the same.
    ///
    /// All samples go to the decoder in one call, in the order of the input: so it checks every prompt before it
    /// decodes the first, and its slots never run empty; a kill loses what is in the slots.
    ///
    /// # Errors
    /// See [`CollectError`].
    pub fn run(
        &self,
        decoder: &mut dyn Decoder,
        progress: &mut dyn FnMut(CollectProgress),
    ) -> Result<CollectSummary, CollectError> {
        let mut collection = Collection::open(*self)?;
        progress(collection.progress());
        loop {
            let requests = collection.requests();
            if requests.is_empty() {
                return collection.finish();
            }
            let decoded = decoder.decode(requests, &mut |response| {
                if collection.add(response).map_err(DecodeError::sink)? {
                    progress(collection.progress());
                }
                Ok(())
            });
            match decoded {
                Ok(()) => return collection.finish(),
                // Each round leaves one instruction out.
                Err(DecodeError::PromptTooLong { id, got, max }) => collection.too_long(id, got, max)?,
                Err(DecodeError::Refused { refusals, .. }) => collection.refused(refusals)?,
                Err(DecodeError::Endpoint { id, endpoint, reason }) => {
                    let id = collection.instruction_of(id);
                    return Err(CollectError::Endpoint { id, endpoint, reason });
                }
                Err(err) => return Err(err.into()),
            }
        }
    }
}
