//! Runs sequences on a device: static batches by the scheduler's plan, and continuous batching.

mod cancellation;
mod continuous;
mod engine;
mod local;
mod recording;
mod sequence;
mod static_batch;
#[cfg(test)]
mod tests;

use std::collections::HashSet;

use lengthwise_core::DecodeError;
use lengthwise_scheduler::{ScheduleConfig, Strategy, StrategyStats};

pub use cancellation::Cancellation;
pub use engine::{DEFAULT_CACHE_BYTES, Engine, EngineConfig, KvBudget};
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
    run_controlled(engine, requests, config, &Cancellation::default(), on_output)
}

/// As [`run_strategy`], but requests can be cancelled meanwhile: they end as [`FinishReason::Cancelled`] with the tokens they
/// have. What they hold of the KV cache is free before the next step, and so is their slot: the continuous mode gives it
/// to the next, a static batch goes on without the row. The other answers are what they would have been.
///
/// Tokens of a cancelled answer count as computed and not as useful, and it does not count as a request.
///
/// # Errors
/// A request that cannot be run at all is an error before anything is decoded.
///
/// [`FinishReason::Cancelled`]: lengthwise_core::FinishReason::Cancelled
pub fn run_controlled(
    engine: &mut Engine,
    requests: Vec<PredictedRequest>,
    config: &ScheduleConfig,
    cancellation: &Cancellation,
    on_output: &mut OutputSink,
) -> Result<StrategyStats, DecodeError> {
    check_all(engine, &requests)?;
    match config.strategy {
        Strategy::Continuous => continuous::run(engine, requests, config, cancellation, on_output),
        _ => static_batch::run(engine, requests, config, cancellation, on_output),
    }
}

/// That every request can be run and has an id of its own.
fn check_all(engine: &Engine, requests: &[PredictedRequest]) -> Result<(), DecodeError> {
    let mut ids = HashSet::with_capacity(requests.len());
    for PredictedRequest { request, .. } in requests {
        if !ids.insert(&request.id) {
            return Err(DecodeError::DuplicateId { id: request.id.clone() });
        }
        engine.check(request)?;
    }
    Ok(())
}
