//! What `bench` schedules by: known lengths, disturbed ones, a file, or a predictor.

use std::path::Path;

use anyhow::{Context, bail};
use lengthwise_core::{LengthEstimate, LengthPredictor, RequestId};
use lengthwise_model::LoadedModel;
use lengthwise_scheduler::Strategy;

use super::BenchArgs;
use super::workload::Workload;
use crate::args::Global;
use crate::in_passes;
use crate::predictions::{ask, disturb, from_file, numbers, predictor_for};

/// The folder of the head that predicts a strategy's lengths in the decoder's passes.
pub fn in_passes(args: &BenchArgs, strategy: Strategy) -> Option<&Path> {
    in_passes::folder(&args.predictions, &args.schedule, strategy).filter(|_| args.noise_mae.is_none())
}

/// That no strategy would ask a predictor about prompts that say nothing: all would count by the cap then.
///
/// # Errors
/// One would.
pub fn check(args: &BenchArgs, workload: &Workload) -> anyhow::Result<()> {
    let asking = args.strategy.iter().find(|strategy| asks(args, workload, **strategy));
    match asking.filter(|_| workload.prompts.is_none()) {
        Some(strategy) => bail!(
            "{strategy} would ask a predictor about prompts of random tokens: give --input too, or leave --predictor and \
             --adapter out (the recorded lengths are known, and --noise-mae disturbs them)"
        ),
        None => Ok(()),
    }
}

/// Whether a strategy asks a predictor before it runs.
fn asks(args: &BenchArgs, workload: &Workload, strategy: Strategy) -> bool {
    let source = &args.predictions;
    let named = source.predictor.is_some() || source.adapter.is_some() || strategy == Strategy::Po;
    let known = match strategy {
        Strategy::Vanilla => true,
        Strategy::Oracle if workload.largest.is_some() => true,
        Strategy::SeqSch | Strategy::Continuous if args.noise_mae.is_some() => true,
        _ => source.predictions.is_some() || !named && args.replay.is_some(),
    };
    !known && in_passes(args, strategy).is_none()
}

/// The predictor that one strategy asks; none where its predictions are known. Opened before the clock runs.
pub fn predictor(
    args: &BenchArgs,
    model: &LoadedModel,
    workload: &Workload,
    strategy: Strategy,
) -> anyhow::Result<Option<Box<dyn LengthPredictor>>> {
    match asks(args, workload, strategy) {
        true => predictor_for(strategy, &args.predictions, model, args.schedule.max_new_tokens),
        false => Ok(None),
    }
}

/// The predictions of one strategy; the time they take counts as its own.
pub fn predict(
    global: &Global,
    args: &BenchArgs,
    predictor: Option<&mut Box<dyn LengthPredictor>>,
    workload: &Workload,
    strategy: Strategy,
) -> anyhow::Result<Vec<LengthEstimate>> {
    let cap = args.schedule.max_new_tokens;
    let known = workload.largest.as_ref();
    let at_cap = || numbers(vec![cap; workload.sequences.len()]);
    if let (Some(predictor), Some(prompts)) = (predictor, &workload.prompts) {
        let ids = workload.sequences.iter().map(|s| &s.id);
        return ask(predictor.as_mut(), prompts, ids, cap);
    }
    match (strategy, args.noise_mae) {
        (Strategy::Vanilla, _) => return Ok(at_cap()),
        (Strategy::Oracle, _) if known.is_some() => return Ok(numbers(known.cloned().unwrap_or_default())),
        (Strategy::SeqSch | Strategy::Continuous, Some(mae)) => {
            let known = known.context("--noise-mae disturbs true lengths: give --lengths or --replay")?;
            return Ok(numbers(disturb(known, mae, cap, global.seed)));
        }
        _ => {}
    }
    if let Some(path) = &args.predictions.predictions {
        let ids: Vec<RequestId> = workload.sequences.iter().map(|s| s.id.clone()).collect();
        return from_file(path, &ids);
    }
    match in_passes(args, strategy).is_some() || args.replay.is_none() {
        // Until the passes have told more.
        true => Ok(at_cap()),
        false => Ok(numbers(known.cloned().context("--replay has no lengths")?)),
    }
}
