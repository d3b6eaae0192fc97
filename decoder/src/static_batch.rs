//! Static batches: every row holds its slot until the batch ends.

use std::collections::HashMap;

use lengthwise_core::{DecodeError, RequestId};
use lengthwise_scheduler::{BatchExecutor, BatchRun, Outcome, PlannedBatch};

use crate::engine::Engine;
use crate::sequence::Sequence;
use crate::{OutputSink, SequenceRequest};

/// Runs the scheduler's batches on the engine. A sequence that its batch stopped keeps its KV cache while there is
/// room, and goes on from there; without room it is run through the model again, and draws the same tokens.
pub(crate) struct StaticExecutor<'a> {
    engine: &'a mut Engine,
    waiting: HashMap<RequestId, SequenceRequest>,
    /// Stopped sequences, with their cache or without.
    stopped: HashMap<RequestId, Sequence>,
    on_output: &'a mut OutputSink<'a>,
}

impl<'a> StaticExecutor<'a> {
    pub fn new(engine: &'a mut Engine, requests: Vec<SequenceRequest>, on_output: &'a mut OutputSink<'a>) -> Self {
        let waiting = requests.into_iter().map(|r| (r.id.clone(), r)).collect();
        Self {
            engine,
            waiting,
            stopped: HashMap::new(),
            on_output,
        }
    }

    /// The sequence of a planned request: one that was stopped, or a new one.
    fn take(&mut self, id: &RequestId) -> Result<Sequence, DecodeError> {
        if let Some(sequence) = self.stopped.remove(id) {
            return Ok(sequence);
        }
        // The driver plans every job once, so a second one means that two requests share an id.
        let request = self
            .waiting
            .remove(id)
            .ok_or_else(|| DecodeError::DuplicateId { id: id.clone() })?;
        Ok(self.engine.begin(request))
    }

    /// Cuts a batch into parts that fit the cache, each as large as possible; one part unless memory is short.
    fn parts(&self, sequences: Vec<Sequence>, stop_at: u32) -> Vec<Vec<Sequence>> {
        let mut parts: Vec<Vec<Sequence>> = Vec::new();
        let mut left = 0;
        for sequence in sequences {
            let need = most_tokens(&sequence, stop_at).next_multiple_of(lengthwise_model::BLOCK_TOKENS);
            if parts.is_empty() || need > left {
                parts.push(Vec::new());
                left = self.engine.cache_tokens();
            }
            left = left.saturating_sub(need);
            if let Some(part) = parts.last_mut() {
                part.push(sequence);
            }
        }
        parts
    }

    /// Makes room for a part by letting go of the caches of stopped sequences.
    fn make_room(&mut self, part: &[Sequence], stop_at: u32) {
        let block = lengthwise_model::BLOCK_TOKENS;
        let need: usize = part
            .iter()
            .map(|s| most_tokens(s, stop_at).next_multiple_of(block))
            .sum();
        let held: usize = part.iter().map(|s| s.table.capacity()).sum();
        if need > held + self.engine.cache.free_tokens() {
            self.stopped.values_mut().for_each(|s| self.engine.evict(s));
        }
    }

    fn run_part(&mut self, part: &mut [Sequence], stop_at: u32) -> Result<PartRun, DecodeError> {
        self.make_room(part, stop_at);
        let begun: Vec<u32> = part.iter().map(Sequence::generated).collect();
        // What was generated before and is not in the cache is computed a second time.
        let recomputed: u64 = part.iter().map(|s| u64::from(s.generated_uncached())).sum();
        loop {
            let mut rows: Vec<&mut Sequence> = part
                .iter_mut()
                .zip(&begun)
                .filter(|(s, begun)| s.finish.is_some() || s.generated() - **begun < stop_at)
                .map(|(s, _)| s)
                .collect();
            if rows.iter().all(|s| s.finish.is_some()) {
                break;
            }
            for row in &mut rows {
                if !self.engine.reserve(row) {
                    let (needed, capacity) = (most_tokens(row, stop_at), self.engine.cache_tokens());
                    return Err(DecodeError::CacheTooSmall {
                        id: row.request.id.clone(),
                        needed,
                        capacity,
                    });
                }
            }
            self.engine.step(&mut rows)?;
        }
        let steps = part
            .iter()
            .zip(&begun)
            .map(|(s, before)| s.generated() - before)
            .max()
            .unwrap_or(0);
        if let Some(recording) = &mut self.engine.recording {
            let rows = part.iter().zip(&begun).map(|(s, before)| s.generated() - before);
            recording.batch(rows, steps);
        }
        Ok(PartRun {
            steps,
            slot_steps: u64::from(steps) * part.len() as u64 + recomputed,
        })
    }
}

/// Most tokens that the cache must hold for a sequence that runs for `stop_at` more steps.
fn most_tokens(sequence: &Sequence, stop_at: u32) -> usize {
    sequence.most_tokens(sequence.generated().saturating_add(stop_at))
}

struct PartRun {
    steps: u32,
    slot_steps: u64,
}

impl BatchExecutor for StaticExecutor<'_> {
    type Error = DecodeError;

    fn run_batch(&mut self, batch: &PlannedBatch) -> Result<BatchRun, DecodeError> {
        let sequences = batch
            .ids
            .iter()
            .map(|id| self.take(id))
            .collect::<Result<Vec<_>, _>>()?;
        let mut run = BatchRun {
            steps: 0,
            slot_steps: 0,
            outcomes: Vec::with_capacity(batch.ids.len()),
        };
        for mut part in self.parts(sequences, batch.stop_at) {
            let result = self.run_part(&mut part, batch.stop_at);
            if result.is_err() {
                part.iter_mut()
                    .chain(self.stopped.values_mut())
                    .for_each(|s| self.engine.evict(s));
            }
            let PartRun { steps, slot_steps } = result?;
            run.steps += steps;
            run.slot_steps += slot_steps;
            for mut sequence in part {
                let id = sequence.request.id.clone();
                if sequence.finish.is_none() {
                    run.outcomes.push((id.clone(), Outcome::Stopped));
                    self.stopped.insert(id, sequence);
                    continue;
                }
                self.engine.evict(&mut sequence);
                run.outcomes.push((
                    id,
                    Outcome::Finished {
                        tokens: sequence.generated(),
                    },
                ));
                if let Some(output) = sequence.into_output() {
                    (self.on_output)(output)?;
                }
            }
        }
        Ok(run)
    }

    fn kept_tokens(&self) -> usize {
        self.engine.cache_tokens()
    }
}
