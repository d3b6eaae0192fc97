//! Continuous batching: a slot is refilled as soon as its sequence has ended.

use std::collections::HashMap;

use lengthwise_core::{DecodeError, FinishReason, RequestId};
use lengthwise_model::BLOCK_TOKENS;
use lengthwise_scheduler::{AdmissionError, AdmissionQueue, Place, ScheduleConfig, StrategyStats, Waiting};

use crate::engine::Engine;
use crate::sequence::Sequence;
use crate::{Cancellation, OutputSink, PredictedRequest, SequenceOutput, SequenceRequest};

/// A sequence in a slot, and the share of the KV budget that it was admitted with.
struct Running {
    sequence: Sequence,
    cache_tokens: usize,
}

/// What waits for a slot. A new request is no more than its prompt and settings, so that many can wait.
enum Waiter {
    New(SequenceRequest),
    Preempted(Box<Sequence>),
}

/// The slots, and who waits for one.
struct Slots<'a> {
    engine: &'a mut Engine,
    queue: AdmissionQueue,
    waiting: HashMap<RequestId, (Waiter, Place)>,
    running: Vec<Running>,
    cancellation: &'a Cancellation,
    stats: StrategyStats,
}

/// Answers all requests, which were checked. A request is admitted when a slot is free and the KV cache has room for its
/// prompt and its predicted answer. One that outgrows its prediction while the cache is full sends the last admitted back
/// to the queue; that one goes on later, with the same answer. What a step does depends on the slots; of those that wait
/// it looks at one more than it admits.
pub(crate) fn run(
    engine: &mut Engine,
    requests: Vec<PredictedRequest>,
    config: &ScheduleConfig,
    cancellation: &Cancellation,
    on_output: &mut OutputSink,
) -> Result<StrategyStats, DecodeError> {
    let queue = AdmissionQueue::new(config.order, engine.cache_tokens());
    let mut slots = Slots {
        engine,
        queue,
        waiting: HashMap::with_capacity(requests.len()),
        running: Vec::new(),
        cancellation,
        stats: StrategyStats::default(),
    };
    for PredictedRequest { request, predicted } in requests {
        let answer = slots.engine.longest_answer(&request).min(predicted.max(1) as usize);
        let tokens = request.prompt.len() + answer;
        slots.enqueue(request.id.clone(), predicted, tokens, Waiter::New(request))?;
    }
    let result = slots.run_all(config.batch_size.get(), on_output);
    slots.engine.forget_ahead();
    if result.is_err() {
        // The engine outlives the error: give it its cache back.
        for mut running in std::mem::take(&mut slots.running) {
            slots.engine.evict(&mut running.sequence);
        }
    }
    result.map(|()| slots.stats)
}

impl Slots<'_> {
    /// `tokens`: what it will need of the KV cache.
    fn enqueue(&mut self, id: RequestId, predicted: u32, tokens: usize, waiter: Waiter) -> Result<(), DecodeError> {
        let waiting = Waiting {
            id: id.clone(),
            predicted,
            cache_tokens: tokens.next_multiple_of(BLOCK_TOKENS),
        };
        let too_small = |AdmissionError { id, needed, budget }| DecodeError::CacheTooSmall {
            id,
            needed,
            capacity: budget,
        };
        let place = self.queue.push(waiting).map_err(too_small)?;
        self.waiting.insert(id, (waiter, place));
        Ok(())
    }

    fn run_all(&mut self, slots: usize, on_output: &mut OutputSink) -> Result<(), DecodeError> {
        if let Some(recording) = &mut self.engine.recording {
            recording.open_slots(slots);
        }
        loop {
            self.cancel(on_output)?;
            self.admit(slots);
            if self.running.is_empty() {
                if let Some(recording) = &mut self.engine.recording {
                    recording.close_slots(self.stats.steps);
                }
                return Ok(());
            }
            self.reserve_all()?;
            let mut rows: Vec<&mut Sequence> = self.running.iter_mut().map(|r| &mut r.sequence).collect();
            if self.engine.step_ahead(&mut rows)? {
                self.stats.steps += 1;
                self.stats.slot_steps += slots as u64;
            }
            self.collect(on_output)?;
        }
    }

    /// Hands over what has been cancelled, with the tokens it has, and frees its slot or its place in the queue.
    fn cancel(&mut self, on_output: &mut OutputSink) -> Result<(), DecodeError> {
        for id in self.cancellation.take() {
            let tokens = if let Some((waiter, place)) = self.waiting.remove(&id) {
                self.queue.cancel(place);
                match waiter {
                    Waiter::New(_) => Vec::new(),
                    Waiter::Preempted(sequence) => sequence.into_tokens(),
                }
            } else if let Some(at) = self.running.iter().position(|r| r.sequence.request.id == id) {
                self.free(at).into_tokens()
            } else {
                continue;
            };
            let finish = FinishReason::Cancelled;
            on_output(SequenceOutput { id, tokens, finish })?;
        }
        Ok(())
    }

    fn admit(&mut self, slots: usize) {
        while self.running.len() < slots {
            let Some(next) = self.queue.admit() else { break };
            let sequence = match self.waiting.remove(&next.id) {
                Some((Waiter::New(request), _)) => self.engine.begin(request),
                Some((Waiter::Preempted(sequence), _)) => *sequence,
                None => {
                    self.queue.release(next.cache_tokens);
                    continue;
                }
            };
            // What it had before it was preempted is computed a second time, from here on.
            self.stats.slot_steps += u64::from(sequence.generated());
            if let Some(recording) = &mut self.engine.recording {
                recording.enter(&next.id, self.stats.steps, sequence.generated());
            }
            self.running.push(Running {
                sequence,
                cache_tokens: next.cache_tokens,
            });
        }
    }

    /// Gives every running sequence the blocks for its next pass, the longest in a slot first; where they run out, the
    /// last admitted waits again.
    fn reserve_all(&mut self) -> Result<(), DecodeError> {
        let mut next = 0;
        while next < self.running.len() {
            if self.engine.reserve(&mut self.running[next].sequence) {
                next += 1;
                continue;
            }
            // `check` saw to it that one sequence alone always fits, so the last is never the only one.
            let Some(last) = self.running.len().checked_sub(1) else {
                break;
            };
            let sequence = self.free(last);
            // It is longer than predicted: next time it gets room for the longest answer it can have.
            let (id, longest) = (sequence.request.id.clone(), sequence.request.max_new_tokens);
            let tokens = sequence.most_tokens(longest);
            self.enqueue(id, longest, tokens, Waiter::Preempted(Box::new(sequence)))?;
        }
        Ok(())
    }

    /// Hands over what has ended and frees its slots.
    fn collect(&mut self, on_output: &mut OutputSink) -> Result<(), DecodeError> {
        let mut next = 0;
        while next < self.running.len() {
            if self.running[next].sequence.finish.is_none() {
                next += 1;
                continue;
            }
            let ended = self.free(next);
            self.stats.requests += 1;
            self.stats.useful_tokens += u64::from(ended.generated());
            if let Some(output) = ended.into_output() {
                on_output(output)?;
            }
        }
        Ok(())
    }

    /// Takes a sequence out of its slot, and its blocks and its share of the budget back.
    fn free(&mut self, slot: usize) -> Sequence {
        // Not swap_remove: the order of admission says who is preempted first.
        let mut running = self.running.remove(slot);
        if let Some(recording) = &mut self.engine.recording {
            let Sequence { request, finish, .. } = &running.sequence;
            let tokens = running.sequence.generated();
            recording.leave(&request.id, self.stats.steps, tokens, finish.is_none());
        }
        self.engine.evict(&mut running.sequence);
        self.queue.release(running.cache_tokens);
        running.sequence
    }
}
