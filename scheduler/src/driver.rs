//! Running the batches of a plan, and collecting and recomputing what fails: one driver for real and simulated work.

use std::collections::HashSet;

use lengthwise_core::RequestId;

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
/// the end of their group, in batches of the config's size.
///
/// # Errors
/// The executor failed or lost a request.
pub fn run_groups<X: BatchExecutor>(
    jobs: &[Job],
    config: &ScheduleConfig,
    executor: &mut X,
) -> Result<StrategyStats, DriverError<X::Error>> {
    let mut stats = StrategyStats::default();
    for group in jobs.chunks(config.group_size.get()) {
        let mut failed = Vec::new();
        for batch in plan_group(group, config) {
            failed.extend(run_checked(&batch, executor, &mut stats)?);
        }
        stats.failures += failed.len() as u64;
        for ids in failed.chunks(config.batch_size.get()) {
            let batch = PlannedBatch {
                ids: ids.to_vec(),
                stop_at: config.max_new_tokens,
            };
            if let Some(id) = run_checked(&batch, executor, &mut stats)?.into_iter().next() {
                return Err(DriverError::Unfinished {
                    id,
                    cap: config.max_new_tokens,
                });
            }
        }
    }
    Ok(stats)
}

/// Runs a batch, adds it to `stats` and returns the requests that were stopped.
fn run_checked<X: BatchExecutor>(
    batch: &PlannedBatch,
    executor: &mut X,
    stats: &mut StrategyStats,
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
            Outcome::Finished { tokens } => {
                stats.requests += 1;
                stats.useful_tokens += u64::from(*tokens);
            }
            Outcome::Stopped => stopped.push(id.clone()),
        }
    }
    match open.into_iter().min() {
        Some(id) => Err(DriverError::Outcomes { id: id.clone() }),
        None => Ok(stopped),
    }
}
