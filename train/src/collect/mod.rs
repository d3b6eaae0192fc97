//! Sampling a model's own responses and keeping their lengths.

mod endpoint;

use std::collections::HashMap;
use std::path::Path;

use lengthwise_core::{DecodeError, Decoder, Request, RequestId, Response, SamplingParams};
use serde::Serialize;

use crate::files::{FileError, InstructionRecord, Journal, LengthRecord, Sample};

pub use endpoint::{EndpointConfig, EndpointDecoder};

/// What is sampled of every instruction. Another value of any of them is another collection.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CollectConfig {
    /// The model, as it was asked for.
    pub model: String,
    /// One sample, or several, at each.
    pub temperatures: Vec<f32>,
    /// Samples at each temperature above 0; at 0 all would be the same.
    pub samples_per_temperature: usize,
    /// Cap on every response, in tokens.
    pub max_new_tokens: u32,
    /// Of all samples.
    pub seed: u64,
    /// Keep the texts too.
    pub save_text: bool,
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
    #[error("there is nothing to sample: give at least one temperature (0 or more) and one sample for each")]
    NothingToSample,
    /// The journal holds an instruction that the input does not.
    #[error("{journal} holds instruction {id}, which the input has not: it belongs to another input")]
    OtherInput {
        /// The journal's output.
        journal: String,
        /// The instruction.
        id: RequestId,
    },
}

/// One sample that is wanted: of which instruction, and which of its samples.
struct Wanted {
    instruction: usize,
    sample: usize,
}

/// Samples every instruction and writes `lengths.jsonl` in the order of the input. A killed run goes on where it was:
/// the samples depend on the seed, the instruction's id and their number, not on the batch, so the file is the same.
///
/// # Errors
/// See [`CollectError`].
pub fn collect(
    instructions: &[InstructionRecord],
    decoder: &mut dyn Decoder,
    config: &CollectConfig,
    output: &Path,
    progress: &mut dyn FnMut(CollectProgress),
) -> Result<Vec<LengthRecord>, CollectError> {
    let plan = sample_plan(config)?;
    let settings = serde_json::to_string(config).expect("plain data is serialisable");
    let (journal, finished) = Journal::open(output, &settings)?;
    let mut collection = Collection::new(instructions, plan, config, journal, finished, output)?;
    let requests = collection.requests();
    progress(collection.progress());
    decoder.decode(requests, &mut |response| {
        if collection.add(response).map_err(DecodeError::sink)? {
            progress(collection.progress());
        }
        Ok(())
    })?;
    collection.finish()
}

/// Temperature and number of every sample of an instruction.
fn sample_plan(config: &CollectConfig) -> Result<Vec<(f32, usize)>, CollectError> {
    let usable = config.temperatures.iter().all(|t| t.is_finite() && *t >= 0.0);
    if config.temperatures.is_empty() || config.samples_per_temperature == 0 || !usable {
        return Err(CollectError::NothingToSample);
    }
    let samples = |&t: &f32| (0..if t == 0.0 { 1 } else { config.samples_per_temperature }).map(move |k| (t, k));
    Ok(config.temperatures.iter().flat_map(samples).collect())
}

struct Collection<'a> {
    instructions: &'a [InstructionRecord],
    plan: Vec<(f32, usize)>,
    config: &'a CollectConfig,
    journal: Journal,
    /// By place in the input: complete records.
    records: Vec<Option<LengthRecord>>,
    /// By place in the input: samples so far.
    open: HashMap<usize, Vec<Option<Sample>>>,
    wanted: HashMap<RequestId, Wanted>,
    tokens: u64,
}

impl<'a> Collection<'a> {
    fn new(
        instructions: &'a [InstructionRecord],
        plan: Vec<(f32, usize)>,
        config: &'a CollectConfig,
        journal: Journal,
        finished: Vec<String>,
        output: &Path,
    ) -> Result<Self, CollectError> {
        let places: HashMap<&RequestId, usize> = instructions.iter().enumerate().map(|(i, r)| (&r.id, i)).collect();
        let mut records = vec![None; instructions.len()];
        for line in finished {
            let other = |id: RequestId| CollectError::OtherInput {
                journal: output.display().to_string(),
                id,
            };
            let record: LengthRecord = serde_json::from_str(&line).map_err(|_| other(line.as_str().into()))?;
            let place = *places.get(&record.id).ok_or_else(|| other(record.id.clone()))?;
            records[place] = Some(record);
        }
        let (open, wanted) = (HashMap::new(), HashMap::new());
        Ok(Self {
            instructions,
            plan,
            config,
            journal,
            records,
            open,
            wanted,
            tokens: 0,
        })
    }

    /// A request for every sample that is still missing.
    fn requests(&mut self) -> Vec<Request> {
        let mut requests = Vec::new();
        for (instruction, record) in self.instructions.iter().enumerate() {
            if self.records[instruction].is_some() {
                continue;
            }
            self.open.insert(instruction, vec![None; self.plan.len()]);
            for (sample, &(temperature, k)) in self.plan.iter().enumerate() {
                let id: RequestId = format!("{} at {temperature}, {k}", record.id).into();
                let seed = stable_hash(&[
                    &self.config.seed.to_string(),
                    record.id.as_str(),
                    &format!("{temperature}/{k}"),
                ]);
                self.wanted.insert(id.clone(), Wanted { instruction, sample });
                requests.push(Request {
                    id,
                    prompt: record.prompt.clone(),
                    max_new_tokens: self.config.max_new_tokens,
                    sampling: SamplingParams {
                        temperature,
                        seed,
                        ..SamplingParams::GREEDY
                    },
                });
            }
        }
        requests
    }

    /// Keeps a response; true where it completed its instruction.
    fn add(&mut self, response: Response) -> Result<bool, FileError> {
        let Some(Wanted { instruction, sample }) = self.wanted.remove(&response.id) else {
            return Ok(false);
        };
        let Some(samples) = self.open.get_mut(&instruction) else {
            return Ok(false);
        };
        self.tokens += u64::from(response.tokens);
        samples[sample] = Some(Sample {
            temperature: self.plan[sample].0,
            tokens: response.tokens,
            finish: response.finish,
            text: self.config.save_text.then_some(response.text),
        });
        if samples.iter().any(Option::is_none) {
            return Ok(false);
        }
        let samples = self.open.remove(&instruction).into_iter().flatten().flatten().collect();
        let source = &self.instructions[instruction];
        let record = LengthRecord {
            id: source.id.clone(),
            instruction: Some(source.instruction().to_owned()),
            samples,
        };
        self.journal.push(&line(&record))?;
        self.records[instruction] = Some(record);
        Ok(true)
    }

    fn progress(&self) -> CollectProgress {
        CollectProgress {
            done: self.records.iter().flatten().count(),
            total: self.records.len(),
            tokens: self.tokens,
        }
    }

    fn finish(self) -> Result<Vec<LengthRecord>, CollectError> {
        let records: Vec<LengthRecord> = self.records.into_iter().flatten().collect();
        let text: String = records.iter().map(|r| line(r) + "\n").collect();
        self.journal.finish(&text)?;
        Ok(records)
    }
}

fn line(record: &LengthRecord) -> String {
    serde_json::to_string(record).expect("plain data is serialisable")
}

/// FNV-1a over the parts: the same on every machine and in every version, as a sample's seed must be.
fn stable_hash(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0xff]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lengthwise_core::{FinishReason, Prompt};

    /// Answers with a length that depends on the seed alone, in reverse order, and fails after `left` responses.
    struct Seeded {
        left: usize,
    }

    impl Decoder for Seeded {
        fn decode(
            &mut self,
            requests: Vec<Request>,
            on_response: &mut dyn FnMut(Response) -> Result<(), DecodeError>,
        ) -> Result<(), DecodeError> {
            for request in requests.into_iter().rev() {
                if self.left == 0 {
                    return Err(DecodeError::model("killed"));
                }
                self.left -= 1;
                let tokens = (request.sampling.seed % 100) as u32 + 1;
                on_response(Response {
                    id: request.id,
                    text: "x".to_owned(),
                    tokens,
                    finish: FinishReason::Stop,
                })?;
            }
            Ok(())
        }
    }

    fn instructions() -> Vec<InstructionRecord> {
        let record = |i: usize| InstructionRecord {
            id: i.to_string().into(),
            prompt: Prompt::Instruction(format!("say {i}")),
            batch: None,
        };
        (0..20).map(record).collect()
    }

    fn config() -> CollectConfig {
        CollectConfig {
            model: "m".to_owned(),
            temperatures: vec![0.0, 0.7],
            samples_per_temperature: 2,
            max_new_tokens: 100,
            seed: 1,
            save_text: false,
        }
    }

    #[test]
    fn a_run_stopped_anywhere_and_resumed_writes_the_same_file() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let whole = dir.path().join("whole.jsonl");
        collect(
            &instructions(),
            &mut Seeded { left: usize::MAX },
            &config(),
            &whole,
            &mut |_| {},
        )?;
        let want = std::fs::read_to_string(&whole)?;
        // Temperature 0 is sampled once, 0.7 twice.
        assert_eq!(crate::files::read_lengths(&whole)?[0].samples.len(), 3);
        let output = dir.path().join("killed.jsonl");
        let mut runs = 0;
        while let Err(err) = collect(
            &instructions(),
            &mut Seeded { left: 17 },
            &config(),
            &output,
            &mut |_| {},
        ) {
            assert!(err.to_string().contains("killed"), "{err}");
            assert!(!output.exists());
            runs += 1;
        }
        assert_eq!(runs, 3, "each run must keep what it finished");
        assert_eq!(std::fs::read_to_string(&output)?, want);
        Ok(())
    }

    #[test]
    fn another_input_is_told_from_a_resumed_one() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let output = dir.path().join("out.jsonl");
        collect(
            &instructions(),
            &mut Seeded { left: 9 },
            &config(),
            &output,
            &mut |_| {},
        )
        .expect_err("stopped");
        let err = collect(
            &instructions()[..10],
            &mut Seeded { left: 9 },
            &config(),
            &output,
            &mut |_| {},
        );
        let err = err.expect_err("other input").to_string();
        assert!(err.contains("belongs to another input"), "{err}");
        Ok(())
    }
}
