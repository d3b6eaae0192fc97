//! The same strategies on known lengths, without a model.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::convert::Infallible;

use lengthwise_core::RequestId;

use crate::{
    AdmissionQueue, BatchExecutor, BatchRun, CostModel, DriverError, Job, Outcome, PlannedBatch, ScheduleConfig,
    Strategy, StrategyStats, Waiting, driver::check_unique, run_groups,
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
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Simulated {
    /// Counted as in a real run.
    pub stats: StrategyStats,
    /// Seconds that the cost model says it takes; 0 without one. Prompts are reckoned at [`PROMPT_TOKENS`] tokens.
    pub seconds: f64,
}

/// Tokens that a prompt is reckoned to have where only lengths of answers are known.
pub const PROMPT_TOKENS: f64 = 64.0;

/// What the strategy costs on these requests, in the order given. A failure is recomputed from its first token.
///
/// - `clock`: tells the seconds; the plan follows the config alone
///
/// # Errors
/// Two requests have the same id.
pub fn simulate(
    requests: &[SimulatedRequest],
    config: &ScheduleConfig,
    clock: Option<CostModel>,
) -> Result<Simulated, DriverError<Infallible>> {
    check_unique(requests.iter().map(|r| &r.id))?;
    let cap = config.cap();
    let lengths = requests
        .iter()
        .map(|r| (r.id.clone(), r.actual.clamp(1, cap)))
        .collect();
    if config.strategy == Strategy::Continuous {
        let stats = continuous(requests, &lengths, config);
        let prompts = clock.map_or(0.0, |c| stats.requests as f64 * PROMPT_TOKENS * c.prompt_token);
        let mean = stats.useful_tokens as f64 / stats.requests.max(1) as f64;
        let context = PROMPT_TOKENS + mean / 2.0;
        let step = clock.map_or(0.0, |c| c.decode_step(config.batch_size.get() as f64, context));
        return Ok(Simulated {
            stats,
            seconds: stats.steps as f64 * step + prompts,
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
        clock,
        seconds: 0.0,
    };
    let stats = run_groups(&jobs, config, &mut known)?;
    Ok(Simulated {
        stats,
        seconds: known.seconds,
    })
}

struct KnownLengths {
    lengths: HashMap<RequestId, u32>,
    clock: Option<CostModel>,
    seconds: f64,
}

impl BatchExecutor for KnownLengths {
    type Error = Infallible;

    fn run_batch(&mut self, batch: &PlannedBatch) -> Result<BatchRun, Infallible> {
        let length = |id: &RequestId| self.lengths.get(id).copied().unwrap_or(1);
        let longest = batch.ids.iter().map(length).max().unwrap_or(0);
        let steps = longest.min(batch.stop_at);
        if let Some(clock) = self.clock {
            let (rows, steps) = (batch.ids.len() as f64, f64::from(steps));
            let prompts = rows * PROMPT_TOKENS * clock.prompt_token;
            self.seconds += prompts + steps * clock.decode_step(rows, PROMPT_TOKENS + steps / 2.0);
        }
        let outcome = |id: &RequestId| match length(id) {
            tokens if tokens <= batch.stop_at => Outcome::Finished { tokens },
            _ => Outcome::Stopped,
        };
        Ok(BatchRun {
            steps,
            slot_steps: u64::from(steps) * batch.ids.len() as u64,
            outcomes: batch.ids.iter().map(|id| (id.clone(), outcome(id))).collect(),
        })
    }
}

/// Every slot is refilled in the step after its sequence ended. Slots × steps counts idle slots too.
fn continuous(
    requests: &[SimulatedRequest],
    lengths: &HashMap<RequestId, u32>,
    config: &ScheduleConfig,
) -> StrategyStats {
    let slots = config.batch_size.get();
    let mut queue = AdmissionQueue::new(config.order, slots);
    for request in requests {
        let waiting = Waiting {
            id: request.id.clone(),
            predicted: request.predicted,
            cache_tokens: 1,
        };
        queue.push(waiting).expect("one of at least one slot");
    }
    let mut ends: BinaryHeap<Reverse<u64>> = BinaryHeap::new();
    let mut stats = StrategyStats::default();
    while !queue.is_empty() {
        let mut now = 0;
        if ends.len() == slots {
            let Reverse(end) = ends.pop().expect("every slot is taken");
            queue.release(1);
            now = end;
        }
        let next = queue.admit().expect("a slot is free and one waits");
        let length = u64::from(lengths[&next.id]);
        ends.push(Reverse(now + length));
        stats.requests += 1;
        stats.useful_tokens += length;
    }
    stats.steps = ends.into_iter().map(|Reverse(end)| end).max().unwrap_or(0);
    stats.slot_steps = stats.steps * slots as u64;
    stats
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Strategy;
    use proptest::prelude::*;
    use std::num::NonZeroUsize;

    fn requests(lengths: &[(u32, u32)]) -> Vec<SimulatedRequest> {
        let request = |(i, &(actual, predicted)): (usize, &(u32, u32))| SimulatedRequest {
            id: i.to_string().into(),
            actual,
            predicted,
        };
        lengths.iter().enumerate().map(request).collect()
    }

    fn config(strategy: Strategy, batch_size: usize) -> ScheduleConfig {
        ScheduleConfig {
            batch_size: NonZeroUsize::new(batch_size).expect("not 0"),
            ..ScheduleConfig::new(strategy)
        }
    }

    fn run(lengths: &[(u32, u32)], config: &ScheduleConfig) -> StrategyStats {
        simulate(&requests(lengths), config, None)
            .expect("ids are distinct")
            .stats
    }

    #[test]
    fn vanilla_pads_to_the_longest_of_each_batch() {
        // (10, 30) and (20, 600 cut at 512): 2 × 30 + 2 × 512.
        let stats = run(&[(10, 0), (30, 0), (20, 0), (600, 0)], &config(Strategy::Vanilla, 2));
        assert_eq!((stats.steps, stats.slot_steps, stats.useful_tokens), (542, 1084, 572));
        assert_eq!((stats.requests, stats.failures, stats.wasted_tokens()), (4, 0, 512));
    }

    #[test]
    fn sorting_puts_like_lengths_together() {
        let stats = run(&[(10, 10), (30, 30), (10, 10), (30, 30)], &config(Strategy::SeqSch, 2));
        assert_eq!((stats.steps, stats.wasted_tokens()), (40, 0));
    }

    #[test]
    fn a_failure_is_recomputed_and_its_thrown_away_tokens_count() {
        // Predicted 20 and 20, actual 5 and 50: the batch stops at 20 (40 slot-steps), then 50 alone.
        let stats = run(&[(5, 20), (50, 20)], &config(Strategy::SeqSch, 2).with(false, true));
        assert_eq!((stats.failures, stats.steps, stats.slot_steps), (1, 70, 90));
        assert_eq!((stats.useful_tokens, stats.wasted_tokens()), (55, 35));
        assert_eq!(stats.average_length(), 45.0);
    }

    #[test]
    fn a_freed_slot_is_refilled_at_once() {
        // Two slots, longest first: 6 | 5, then 3 after the 5 and 2 after the 6: both end at 8.
        let lengths = [(2, 2), (6, 6), (3, 3), (5, 5)];
        let stats = run(&lengths, &config(Strategy::Continuous, 2));
        assert_eq!((stats.steps, stats.slot_steps, stats.useful_tokens), (8, 16, 16));
        let order = crate::AdmissionOrder::FirstCome;
        // 2 | 6, then 3 after the 2 (ends 5), 5 after the 3 (ends 10).
        let stats = run(
            &lengths,
            &ScheduleConfig {
                order,
                ..config(Strategy::Continuous, 2)
            },
        );
        assert_eq!(stats.steps, 10);
    }

    #[test]
    fn three_slots_take_six_requests_as_slots_fall_free() {
        // Predicted longest first: 9 8 6 | 4 3 2. The 4 follows the 6 (ends 10), the 3 the 8 (11), the 2 the 9 (11).
        let lengths = [(2, 2), (9, 9), (4, 4), (8, 8), (3, 3), (6, 6)];
        let stats = run(&lengths, &config(Strategy::Continuous, 3));
        assert_eq!((stats.steps, stats.slot_steps, stats.useful_tokens), (11, 33, 32));
        assert_eq!((stats.requests, stats.failures, stats.wasted_tokens()), (6, 0, 1));
        // More slots than requests: the idle ones are wasted too.
        let stats = run(&[(5, 5)], &config(Strategy::Continuous, 3));
        assert_eq!((stats.slot_steps, stats.wasted_tokens()), (15, 10));
    }

    #[test]
    fn an_id_that_occurs_twice_is_an_error_under_every_strategy() {
        for strategy in Strategy::ALL {
            let mut twice = requests(&[(10, 10), (20, 20)]);
            twice[1].id = twice[0].id.clone();
            let result = simulate(&twice, &config(strategy, 1), None);
            assert!(matches!(result, Err(DriverError::DuplicateId { .. })), "{strategy}");
        }
    }

    #[test]
    fn no_request_at_all_costs_nothing() {
        for strategy in Strategy::ALL {
            assert_eq!(run(&[], &config(strategy, 4)), StrategyStats::default());
        }
    }

    proptest! {
        #[test]
        fn every_request_once_and_no_answer_cut(
            lengths in prop::collection::vec((0u32..2000, prop_oneof![Just(0), Just(u32::MAX), 0u32..800]), 0..400),
            strategy in prop::sample::select(Strategy::ALL.to_vec()),
            vbs: bool, fcr: bool,
            batch_size in 1usize..40, group_size in 1usize..300, cap in 1u32..700,
        ) {
            let config = ScheduleConfig {
                group_size: NonZeroUsize::new(group_size).expect("not 0"),
                max_new_tokens: cap,
                ..config(strategy, batch_size)
            }.with(vbs, fcr);
            let stats = run(&lengths, &config);
            prop_assert_eq!(stats.requests, lengths.len() as u64);
            let whole: u64 = lengths.iter().map(|(actual, _)| u64::from((*actual).clamp(1, cap))).sum();
            prop_assert_eq!(stats.useful_tokens, whole);
            prop_assert!(stats.slot_steps >= stats.useful_tokens);
            prop_assert!(fcr || stats.failures == 0);
        }
    }
}
