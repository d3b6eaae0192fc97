//! The same strategies on known lengths, without a model.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::convert::Infallible;

use lengthwise_core::RequestId;

use crate::{
    AdmissionQueue, BatchExecutor, BatchRun, CostModel, DriverError, Job, Outcome, PlannedBatch, ScheduleConfig,
    Strategy, StrategyStats, Waiting, driver::check_unique, run_groups, timeline::Timeline,
};

/// A request whose answer's length is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SimulatedRequest {
    /// Whose answer.
    pub id: RequestId,
    /// Tokens that the answer has; cut at the cap.
    pub actual: u32,
    /// Tokens that are predicted.
    pub predicted: u32,
}

/// What a simulated run came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulated {
    /// Counted as in a real run.
    pub stats: StrategyStats,
    /// Seconds that the cost model says it takes; 0 without one. Prompts are reckoned at [`PROMPT_TOKENS`] tokens.
    pub seconds: f64,
    /// What every slot did, where it was asked for.
    pub timeline: Option<Timeline>,
}

/// What the simulated decoder is like.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Machine {
    /// Tells the seconds; the plan follows the config alone.
    pub clock: Option<CostModel>,
    /// A request that was stopped goes on from where it was, as with this project's decoder, instead of being recomputed
    /// from its first token, as published.
    pub resumes: bool,
    /// Whether the timeline is wanted: a span or two for every request.
    pub timeline: bool,
}

/// Tokens that a prompt is reckoned to have where only lengths of answers are known.
pub const PROMPT_TOKENS: f64 = 64.0;

/// What the strategy costs on these requests, in the order given.
///
/// # Errors
/// Two requests have the same id.
pub fn simulate(
    requests: &[SimulatedRequest],
    config: &ScheduleConfig,
    machine: Machine,
) -> Result<Simulated, DriverError<Infallible>> {
    check_unique(requests.iter().map(|r| &r.id))?;
    let (cap, clock) = (config.cap(), machine.clock);
    let mut timeline = machine.timeline.then(Timeline::default);
    let lengths = requests
        .iter()
        .map(|r| (r.id.clone(), r.actual.clamp(1, cap)))
        .collect();
    if config.strategy == Strategy::Continuous {
        let stats = continuous(requests, &lengths, config, timeline.as_mut());
        let prompts = clock.map_or(0.0, |c| stats.requests as f64 * PROMPT_TOKENS * c.prompt_token);
        let mean = stats.useful_tokens as f64 / stats.requests.max(1) as f64;
        let context = PROMPT_TOKENS + mean / 2.0;
        let step = clock.map_or(0.0, |c| c.decode_step(config.batch_size.get() as f64, context));
        return Ok(Simulated {
            stats,
            seconds: stats.steps as f64 * step + prompts,
            timeline,
        });
    }
    let jobs: Vec<Job> = requests
        .iter()
        .map(|r| Job {
            id: r.id.clone(),
            predicted: r.predicted,
        })
        .collect();
    let mut known = KnownLengths {
        lengths,
        machine,
        had: HashMap::new(),
        steps: 0,
        seconds: 0.0,
        timeline,
    };
    let stats = run_groups(&jobs, config, &mut known)?;
    Ok(Simulated {
        stats,
        seconds: known.seconds,
        timeline: known.timeline,
    })
}

struct KnownLengths {
    lengths: HashMap<RequestId, u32>,
    machine: Machine,
    /// Tokens of stopped requests that go on from there.
    had: HashMap<RequestId, u32>,
    steps: u64,
    seconds: f64,
    timeline: Option<Timeline>,
}

impl KnownLengths {
    /// Tokens that all rows have got in the cache in the middle of a step. One that has ended gets no more with this
    /// project's decoder, and padding with the published one.
    fn held(&self, rows: &[(u32, bool)], step: u32) -> f64 {
        let grown = f64::from(step) + 0.5;
        if !self.machine.resumes {
            return rows.len() as f64 * grown;
        }
        rows.iter().map(|&(left, _)| grown.min(f64::from(left))).sum()
    }

    /// Counts a run and draws it: the tokens that each row had to do, and whether it ended.
    fn ran(&mut self, rows: &[(u32, bool)], steps: u32) {
        if let Some(timeline) = &mut self.timeline {
            for (slot, &(left, ended)) in rows.iter().enumerate() {
                match ended || self.machine.resumes {
                    true => timeline.answered(slot, self.steps, left.min(steps), steps),
                    false => timeline.threw_away(slot, self.steps, steps),
                }
            }
        }
        self.steps += u64::from(steps);
    }
}

impl BatchExecutor for KnownLengths {
    type Error = Infallible;

    fn run_batch(&mut self, batch: &PlannedBatch) -> Result<BatchRun, Infallible> {
        let length = |id: &RequestId| self.lengths.get(id).copied().unwrap_or(1);
        let had = |id: &RequestId| self.had.get(id).copied().unwrap_or(0);
        let left: Vec<(u32, bool)> = (batch.ids.iter().map(|id| length(id) - had(id)))
            .map(|left| (left, left <= batch.stop_at))
            .collect();
        let longest = left.iter().map(|(left, _)| *left).max().unwrap_or(0);
        let steps = longest.min(batch.stop_at);
        if let Some(clock) = self.machine.clock {
            let rows = batch.ids.len() as f64;
            let before: f64 = batch.ids.iter().map(|id| f64::from(had(id))).sum();
            let new = batch.ids.iter().filter(|id| had(id) == 0).count() as f64;
            let context = |step: u32| PROMPT_TOKENS + (before + self.held(&left, step)) / rows;
            // Step by step, since rows end and prices may rise on the way.
            let seconds: f64 = (0..steps).map(|s| clock.decode_step(rows, context(s))).sum();
            self.seconds += new * PROMPT_TOKENS * clock.prompt_token + seconds;
        }
        let outcome = |(id, &(_, ended)): (&RequestId, &(u32, bool))| match ended {
            true => (id.clone(), Outcome::Finished { tokens: length(id) }),
            false => (id.clone(), Outcome::Stopped),
        };
        let outcomes: Vec<(RequestId, Outcome)> = batch.ids.iter().zip(&left).map(outcome).collect();
        self.ran(&left, steps);
        for (id, outcome) in &outcomes {
            if self.machine.resumes && *outcome == Outcome::Stopped {
                *self.had.entry(id.clone()).or_default() += steps;
            }
        }
        Ok(BatchRun {
            steps,
            slot_steps: u64::from(steps) * batch.ids.len() as u64,
            outcomes,
        })
    }

    fn kept_tokens(&self) -> usize {
        if self.machine.resumes { usize::MAX } else { 0 }
    }
}

/// Every slot is refilled in the step after its sequence ended. Slots × steps counts idle slots too.
fn continuous(
    requests: &[SimulatedRequest],
    lengths: &HashMap<RequestId, u32>,
    config: &ScheduleConfig,
    mut timeline: Option<&mut Timeline>,
) -> StrategyStats {
    let slots = config.batch_size.get();
    let mut queue = AdmissionQueue::new(config.order, slots);
    for request in requests {
        let waiting = Waiting {
            item: lengths[&request.id],
            predicted: request.predicted,
            cache_tokens: 1,
        };
        queue.push(waiting).expect("one of at least one slot");
    }
    let mut ends: BinaryHeap<Reverse<(u64, usize)>> = BinaryHeap::new();
    let mut stats = StrategyStats::default();
    while !queue.is_empty() {
        let (mut now, mut slot) = (0, ends.len());
        if ends.len() == slots {
            let Reverse(end) = ends.pop().expect("every slot is taken");
            queue.release(1);
            (now, slot) = end;
        }
        let next = queue.admit().expect("a slot is free and one waits");
        let length = next.item;
        if let Some(timeline) = &mut timeline {
            timeline.answered(slot, now, length, length);
        }
        ends.push(Reverse((now + u64::from(length), slot)));
        stats.requests += 1;
        stats.useful_tokens += u64::from(length);
    }
    stats.steps = ends.iter().map(|Reverse((end, _))| *end).max().unwrap_or(0);
    stats.slot_steps = stats.steps * slots as u64;
    if let Some(timeline) = timeline {
        let idle = (ends.len()..slots).map(|slot| (0, slot));
        for (end, slot) in ends.into_iter().map(|Reverse(end)| end).chain(idle) {
            timeline.answered(slot, end, 0, (stats.steps - end) as u32);
        }
    }
    stats
}

#[cfg(test)]
mod tests;
