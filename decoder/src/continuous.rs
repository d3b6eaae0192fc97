//! Continuous batching: a slot is refilled as soon as its sequence has ended.

use lengthwise_core::{DecodeError, RequestId};
use lengthwise_model::BLOCK_TOKENS;
use lengthwise_scheduler::{AdmissionError, AdmissionQueue, ScheduleConfig, StrategyStats, Waiting};

use crate::engine::Engine;
use crate::probes::{Probed, Prober, Probes};
use crate::sequence::Sequence;
use crate::{Cancellation, OutputSink, PredictedRequest, SequenceRequest};

/// A sequence in a slot, and the share of the KV budget that it was admitted with.
struct Running {
    sequence: Sequence,
    /// Which of the run's requests it is.
    number: u32,
    cache_tokens: usize,
}

/// A request that has not ended. One that has not been begun is as it was handed over, so that many can wait.
enum Waiter {
    New(PredictedRequest),
    /// It waits again, under this number of the queue's.
    Preempted(Box<Sequence>, u64),
    /// It runs, or has ended.
    Away,
}

/// The slots, and who waits for one.
struct Slots<'a> {
    engine: &'a mut Engine,
    queue: AdmissionQueue<u32>,
    /// All requests, by number; that is the queue's until they are preempted.
    requests: Vec<Waiter>,
    running: Vec<Running>,
    probes: Probes<'a>,
    cancellation: &'a Cancellation,
    stats: StrategyStats,
}

/// Answers all requests, which were checked. A request is admitted when a slot is free and the KV cache has room for its
/// prompt and its predicted answer. One that outgrows its prediction while the cache is full sends the last admitted back
/// to the queue; that one goes on later, with the same answer. What a step does depends on the slots; of those that wait
/// it looks at one more than it admits, and at those that a prober predicts ahead.
pub(crate) fn run(
    engine: &mut Engine,
    requests: Vec<PredictedRequest>,
    config: &ScheduleConfig,
    (cancellation, prober): (&Cancellation, Option<&dyn Prober>),
    on_output: &mut OutputSink,
) -> Result<StrategyStats, DecodeError> {
    let queue = AdmissionQueue::new(config.order, engine.cache_tokens());
    let mut slots = Slots {
        engine,
        queue,
        requests: requests.into_iter().map(Waiter::New).collect(),
        running: Vec::new(),
        probes: Probes::new(prober),
        cancellation,
        stats: StrategyStats::default(),
    };
    slots.enqueue_new()?;
    let result = slots.run_all(config.batch_size.get(), on_output);
    slots.engine.forget_ahead();
    if result.is_err() {
        // The engine outlives the error: give it its cache back.
        for mut running in std::mem::take(&mut slots.running) {
            slots.engine.evict(&mut running.sequence);
        }
        slots.probes.drop_all(&mut slots.engine.cache);
    }
    result.map(|()| slots.stats)
}

impl Slots<'_> {
    fn enqueue_new(&mut self) -> Result<(), DecodeError> {
        for (number, waiter) in self.requests.iter().enumerate() {
            let Waiter::New(PredictedRequest { request, predicted }) = waiter else {
                continue;
            };
            let tokens = need(self.engine, request, *predicted);
            enqueue(&mut self.queue, number as u32, *predicted, tokens).map_err(|err| too_small(&request.id, err))?;
        }
        Ok(())
    }

    fn run_all(&mut self, slots: usize, on_output: &mut OutputSink) -> Result<(), DecodeError> {
        if let Some(recording) = &mut self.engine.recording {
            recording.open_slots(slots);
        }
        loop {
            self.cancel(on_output)?;
            if self.probes.are_awaited() {
                self.look_ahead(slots);
            }
            self.admit(slots);
            if self.running.is_empty() && self.queue.is_empty() {
                if let Some(recording) = &mut self.engine.recording {
                    recording.close_slots(self.stats.steps);
                }
                return Ok(());
            }
            self.reserve_all()?;
            self.look_ahead(slots);
            let mut rows: Vec<&mut Sequence> = self.running.iter_mut().map(|r| &mut r.sequence).collect();
            let stepped = self.engine.step_ahead(&mut rows, &mut self.probes)?;
            if stepped.is_launched {
                self.stats.steps += 1;
                self.stats.slot_steps += slots as u64;
            } else if self.running.is_empty() && stepped.probed.is_empty() {
                self.wait_no_longer();
            }
            self.stats.probe_tokens += stepped.probe_tokens as u64;
            self.learn(stepped.probed);
            self.collect(on_output)?;
        }
    }

    /// Hands over what has been cancelled, with the tokens it has, and frees its slot or its place in the queue. Only
    /// then are those that wait looked through.
    fn cancel(&mut self, on_output: &mut OutputSink) -> Result<(), DecodeError> {
        let asked = self.cancellation.take();
        if asked.is_empty() {
            return Ok(());
        }
        let mut next = 0;
        while next < self.running.len() {
            match asked.has(&self.running[next].sequence.request.id) {
                true => on_output(self.free(next).sequence.into_output())?,
                false => next += 1,
            }
        }
        for number in 0..self.requests.len() {
            let (id, queued) = match &self.requests[number] {
                Waiter::New(new) => (&new.request.id, number as u64),
                Waiter::Preempted(sequence, queued) => (&sequence.request.id, *queued),
                Waiter::Away => continue,
            };
            if asked.has(id) {
                self.queue.cancel(queued);
                self.probes.drop(number as u32, &mut self.engine.cache);
                if let Some(sequence) = self.take(number) {
                    on_output(sequence.into_output())?;
                }
            }
        }
        Ok(())
    }

    /// The sequence of a request that waits.
    fn take(&mut self, number: usize) -> Option<Sequence> {
        match std::mem::replace(&mut self.requests[number], Waiter::Away) {
            Waiter::New(new) => Some(self.engine.begin(new.request)),
            Waiter::Preempted(sequence, _) => Some(*sequence),
            Waiter::Away => None,
        }
    }

    fn admit(&mut self, slots: usize) {
        while self.running.len() < slots {
            if self.queue.first().is_some_and(|next| self.probes.holds(next.item)) {
                break;
            }
            let Some(next) = self.queue.admit() else { break };
            let Some(mut sequence) = self.take(next.item as usize) else {
                self.queue.release(next.cache_tokens);
                self.probes.drop(next.item, &mut self.engine.cache);
                continue;
            };
            if let Some((table, tokens)) = self.probes.admitted(next.item) {
                // The probe's pass was this part of the request's own prefill.
                self.stats.probe_tokens -= tokens as u64;
                sequence.adopt(table, tokens);
            }
            // What it had before it was preempted is computed a second time, from here on.
            self.stats.slot_steps += u64::from(sequence.generated());
            if let Some(recording) = &mut self.engine.recording {
                recording.enter(&sequence.request.id, self.stats.steps, sequence.generated());
            }
            self.running.push(Running {
                sequence,
                number: next.item,
                cache_tokens: next.cache_tokens,
            });
        }
    }

    /// Opens probes for the requests that are next, where lengths are predicted in the passes.
    fn look_ahead(&mut self, slots: usize) {
        let most_tokens = self.engine.longest_probe();
        while let Some(number) = self.probes.look(slots).filter(|number| *number < self.requests.len()) {
            let (id, own) = match &self.requests[number] {
                Waiter::New(new) => (&new.request.id, Some(&new.request.prompt[..])),
                // It outgrew what it was given, and gets room for the longest answer.
                Waiter::Preempted(..) => continue,
                Waiter::Away => match self.running.iter().find(|r| r.number as usize == number) {
                    Some(running) => (&running.sequence.request.id, None),
                    None => continue,
                },
            };
            self.probes.open(number as u32, id, own, most_tokens);
        }
    }

    /// Nothing runs, and the probe that the next request waits for has no room: it is admitted without.
    fn wait_no_longer(&mut self) {
        if let Some(number) = self.queue.first().map(|next| next.item) {
            self.probes.drop(number, &mut self.engine.cache);
        }
    }

    /// Takes note of lengths that probes have told: a request that waits is admitted by its own, and one that has a slot
    /// keeps no more of the budget than it would have been given.
    fn learn(&mut self, probed: Vec<Probed>) {
        for (number, hidden) in probed {
            let Some(prober) = self.probes.prober.filter(|_| self.probes.landed(number)) else {
                continue;
            };
            if let Waiter::New(PredictedRequest { request, predicted }) = &mut self.requests[number as usize] {
                if let Some(length) = prober.length(&request.id, &hidden) {
                    *predicted = length;
                    let tokens = need(self.engine, request, length).next_multiple_of(BLOCK_TOKENS);
                    self.queue.revise(u64::from(number), length, tokens);
                }
            } else if let Some(running) = self.running.iter_mut().find(|r| r.number == number) {
                let length = prober.length(&running.sequence.request.id, &hidden);
                let tokens = length.map(|length| running.sequence.most_tokens(length).next_multiple_of(BLOCK_TOKENS));
                let tokens = tokens.map_or(running.cache_tokens, |tokens| tokens.min(running.cache_tokens));
                self.queue.release(running.cache_tokens - tokens);
                running.cache_tokens = tokens;
            }
        }
    }

    /// Gives every running sequence the blocks for its next pass, the longest in a slot first; where they run out, probes
    /// give theirs, and then the last admitted waits again.
    fn reserve_all(&mut self) -> Result<(), DecodeError> {
        let mut next = 0;
        while next < self.running.len() {
            if self.engine.reserve(&mut self.running[next].sequence) {
                next += 1;
                continue;
            }
            if self.probes.give_way(&mut self.engine.cache) {
                continue;
            }
            // `check` saw to it that one sequence alone always fits, so the last is never the only one.
            let Some(last) = self.running.len().checked_sub(1) else {
                break;
            };
            let Running { sequence, number, .. } = self.free(last);
            // It is longer than predicted: next time it gets room for the longest answer it can have.
            let longest = sequence.request.max_new_tokens;
            let tokens = sequence.most_tokens(longest);
            let queued = enqueue(&mut self.queue, number, longest, tokens)
                .map_err(|err| too_small(&sequence.request.id, err))?;
            self.requests[number as usize] = Waiter::Preempted(Box::new(sequence), queued);
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
            let ended = self.free(next).sequence;
            self.stats.requests += 1;
            self.stats.useful_tokens += u64::from(ended.generated());
            on_output(ended.into_output())?;
        }
        Ok(())
    }

    /// Takes a sequence out of its slot, and its blocks and its share of the budget back.
    fn free(&mut self, slot: usize) -> Running {
        // Not swap_remove: the order of admission says who is preempted first.
        let mut running = self.running.remove(slot);
        if let Some(recording) = &mut self.engine.recording {
            let Sequence { request, finish, .. } = &running.sequence;
            let tokens = running.sequence.generated();
            recording.leave(&request.id, self.stats.steps, tokens, finish.is_none());
        }
        self.engine.evict(&mut running.sequence);
        self.probes.drop(running.number, &mut self.engine.cache);
        self.queue.release(running.cache_tokens);
        running
    }
}

/// What a request needs of the KV cache, in tokens: its prompt, and as long an answer as is predicted or possible.
fn need(engine: &Engine, request: &SequenceRequest, predicted: u32) -> usize {
    request.prompt.len() + engine.longest_answer(request).min(predicted.max(1) as usize)
}

/// `tokens`: what it will need of the KV cache. Returns the queue's number for it.
fn enqueue(queue: &mut AdmissionQueue<u32>, number: u32, predicted: u32, tokens: usize) -> Result<u64, AdmissionError> {
    queue.push(Waiting {
        item: number,
        predicted,
        cache_tokens: tokens.next_multiple_of(BLOCK_TOKENS),
    })
}

fn too_small(id: &RequestId, AdmissionError { needed, budget }: AdmissionError) -> DecodeError {
    DecodeError::CacheTooSmall {
        id: id.clone(),
        needed,
        capacity: budget,
    }
}
