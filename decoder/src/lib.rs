//! Runs sequences on a device: static batches by the scheduler's plan, and continuous batching.

mod budget;
mod cancellation;
mod continuous;
mod engine;
mod local;
mod probes;
mod recording;
mod sequence;
mod static_batch;
#[cfg(test)]
mod tests;

use std::collections::HashSet;

use lengthwise_core::DecodeError;
use lengthwise_scheduler::{ScheduleConfig, Strategy, StrategyStats};

pub use budget::{DEFAULT_CACHE_BYTES, EngineConfig, KvBudget};
pub use cancellation::Cancellation;
pub use engine::Engine;
pub use local::LocalDecoder;
pub use probes::Prober;
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

/// What a run heeds besides its requests.
#[derive(Clone, Copy, Default)]
pub struct Controls<'a> {
    /// Takes requests back; without it none is.
    pub cancellation: Option<&'a Cancellation>,
    /// Predicts requests in the passes of the continuous mode: those that are next in the order of the requests, as many as
    /// there are slots. A request's `predicted` holds until then, and it is never waited for. The other strategies need every
    /// length before they begin, and ask nobody.
    pub prober: Option<&'a dyn Prober>,
}

impl<'a> From<&'a Cancellation> for Controls<'a> {
    fn from(cancellation: &'a Cancellation) -> Self {
        Self {
            cancellation: Some(cancellation),
            prober: None,
        }
    }
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
    run_controlled(engine, requests, config, Controls::default(), on_output)
}

/// As [`run_strategy`], but requests can be cancelled meanwhile: they end as [`FinishReason::Cancelled`] with the tokens they
/// have. What they hold of the KV cache is free before the next step, and so is their slot: the continuous mode gives it
/// to the next, a static batch goes on without the row. The other answers are what they would have been.
///
/// Tokens of a cancelled answer count as computed and not as useful, and it does not count as a request.
///
/// # Errors
/// A request that cannot be run at all, or a prober beside an adapter of the engine's, is an error before anything is
/// decoded.
///
/// [`FinishReason::Cancelled`]: lengthwise_core::FinishReason::Cancelled
pub fn run_controlled<'a>(
    engine: &mut Engine,
    requests: Vec<PredictedRequest>,
    config: &ScheduleConfig,
    controls: impl Into<Controls<'a>>,
    on_output: &mut OutputSink,
) -> Result<StrategyStats, DecodeError> {
    check_all(engine, &requests)?;
    let Controls { cancellation, prober } = controls.into();
    let nobody = Cancellation::default();
    let cancellation = cancellation.unwrap_or(&nobody);
    match config.strategy {
        Strategy::Continuous => {
            prober.map_or(Ok(()), |_| engine.check_probes())?;
            continuous::run(engine, requests, config, (cancellation, prober), on_output)
        }
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
