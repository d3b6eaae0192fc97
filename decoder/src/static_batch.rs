//! Static batches: every row holds its slot until the batch ends.

use std::collections::{HashMap, HashSet};

use lengthwise_core::{DecodeError, RequestId};
use lengthwise_model::BLOCK_TOKENS;
use lengthwise_scheduler::{
    BatchExecutor, BatchRun, DriverError, Job, Outcome, PlannedBatch, ScheduleConfig, StrategyStats, run_groups,
};

use crate::engine::Engine;
use crate::probes::Probes;
use crate::sequence::Sequence;
use crate::{Cancellation, OutputSink, PredictedRequest, SequenceRequest};

/// Answers all requests, which were checked, in the batches that the scheduler plans.
pub(crate) fn run(
    engine: &mut Engine,
    requests: Vec<PredictedRequest>,
    config: &ScheduleConfig,
    cancellation: &Cancellation,
    on_output: &mut OutputSink,
) -> Result<StrategyStats, DecodeError> {
    let job = |PredictedRequest { request, predicted }: &PredictedRequest| Job {
        id: request.id.clone(),
        predicted: *predicted,
    };
    let jobs: Vec<Job> = requests.iter().map(job).collect();
    let waiting = requests.into_iter().map(|r| (r.request.id.clone(), r.request));
    // Two lifetimes in one: the executor borrows the sink for its own life only.
    let mut sink = |output| on_output(output);
    let mut executor = StaticExecutor {
        engine,
        waiting: waiting.collect(),
        stopped: HashMap::new(),
        cancelled: HashSet::new(),
        cancellation,
        on_output: &mut sink,
    };
    let result = run_groups(&jobs, config, &mut executor);
    if result.is_err() {
        // The engine outlives the error: give it its cache back.
        let StaticExecutor { engine, stopped, .. } = &mut executor;
        stopped.values_mut().for_each(|s| engine.evict(s));
    }
    result.map_err(|err| match err {
        DriverError::Executor(err) => err,
        other => DecodeError::model(other.to_string()),
    })
}

/// Runs the scheduler's batches on the engine. A sequence that its batch stopped keeps its KV cache while there is
/// room, and goes on from there; without room it is run through the model again, and draws the same tokens.
struct StaticExecutor<'a> {
    engine: &'a mut Engine,
    waiting: HashMap<RequestId, SequenceRequest>,
    /// Stopped sequences, with their cache or without.
    stopped: HashMap<RequestId, Sequence>,
    /// Requests that were cancelled while they waited or were stopped; their batches go without them.
    cancelled: HashSet<RequestId>,
    cancellation: &'a Cancellation,
    on_output: &'a mut OutputSink<'a>,
}

impl StaticExecutor<'_> {
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

    /// Most tokens that the cache must hold for a planned request.
    fn need(&self, id: &RequestId, stop_at: u32) -> usize {
        if let Some(sequence) = self.stopped.get(id) {
            return most_tokens(sequence, stop_at);
        }
        let tokens = |r: &SequenceRequest| r.prompt.len() + self.engine.longest_answer(r).min(stop_at as usize);
        self.waiting.get(id).map_or(0, tokens)
    }

    /// Cuts a batch into parts that fit the cache, each as large as possible; one part unless memory is short.
    fn parts(&self, batch: &PlannedBatch) -> Vec<Vec<RequestId>> {
        let mut parts: Vec<Vec<RequestId>> = Vec::new();
        let mut left = 0;
        for id in &batch.ids {
            let need = self.need(id, batch.stop_at).next_multiple_of(BLOCK_TOKENS);
            if parts.is_empty() || need > left {
                parts.push(Vec::new());
                left = self.engine.cache_tokens();
            }
            left = left.saturating_sub(need);
            if let Some(part) = parts.last_mut() {
                part.push(id.clone());
            }
        }
        parts
    }

    /// Makes room for a part by letting go of the caches of stopped sequences.
    fn make_room(&mut self, part: &[Row], stop_at: u32) {
        let need = |row: &Row| most_tokens(&row.sequence, stop_at).next_multiple_of(BLOCK_TOKENS);
        let need: usize = part.iter().map(need).sum();
        let held: usize = part.iter().map(|row| row.sequence.table.capacity()).sum();
        if need > held + self.engine.cache.free_tokens() {
            self.stopped.values_mut().for_each(|s| self.engine.evict(s));
        }
    }

    /// Hands over what has been cancelled, with the tokens it has, and takes it out of `part`, which runs. What ended
    /// in `part` has ended.
    fn cancel(&mut self, part: &mut Vec<Row>, run: &mut BatchRun) -> Result<(), DecodeError> {
        let asked = self.cancellation.take();
        if asked.is_empty() {
            return Ok(());
        }
        for mut row in part.extract_if(.., |row| row.sequence.finish.is_none() && asked.has(row.id())) {
            // What the pass in flight gives it was computed, too.
            let steps = row.steps() + u32::from(row.sequence.is_unseen());
            self.engine.evict(&mut row.sequence);
            run.slot_steps += u64::from(steps);
            run.steps = run.steps.max(steps);
            run.outcomes.push((row.id().clone(), Outcome::Cancelled));
            (self.on_output)(row.sequence.into_output())?;
        }
        let mut open: Vec<RequestId> = match asked.all {
            true => self.waiting.keys().chain(self.stopped.keys()).cloned().collect(),
            false => asked.ids.into_iter().collect(),
        };
        open.sort_unstable();
        for id in open {
            let sequence = match (self.waiting.remove(&id), self.stopped.remove(&id)) {
                (Some(request), _) => self.engine.begin(request),
                (None, Some(mut sequence)) => {
                    self.engine.evict(&mut sequence);
                    sequence
                }
                (None, None) => continue,
            };
            self.cancelled.insert(id);
            (self.on_output)(sequence.into_output())?;
        }
        Ok(())
    }
}

/// A sequence in a batch that runs.
struct Row {
    sequence: Sequence,
    /// Tokens that it had when the batch began.
    begun: u32,
}

impl Row {
    /// - `stop_at`: tokens that the batch brings it at most
    fn of(mut sequence: Sequence, stop_at: u32) -> Self {
        let begun = sequence.generated();
        sequence.stop_at = begun.saturating_add(stop_at);
        Self { sequence, begun }
    }

    fn id(&self) -> &RequestId {
        &self.sequence.request.id
    }

    /// Tokens that this batch has brought it.
    fn steps(&self) -> u32 {
        self.sequence.generated() - self.begun
    }
}

impl StaticExecutor<'_> {
    /// Runs those of a part that have not been cancelled, and hands over what has ended.
    fn run_part(&mut self, ids: &[RequestId], stop_at: u32) -> Result<BatchRun, DecodeError> {
        let mut part = Vec::with_capacity(ids.len());
        let mut run = BatchRun {
            steps: 0,
            slot_steps: 0,
            outcomes: Vec::with_capacity(ids.len()),
        };
        for id in ids {
            match self.cancelled.contains(id) {
                true => run.outcomes.push((id.clone(), Outcome::Cancelled)),
                false => part.push(Row::of(self.take(id)?, stop_at)),
            }
        }
        self.make_room(&part, stop_at);
        // What was generated before and is not in the cache is computed a second time.
        run.slot_steps += part
            .iter()
            .map(|r| u64::from(r.sequence.generated_uncached()))
            .sum::<u64>();
        let result = self.run_rows(&mut part, stop_at, &mut run);
        // Where the last row's end was seen a pass late. Rows that were cancelled have counted the pass that was on its way.
        let is_late = self.engine.forget_ahead() && !part.is_empty();
        let in_vain = u32::from(is_late);
        if result.is_err() {
            part.iter_mut().for_each(|row| self.engine.evict(&mut row.sequence));
        }
        result?;
        run.steps = part.iter().map(Row::steps).max().unwrap_or(0).max(run.steps) + in_vain;
        run.slot_steps += u64::from(run.steps) * part.len() as u64;
        if let Some(recording) = &mut self.engine.recording {
            recording.batch(part.iter().map(Row::steps), run.steps);
        }
        let mut ended = Vec::new();
        for Row { mut sequence, .. } in part {
            let id = sequence.request.id.clone();
            if sequence.finish.is_none() {
                run.outcomes.push((id.clone(), Outcome::Stopped));
                self.stopped.insert(id, sequence);
                continue;
            }
            self.engine.evict(&mut sequence);
            let tokens = sequence.generated();
            run.outcomes.push((id, Outcome::Finished { tokens }));
            ended.push(sequence);
        }
        // Only now: whoever takes the answers may give up, and then no cache is to be lost.
        for sequence in ended {
            (self.on_output)(sequence.into_output())?;
        }
        Ok(run)
    }

    /// Steps until every row has ended or has had `stop_at` steps.
    fn run_rows(&mut self, part: &mut Vec<Row>, stop_at: u32, run: &mut BatchRun) -> Result<(), DecodeError> {
        loop {
            self.cancel(part, run)?;
            let mut rows: Vec<&mut Sequence> = part
                .iter_mut()
                .filter(|row| row.sequence.finish.is_some() || row.steps() < stop_at)
                .map(|row| &mut row.sequence)
                .collect();
            if rows.iter().all(|s| s.finish.is_some()) {
                return Ok(());
            }
            if rows.iter().all(|s| s.finish.is_some() || s.ends_unseen()) {
                self.engine.land_ahead(&mut rows)?;
                continue;
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
            self.engine.step_ahead(&mut rows, &mut Probes::default())?;
        }
    }
}

/// Most tokens that the cache must hold for a sequence that runs for `stop_at` more steps.
fn most_tokens(sequence: &Sequence, stop_at: u32) -> usize {
    sequence.most_tokens(sequence.generated().saturating_add(stop_at))
}

impl BatchExecutor for StaticExecutor<'_> {
    type Error = DecodeError;

    fn run_batch(&mut self, batch: &PlannedBatch) -> Result<BatchRun, DecodeError> {
        let mut run = BatchRun {
            steps: 0,
            slot_steps: 0,
            outcomes: Vec::with_capacity(batch.ids.len()),
        };
        for part in self.parts(batch) {
            let ran = self.run_part(&part, batch.stop_at)?;
            run.steps += ran.steps;
            run.slot_steps += ran.slot_steps;
            run.outcomes.extend(ran.outcomes);
        }
        Ok(run)
    }

    fn kept_tokens(&self) -> usize {
        self.engine.cache_tokens()
    }
}
