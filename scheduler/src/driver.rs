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
    /// Nobody wants it any more, and it is not to be run again. What was computed of it counts as computed and not as
    /// useful.
    Cancelled,
}

/// What a batch did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchRun {
    /// Decode steps of this run: one per token of its longest sequence, those of an earlier run not counted again.
    pub steps: u32,
    /// Slots × steps; a slot whose request was cancelled counts up to there.
    pub slot_steps: u64,
    /// One outcome per request of the batch.
    pub outcomes: Vec<(RequestId, Outcome)>,
}

/// Whatever can run a batch: a model, or arithmetic on known lengths.
pub trait BatchExecutor {
    /// Why a batch could not be run.
    type Error;

    /// Runs every request of `batch` until it ends or has had `stop_at` steps. A request that was stopped before may go on
    /// from where it was or begin anew; its answer is the same.
    ///
    /// # Errors
    /// The executor's own.
    fn run_batch(&mut self, batch: &PlannedBatch) -> Result<BatchRun, Self::Error>;

    /// Tokens, prompts included, that stopped requests may hold together and go on from where they were without being
    /// computed a second time; 0 where they begin anew. A planner reckons with it.
    fn kept_tokens(&self) -> usize {
        0
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
    /// A batch that runs to the cap left a request unfinished, or one that was to bring it further did not.
    #[error("request {id} was stopped by a batch that runs to the cap of {cap} tokens, or got no further")]
    Unfinished {
        /// The request.
        id: RequestId,
        /// The cap.
        cap: u32,
    },
}

/// Runs jobs group by group. Requests that had not ended when their batch stopped are collected and finished at the end
/// of their group: in batches of the config's size that run to the cap or, with a cost model, in rounds of batches as it
/// plans them.
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
    let mut planner = planning.map(|planning| Planner::new(planning, config, executor.kept_tokens()));
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
    let mut lengths = HashMap::new();
    let mut failed: Vec<(RequestId, u32)> = Vec::new();
    for round in 0.. {
        let batches = match planner {
            Some(planner) if round == 0 => planner.plan(group),
            Some(planner) => planner.plan_rest(group, &failed, round),
            None if round == 0 => plan_group(group, config),
            None => to_the_cap(&failed, config),
        };
        let known: HashMap<RequestId, u32> = failed.drain(..).collect();
        for batch in &batches {
            for id in run_checked(batch, config.cap(), executor, stats, &mut lengths)? {
                let before = known.get(&id).copied().unwrap_or(0);
                let now = batch.stop_at + if executor.kept_tokens() > 0 { before } else { 0 };
                if now >= config.cap() || now <= before {
                    return Err(DriverError::Unfinished { id, cap: config.cap() });
                }
                failed.push((id, now));
            }
        }
        // One that fails again is the same failure.
        stats.failures += if round == 0 { failed.len() as u64 } else { 0 };
        if failed.is_empty() {
            break;
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
            Outcome::Cancelled => {}
        }
    }
    match open.into_iter().min() {
        Some(id) => Err(DriverError::Outcomes { id: id.clone() }),
        None => Ok(stopped),
    }
}

#[cfg(test)]
mod tests;
