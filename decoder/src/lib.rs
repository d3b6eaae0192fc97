//! Runs sequences on a device: static batches by the scheduler's plan, and continuous batching.

mod continuous;
mod engine;
mod local;
mod sequence;
mod static_batch;
#[cfg(test)]
mod tests;

use std::collections::HashSet;

use lengthwise_core::DecodeError;
use lengthwise_scheduler::{DriverError, Job, ScheduleConfig, Strategy, StrategyStats, run_groups};

pub use engine::{DEFAULT_CACHE_BYTES, Engine, EngineConfig};
pub use local::LocalDecoder;
pub use sequence::{SequenceOutput, SequenceRequest};

/// Where answers go, each as soon as it has ended; an error stops the run.
pub type OutputSink<'a> = dyn FnMut(SequenceOutput) -> Result<(), DecodeError> + 'a;

/// A request with the length predicted for its answer.
#[derive(Debug, Clone, PartialEq)]
pub struct PredictedRequest {
    /// The request.
    pub request: SequenceRequest,
    /// The largest length to expect, in tokens.
    pub predicted: u32,
}

/// Answers every request under a strategy. Whatever the strategy, each answer is what the request gets alone.
///
/// # Errors
/// A request that cannot be run at all is an error before anything is decoded.
pub fn run_strategy(
    engine: &mut Engine,
    requests: Vec<PredictedRequest>,
    config: &ScheduleConfig,
    on_output: &mut OutputSink,
) -> Result<StrategyStats, DecodeError> {
    let mut ids = HashSet::with_capacity(requests.len());
    for PredictedRequest { request, .. } in &requests {
        if !ids.insert(&request.id) {
            return Err(DecodeError::DuplicateId { id: request.id.clone() });
        }
        engine.check(request)?;
    }
    if config.strategy == Strategy::Continuous {
        return continuous::run(engine, requests, config, on_output);
    }
    let jobs: Vec<Job> = requests
        .iter()
        .map(|r| Job {
            id: r.request.id.clone(),
            predicted: r.predicted,
        })
        .collect();
    let requests = requests.into_iter().map(|r| r.request).collect();
    // Two lifetimes in one: the executor borrows the sink for its own life only.
    let mut sink = |output| on_output(output);
    let mut executor = static_batch::StaticExecutor::new(engine, requests, &mut sink);
    run_groups(&jobs, config, &mut executor).map_err(|err| match err {
        DriverError::Executor(err) => err,
        other => DecodeError::model(other.to_string()),
    })
}
