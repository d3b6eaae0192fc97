//! `simulate`: strategies on known lengths.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use lengthwise_core::RequestId;
use lengthwise_decoder::EngineConfig;
use lengthwise_scheduler::{CostModel, Planning, SimulatedRequest, Strategy, StrategyReport, StrategyRow, simulate};
use lengthwise_train::files::{LengthRecord, read_lengths};

use crate::args::Global;
use crate::cost::cost_model;
use crate::history::History;
use crate::inputs::{ScheduleArgs, actual_length};
use crate::output::{print, print_json};
use crate::predictions;
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
    /// Predictions: a JSONL file of {"id", "max_tokens"} [default: the true largest lengths]
    #[arg(long, conflicts_with = "noise_mae")]
    predictions: Option<PathBuf>,
    /// Predictions: the true largest lengths, disturbed to this mean absolute error
    #[arg(long, value_parser = predictions::parse_noise)]
    noise_mae: Option<f64>,
}

pub fn run(global: &Global, args: &SimulateArgs) -> anyhow::Result<()> {
    let mut records = read_lengths(&args.lengths)?;
    records.truncate(args.num.map_or(usize::MAX, NonZeroUsize::get));
    let cost = match args.schedule.wants_cost(&args.strategy) {
        true => Some(cost_model(&global.open_model()?, EngineConfig::default())?),
        false => None,
    };
    let mut report = StrategyReport::default();
    for &strategy in &args.strategy {
        let requests = requests(global, args, &records, strategy)?;
        // Only strategies that sort are planned; the others need not read the history.
        let sorting = cost.filter(|_| strategy.sorts());
        let planning = sorting.map(|cost| planning(global, args, cost, strategy)).transpose()?;
        for config in args.schedule.configs(strategy, planning.as_ref()) {
            let simulated = simulate(&requests, &config, cost)?;
            report.strategies.push(StrategyRow {
                modelled_seconds: cost.map(|_| simulated.seconds),
                ..simulated.stats.row(&config, None)
            });
        }
    }
    match global.json {
        true => print_json(&report),
        false => print(&Table::strategies(&report.strategies).text()),
    }
}

/// What the planner goes by for one strategy: the oracle's predictions are not disturbed.
fn planning(
    global: &Global,
    args: &SimulateArgs,
    cost: CostModel,
    strategy: Strategy,
) -> anyhow::Result<Arc<Planning>> {
    let noise = args.noise_mae.filter(|_| strategy != Strategy::Oracle);
    let history = History {
        path: args.schedule.history.as_deref(),
        actual: &args.actual,
        noise,
        divide_lengths: 1,
    };
    history.planning(cost, args.schedule.max_new_tokens, global.seed)
}

fn requests(
    global: &Global,
    args: &SimulateArgs,
    records: &[LengthRecord],
    strategy: Strategy,
) -> anyhow::Result<Vec<SimulatedRequest>> {
    let cap = args.schedule.max_new_tokens;
    let largest: Vec<u32> = records.iter().map(|r| r.largest().min(cap)).collect();
    let predicted = match (strategy, &args.predictions, args.noise_mae) {
        // The oracle knows, whatever the others are told.
        (Strategy::Oracle | Strategy::Vanilla, _, _) => largest,
        (_, None, None) => {
            tracing::info!("{strategy}: no predictions are given, so the true largest lengths are used");
            largest
        }
        (_, Some(path), _) => {
            let ids: Vec<RequestId> = records.iter().map(|r| r.id.clone()).collect();
            predictions::from_file(path, &ids)?
        }
        (_, None, Some(mae)) => predictions::disturb(&largest, mae, cap, global.seed),
    };
    let request = |(record, predicted): (&LengthRecord, u32)| {
        Ok(SimulatedRequest {
            id: record.id.clone(),
            actual: actual_length(record, &args.actual)?,
            predicted,
        })
    };
    records.iter().zip(predicted).map(request).collect()
}
