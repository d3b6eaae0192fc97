//! Continuous batching: a slot is refilled as soon as its sequence has ended.

use std::collections::HashMap;

use lengthwise_core::{DecodeError, RequestId};
use lengthwise_model::BLOCK_TOKENS;
use lengthwise_scheduler::{AdmissionError, AdmissionQueue, ScheduleConfig, StrategyStats, Waiting};

use crate::engine::Engine;
use crate::sequence::Sequence;
use crate::{OutputSink, PredictedRequest};

/// A sequence in a slot, and the share of the KV budget that it was admitted with.
struct Running {
    sequence: Sequence,
    cache_tokens: usize,
}

/// The slots, and who waits for one.
struct Slots<'a> {
    engine: &'a mut Engine,
    queue: AdmissionQueue,
    waiting: HashMap<RequestId, Sequence>,
    running: Vec<Running>,
}

/// Answers all requests. A request is admitted when a slot is free and the KV cache has room for its prompt and its
/// predicted answer. One that outgrows its prediction while the cache is full sends the last admitted back to the
/// queue; that one goes on later, with the same answer.
pub(crate) fn run(
    engine: &mut Engine,
    requests: Vec<PredictedRequest>,
    config: &ScheduleConfig,
    on_output: &mut OutputSink,
) -> Result<StrategyStats, DecodeError> {
    let queue = AdmissionQueue::new(config.order, engine.cache_tokens());
    let mut slots = Slots {
        engine,
        queue,
        waiting: HashMap::new(),
        running: Vec::new(),
    };
    for PredictedRequest { request, predicted } in requests {
        let id = request.id.clone();
        let sequence = slots.engine.begin(request)?;
        slots.enqueue(&sequence, predicted)?;
        if slots.waiting.insert(id.clone(), sequence).is_some() {
            return Err(DecodeError::DuplicateId { id });
        }
    }
    let result = slots.run_all(config.batch_size.get(), on_output);
    if result.is_err() {
        // The engine outlives the error: give it its cache back.
        for mut running in std::mem::take(&mut slots.running) {
            slots.engine.evict(&mut running.sequence);
        }
    }
    result
}

impl Slots<'_> {
    fn enqueue(&mut self, sequence: &Sequence, predicted: u32) -> Result<(), DecodeError> {
        let cache_tokens = sequence.most_tokens(predicted.max(1)).next_multiple_of(BLOCK_TOKENS);
        let waiting = Waiting {
            id: sequence.request.id.clone(),
            predicted,
            cache_tokens,
        };
        let too_small = |AdmissionError { id, needed, budget }| DecodeError::CacheTooSmall {
            id,
            needed,
            capacity: budget,
        };
        self.queue.push(waiting).map_err(too_small)
    }

    fn run_all(&mut self, slots: usize, on_output: &mut OutputSink) -> Result<StrategyStats, DecodeError> {
        let mut stats = StrategyStats::default();
        loop {
            self.admit(slots);
            if self.running.is_empty() {
                return Ok(stats);
            }
            stats.slot_steps += self.reserve_all()?;
            let mut rows: Vec<&mut Sequence> = self.running.iter_mut().map(|r| &mut r.sequence).collect();
            self.engine.step(&mut rows)?;
            stats.steps += 1;
            stats.slot_steps += slots as u64;
            self.collect(&mut stats, on_output)?;
        }
    }

    fn admit(&mut self, slots: usize) {
        while self.running.len() < slots {
            let Some(next) = self.queue.admit() else { break };
            if let Some(sequence) = self.waiting.remove(&next.id) {
                self.running.push(Running {
                    sequence,
                    cache_tokens: next.cache_tokens,
                });
            }
        }
    }

    /// Gives every running sequence the blocks for its next pass, the longest in a slot first; where they run out, the
    /// last admitted waits again. Returns the generated tokens that will have to be computed a second time.
    fn reserve_all(&mut self) -> Result<u64, DecodeError> {
        let mut thrown_away = 0;
        let mut next = 0;
        while next < self.running.len() {
            if self.engine.reserve(&mut self.running[next].sequence) {
                next += 1;
                continue;
            }
            // `check` saw to it that one sequence alone always fits, so the last is never the only one.
            let Some(mut last) = self.running.pop() else { break };
            thrown_away += u64::from(last.sequence.generated());
            self.queue.release(last.cache_tokens);
            self.engine.evict(&mut last.sequence);
            // It is longer than predicted: next time it gets room for the longest answer it can have.
            let longest = last.sequence.request.max_new_tokens;
            self.enqueue(&last.sequence, longest)?;
            self.waiting.insert(last.sequence.request.id.clone(), last.sequence);
        }
        Ok(thrown_away)
    }

    /// Hands over what has ended and frees its slots.
    fn collect(&mut self, stats: &mut StrategyStats, on_output: &mut OutputSink) -> Result<(), DecodeError> {
        let mut next = 0;
        while next < self.running.len() {
            if self.running[next].sequence.finish.is_none() {
                next += 1;
                continue;
            }
            // Not swap_remove: the order of admission says who is preempted first.
            let mut ended = self.running.remove(next);
            self.engine.evict(&mut ended.sequence);
            self.queue.release(ended.cache_tokens);
            stats.requests += 1;
            stats.useful_tokens += u64::from(ended.sequence.generated());
            if let Some(output) = ended.sequence.into_output() {
                on_output(output)?;
            }
        }
        Ok(())
    }
}
