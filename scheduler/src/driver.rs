//! Running the batches of a plan, and collecting and recomputing what fails: one driver for real and simulated work.

use std::collections::{HashMap, HashSet};

use lengthwise_core::RequestId;

use crate::planner::Planner;
use crate::{Job, PlannedBatch, ScheduleConfig, StrategyStats, plan_group};

/// What became of a request in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Its answer is complete and has this many tokens in all.
    Finished {
        /// Tokens of the answer.
        tokens: u32,
    },
    /// The batch stopped before it ended.
    Stopped,
}

/// What a batch did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchRun {
    /// Decode steps of this run: one per token of its longest sequence, those of an earlier run not counted again.
    pub steps: u32,
    /// Slots × steps.
    pub slot_steps: u64,
    /// One outcome per request of the batch.
    pub outcomes: Vec<(RequestId, Outcome)>,
}

/// Whatever can run a batch: a model, or arithmetic on known lengths.
pub trait BatchExecutor {
    /// Why a batch could not be run.
    type Error;

    /// Runs every request of `batch` until it ends or has `stop_at` tokens. A request that was stopped before may go on
    /// from where it was or begin anew; its answer is the same.
    ///
    /// # Errors
    /// The executor's own.
    fn run_batch(&mut self, batch: &PlannedBatch) -> Result<BatchRun, Self::Error>;

    /// Whether a request that was stopped goes on from where it was; a planner reckons with it.
    fn resumes(&self) -> bool {
        false
    }
}

/// Why a schedule could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum DriverError<E> {
    /// The executor failed.
    #[error(transparent)]
    Executor(E),
    /// The executor lost a request, or answered one twice or unasked.
    #[error("request {id}: a batch ended with no outcome for it, or with one too many")]
    Outcomes {
        /// The first such request.
        id: RequestId,
    },
    /// Two requests have the same id, so that their outcomes could not be told apart.
    #[error("request {id} occurs twice: ids must be unique")]
    DuplicateId {
        /// The id.
        id: RequestId,
    },
    /// An answer longer than allowed: the executor did not keep to the cap.
    #[error("request {id} ended with {tokens} tokens, the cap is {cap}")]
    TooLong {
        /// The request.
        id: RequestId,
        /// Tokens of its answer.
        tokens: u32,
        /// The cap.
        cap: u32,
    },
    /// More tokens in answers than were computed: the executor left work out of its count.
    #[error("{useful} tokens were answered, but only {computed} counted as computed (slots × steps)")]
    Uncounted {
        /// Tokens of the answers.
        useful: u64,
        /// Slots × steps.
        computed: u64,
    },
    /// A batch without a stopping length left a request unfinished.
    #[error("request {id} was stopped by a batch that runs to the cap of {cap} tokens")]
    Unfinished {
        /// The request.
        id: RequestId,
        /// The cap.
        cap: u32,
    },
}

/// Runs jobs group by group. Requests that had not ended when their batch stopped are collected and run to the cap at
/// the end of their group, in batches of the config's size or, with a cost model, as it plans them.
///
/// # Errors
/// Two jobs have the same id (before anything is run); the executor failed, lost a request or miscounted.
pub fn run_groups<X: BatchExecutor>(
    jobs: &[Job],
    config: &ScheduleConfig,
    executor: &mut X,
) -> Result<StrategyStats, DriverError<X::Error>> {
    check_unique(jobs.iter().map(|job| &job.id))?;
    let mut stats = StrategyStats::default();
    let planning = config.planning.as_ref().filter(|_| config.strategy.sorts());
    let mut planner = planning.map(|planning| Planner::new(planning, config, executor.resumes()));
    for group in jobs.chunks(config.group_size.get()) {
        let ran = run_group(group, config, planner.as_ref(), executor, &mut stats)?;
        if let Some(planner) = &mut planner {
            planner.observe(group, &ran);
        }
        // Only whole groups add up: a resumed batch answers with tokens that an earlier one computed.
        let (useful, computed) = (stats.useful_tokens, stats.slot_steps);
        if useful > computed {
            return Err(DriverError::Uncounted { useful, computed });
        }
    }
    Ok(stats)
}

/// Runs one group and then what failed of it. Returns the length of every answer.
fn run_group<X: BatchExecutor>(
    group: &[Job],
    config: &ScheduleConfig,
    planner: Option<&Planner>,
    executor: &mut X,
    stats: &mut StrategyStats,
) -> Result<HashMap<RequestId, u32>, DriverError<X::Error>> {
    let cap = config.cap();
    let mut lengths = HashMap::new();
    let mut failed = Vec::new();
    let batches = planner.map_or_else(|| plan_group(group, config), |planner| planner.plan(group));
    for batch in batches {
        let stopped = run_checked(&batch, cap, executor, stats, &mut lengths)?;
        failed.extend(stopped.into_iter().map(|id| (id, batch.stop_at)));
    }
    stats.failures += failed.len() as u64;
    let rest = match planner {
        Some(planner) => planner.plan_rest(group, &failed),
        None => to_the_cap(&failed, config),
    };
    for batch in rest {
        let stopped = run_checked(&batch, cap, executor, stats, &mut lengths)?;
        if let Some(id) = stopped.into_iter().next() {
            return Err(DriverError::Unfinished { id, cap });
        }
    }
    Ok(lengths)
}

/// Failures in the order collected, as published.
fn to_the_cap(failed: &[(RequestId, u32)], config: &ScheduleConfig) -> Vec<PlannedBatch> {
    let batch = |failed: &[(RequestId, u32)]| PlannedBatch {
        ids: failed.iter().map(|(id, _)| id.clone()).collect(),
        stop_at: config.cap(),
    };
    failed.chunks(config.batch_size.get()).map(batch).collect()
}

/// That no id occurs twice.
pub(crate) fn check_unique<'a, E>(ids: impl Iterator<Item = &'a RequestId>) -> Result<(), DriverError<E>> {
    let mut seen = HashSet::new();
    for id in ids {
        if !seen.insert(id) {
            return Err(DriverError::DuplicateId { id: id.clone() });
        }
    }
    Ok(())
}

/// Runs a batch, adds it to `stats` and its answers to `lengths`, and returns the requests that were stopped.
fn run_checked<X: BatchExecutor>(
    batch: &PlannedBatch,
    cap: u32,
    executor: &mut X,
    stats: &mut StrategyStats,
    lengths: &mut HashMap<RequestId, u32>,
) -> Result<Vec<RequestId>, DriverError<X::Error>> {
    let run = executor.run_batch(batch).map_err(DriverError::Executor)?;
    stats.steps += u64::from(run.steps);
    stats.slot_steps += run.slot_steps;
    let mut open: HashSet<&RequestId> = batch.ids.iter().collect();
    let mut stopped = Vec::new();
    for (id, outcome) in &run.outcomes {
        if !open.remove(id) {
            return Err(DriverError::Outcomes { id: id.clone() });
        }
        match outcome {
            Outcome::Finished { tokens } if *tokens > cap => {
                let (id, tokens) = (id.clone(), *tokens);
                return Err(DriverError::TooLong { id, tokens, cap });
            }
            Outcome::Finished { tokens } => {
                stats.requests += 1;
                stats.useful_tokens += u64::from(*tokens);
                lengths.insert(id.clone(), *tokens);
            }
            Outcome::Stopped => stopped.push(id.clone()),
        }
    }
    match open.into_iter().min() {
        Some(id) => Err(DriverError::Outcomes { id: id.clone() }),
        None => Ok(stopped),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Strategy;
    use std::convert::Infallible;
    use std::num::NonZeroUsize;

    /// A miscount or loss that is put into an otherwise good run.
    type Spoil = fn(&mut BatchRun);
    type Ran = Vec<(String, u32)>;
    type Stats = Result<StrategyStats, DriverError<Infallible>>;

    /// Knows every length, keeps what it has of a stopped request if `resumes`, and writes down what it was given.
    struct Script {
        lengths: HashMap<RequestId, u32>,
        resumes: bool,
        generated: HashMap<RequestId, u32>,
        ran: Ran,
        spoil: Spoil,
    }

    impl BatchExecutor for Script {
        type Error = Infallible;

        fn run_batch(&mut self, batch: &PlannedBatch) -> Result<BatchRun, Infallible> {
            let names: Vec<&str> = batch.ids.iter().map(RequestId::as_str).collect();
            self.ran.push((names.join(" "), batch.stop_at));
            let mut steps = 0;
            let mut outcomes = Vec::new();
            for id in &batch.ids {
                let before = self.generated.get(id).copied().filter(|_| self.resumes).unwrap_or(0);
                let tokens = self.lengths[id].min(batch.stop_at);
                steps = steps.max(tokens - before);
                self.generated.insert(id.clone(), tokens);
                let ended = tokens == self.lengths[id];
                let outcome = if ended {
                    Outcome::Finished { tokens }
                } else {
                    Outcome::Stopped
                };
                outcomes.push((id.clone(), outcome));
            }
            let slot_steps = u64::from(steps) * batch.ids.len() as u64;
            let mut run = BatchRun {
                steps,
                slot_steps,
                outcomes,
            };
            (self.spoil)(&mut run);
            Ok(run)
        }
    }

    fn run(lengths: &[(&str, u32, u32)], resumes: bool, spoil: Spoil) -> (Stats, Ran) {
        let job = |&(id, _, predicted): &(&str, u32, u32)| Job {
            id: id.into(),
            predicted,
        };
        let jobs: Vec<Job> = lengths.iter().map(job).collect();
        let mut script = Script {
            lengths: lengths.iter().map(|&(id, actual, _)| (id.into(), actual)).collect(),
            resumes,
            generated: HashMap::new(),
            ran: Vec::new(),
            spoil,
        };
        let config = ScheduleConfig {
            batch_size: NonZeroUsize::new(2).expect("not 0"),
            group_size: NonZeroUsize::new(4).expect("not 0"),
            max_new_tokens: 100,
            ..ScheduleConfig::new(Strategy::SeqSch).with(false, true)
        };
        let result = run_groups(&jobs, &config, &mut script);
        (result, script.ran)
    }

    /// A group of four of which c, a and d fail, then a group of one.
    const TWO_GROUPS: [(&str, u32, u32); 5] = [("a", 60, 20), ("b", 20, 20), ("c", 30, 10), ("d", 90, 40), ("e", 5, 5)];

    fn batches(ran: &[(String, u32)]) -> Vec<(&str, u32)> {
        ran.iter().map(|(ids, stop)| (ids.as_str(), *stop)).collect()
    }

    #[test]
    fn failures_run_to_the_cap_at_the_end_of_their_own_group_in_the_order_collected() {
        let (stats, ran) = run(&TWO_GROUPS, false, |_| {});
        let expected = [("c a", 20), ("b d", 40), ("c a", 100), ("d", 100), ("e", 5)];
        assert_eq!(batches(&ran), expected);
        let stats = stats.expect("runs");
        assert_eq!((stats.requests, stats.failures), (5, 3));
        // 20, 40, then 60 for a, 90 for d, 5 for e; d is alone in its second batch and e in its only one.
        assert_eq!(stats.steps, 20 + 40 + 60 + 90 + 5);
        assert_eq!(stats.slot_steps, 40 + 80 + 120 + 90 + 5);
        assert_eq!(stats.useful_tokens, 60 + 20 + 30 + 90 + 5);
    }

    #[test]
    fn a_resumed_failure_counts_only_its_further_steps() {
        let (stats, ran) = run(&TWO_GROUPS, true, |_| {});
        assert_eq!(ran.len(), 5);
        let stats = stats.expect("runs");
        // a goes on from 20 (40 more, two slots), d from 40 (50 more, alone): the answers are the same.
        assert_eq!(stats.steps, 20 + 40 + 40 + 50 + 5);
        assert_eq!(stats.slot_steps, 40 + 80 + 80 + 50 + 5);
        assert_eq!((stats.useful_tokens, stats.failures), (205, 3));
    }

    #[test]
    fn an_executor_that_loses_doubles_or_invents_a_request_is_found_out() {
        let spoils: [(&str, Spoil); 3] = [
            ("a", |run| run.outcomes.truncate(0)),
            ("a", |run| run.outcomes.push(run.outcomes[0].clone())),
            ("x", |run| run.outcomes.push(("x".into(), Outcome::Stopped))),
        ];
        for (expected, spoil) in spoils {
            match run(&[("a", 5, 5)], false, spoil).0 {
                Err(DriverError::Outcomes { id }) => assert_eq!(id.as_str(), expected),
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn an_executor_that_miscounts_is_found_out() {
        let (result, _) = run(&[("a", 5, 5)], false, |run| run.slot_steps = 4);
        assert!(
            matches!(result, Err(DriverError::Uncounted { useful: 5, computed: 4 })),
            "{result:?}"
        );
        let too_long = |run: &mut BatchRun| run.outcomes[0].1 = Outcome::Finished { tokens: 101 };
        let (result, _) = run(&[("a", 5, 5)], false, too_long);
        assert!(
            matches!(
                result,
                Err(DriverError::TooLong {
                    tokens: 101,
                    cap: 100,
                    ..
                })
            ),
            "{result:?}"
        );
    }

    #[test]
    fn a_request_still_unfinished_at_the_cap_is_an_error_not_a_loss() {
        let (result, _) = run(&[("a", 101, 5)], false, |_| {});
        assert!(
            matches!(result, Err(DriverError::Unfinished { cap: 100, .. })),
            "{result:?}"
        );
    }

    #[test]
    fn an_id_that_occurs_twice_is_refused_before_anything_runs() {
        // In different groups, where no batch could notice.
        let lengths = [("a", 5, 5), ("b", 5, 5), ("c", 5, 5), ("d", 5, 5), ("a", 9, 9)];
        let (result, ran) = run(&lengths, false, |_| {});
        assert!(matches!(result, Err(DriverError::DuplicateId { id }) if id.as_str() == "a"));
        assert!(ran.is_empty());
    }
}
