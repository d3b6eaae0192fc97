//! `simulate`: strategies on known lengths.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use lengthwise_core::{LengthEstimate, RequestId};
use lengthwise_decoder::EngineConfig;
use lengthwise_scheduler::{
    CostModel, Machine, Planning, SimulatedRequest, Strategy, StrategyReport, StrategyRow, simulate,
};
use lengthwise_train::files::{LengthRecord, read_lengths};

use crate::args::Global;
use crate::cost::cost_model;
use crate::history::History;
use crate::inputs::{ScheduleArgs, actual_length};
use crate::output::{print, print_json};
use crate::predictions::{Distributions, distributions, disturb, from_file, numbers, parse_noise};
use crate::slots;
use crate::sweep::SweepArgs;
use crate::table::Table;

/// Flags of `simulate`.
#[derive(Args)]
pub struct SimulateArgs {
    /// Recorded lengths: lengths.jsonl or the published JSON array
    #[arg(long)]
    lengths: PathBuf,
    /// vanilla, po, seqsch, oracle or continuous; several with commas
    #[arg(long, value_delimiter = ',', default_value = "vanilla,seqsch,oracle,continuous")]
    strategy: Vec<Strategy>,
    #[command(flatten)]
    schedule: ScheduleArgs,
    /// Only the first N requests of the file
    #[arg(long)]
    num: Option<NonZeroUsize>,
    /// Which recorded sample is the one that is generated: t0.0, t0.3, …
    #[arg(long, default_value = "t0.0")]
    actual: String,
    /// Predictions: a JSONL file of {"id", "max_tokens", "quantiles"?} [default: the true largest lengths]
    #[arg(long, conflicts_with = "noise_mae")]
    predictions: Option<PathBuf>,
    /// Predictions: the true largest lengths, disturbed to this mean absolute error
    #[arg(long, value_parser = parse_noise)]
    noise_mae: Option<f64>,
    /// Requests that were stopped go on from where they were, as with generate and bench, instead of being recomputed
    /// from the first token
    #[arg(long)]
    resume: bool,
    #[command(flatten)]
    sweep: SweepArgs,
}

pub fn run(global: &Global, args: &SimulateArgs) -> anyhow::Result<()> {
    let schedules = args.sweep.schedules(&args.schedule)?;
    let mut records = read_lengths(&args.lengths)?;
    records.truncate(args.num.map_or(usize::MAX, NonZeroUsize::get));
    args.sweep.check(records.len())?;
    let cost = match args.schedule.wants_cost(&args.strategy) {
        true => Some(cost_model(&global.open_model()?, EngineConfig::default(), None)?),
        false => None,
    };
    let mut report = StrategyReport::default();
    for &strategy in &args.strategy {
        let estimates = estimates(global, args, &records, strategy)?;
        let requests = requests(args, &records, &estimates)?;
        // Only strategies that sort are planned; the others need not read the history.
        let sorting = cost.filter(|_| strategy.sorts());
        let own = distributions(records.iter().map(|r| &r.id).zip(&estimates));
        let planning = sorting.map(|cost| planning(global, args, cost, own, strategy));
        let planning = planning.transpose()?;
        for config in schedules.iter().flat_map(|s| s.configs(strategy, planning.as_ref())) {
            let machine = Machine {
                clock: cost,
                resumes: args.resume,
                timeline: args.sweep.timeline,
            };
            let simulated = simulate(&requests, &config, machine)?;
            report.strategies.push(StrategyRow {
                modelled_seconds: cost.map(|_| simulated.seconds),
                timeline: simulated.timeline,
                ..simulated.stats.row(&config, None)
            });
        }
    }
    // By batch size, and within one in the order asked for.
    report.strategies.sort_by_key(|row| row.batch_size);
    match global.json {
        true => print_json(&report),
        false => print(&(Table::strategies(&report.strategies).text() + &slots::timelines(&report.strategies))),
    }
}

/// What the planner goes by for one strategy: the oracle's predictions are not disturbed.
fn planning(
    global: &Global,
    args: &SimulateArgs,
    cost: CostModel,
    distributions: Distributions,
    strategy: Strategy,
) -> anyhow::Result<Arc<Planning>> {
    let noise = args.noise_mae.filter(|_| strategy != Strategy::Oracle);
    let history = History {
        path: args.schedule.history.as_deref(),
        actual: &args.actual,
        noise,
        divide_lengths: 1,
    };
    history.planning(cost, distributions, args.schedule.max_new_tokens, global.seed)
}

fn estimates(
    global: &Global,
    args: &SimulateArgs,
    records: &[LengthRecord],
    strategy: Strategy,
) -> anyhow::Result<Vec<LengthEstimate>> {
    let cap = args.schedule.max_new_tokens;
    let largest: Vec<u32> = records.iter().map(|r| r.largest().min(cap)).collect();
    Ok(match (strategy, &args.predictions, args.noise_mae) {
        // The oracle knows, whatever the others are told.
        (Strategy::Oracle | Strategy::Vanilla, _, _) => numbers(largest),
        (_, None, None) => {
            tracing::info!("{strategy}: no predictions are given, so the true largest lengths are used");
            numbers(largest)
        }
        (_, Some(path), _) => {
            let ids: Vec<RequestId> = records.iter().map(|r| r.id.clone()).collect();
            from_file(path, &ids)?
        }
        (_, None, Some(mae)) => numbers(disturb(&largest, mae, cap, global.seed)),
    })
}

fn requests(
    args: &SimulateArgs,
    records: &[LengthRecord],
    estimates: &[LengthEstimate],
) -> anyhow::Result<Vec<SimulatedRequest>> {
    let request = |(record, estimate): (&LengthRecord, &LengthEstimate)| {
        Ok(SimulatedRequest {
            id: record.id.clone(),
            actual: actual_length(record, &args.actual)?,
            predicted: estimate.max_tokens,
        })
    };
    records.iter().zip(estimates).map(request).collect()
}
