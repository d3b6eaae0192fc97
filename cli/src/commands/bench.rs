//! `bench`: strategies timed on the same requests.

mod predict;
mod workload;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use clap::builder::ArgPredicate;
use lengthwise_core::LengthEstimate;
use lengthwise_decoder::{
    Controls, LocalDecoder, PredictedRequest, Prober, SequenceRequest, run_controlled, run_strategy,
};
use lengthwise_model::LoadedModel;
use lengthwise_scheduler::{CostModel, Planning, ScheduleConfig, Strategy, StrategyReport, StrategyRow};
use lengthwise_train::files::write_atomic;

use crate::args::{Global, QuantizeArgs};
use crate::cost::cost_model;
use crate::history::History;
use crate::in_passes::{Asked, InPasses};
use crate::inputs::{CacheArgs, ScheduleArgs, local_decoder};
use crate::output::{print, print_json};
use crate::predictions::{Distributions, PredictionArgs, distributions, engine_beside, parse_noise, scheduled_length};
use crate::progress::{Bar, rate};
use crate::slots;
use crate::sweep::SweepArgs;
use crate::table::Table;
use predict::{in_passes, predict, predictor};
use workload::{Workload, check_sizes, exported, workload};

/// Flags of `bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// Instructions to answer [with --replay: prompts of random tokens]
    #[arg(long, required_unless_present = "replay")]
    input: Option<PathBuf>,
    /// vanilla, po, seqsch, oracle or continuous; several with commas [default: vanilla and continuous, with known lengths
    /// oracle too]
    #[arg(
        long, value_delimiter = ',', hide_default_value = true, default_value = "vanilla,continuous",
        default_value_ifs = [
            ("replay", ArgPredicate::IsPresent, "vanilla,oracle,continuous"),
            ("lengths", ArgPredicate::IsPresent, "vanilla,oracle,continuous"),
            ("predictions", ArgPredicate::IsPresent, "vanilla,oracle,continuous"),
        ]
    )]
    strategy: Vec<Strategy>,
    #[command(flatten)]
    schedule: ScheduleArgs,
    #[command(flatten)]
    sweep: SweepArgs,
    #[command(flatten)]
    predictions: PredictionArgs,
    /// Only the first N requests
    #[arg(long)]
    num: Option<NonZeroUsize>,
    /// Sampled lengths of the input, for the oracle
    #[arg(long)]
    lengths: Option<PathBuf>,
    /// End each response at its recorded length, so that weights without a useful end-of-sequence can be timed
    #[arg(long)]
    replay: Option<PathBuf>,
    /// Which recorded sample is replayed: t0.0, t0.3, …
    #[arg(long, default_value = "t0.0")]
    actual: String,
    /// Predictions: the true largest lengths, disturbed to this mean absolute error
    #[arg(long, value_parser = parse_noise)]
    noise_mae: Option<f64>,
    /// With --replay and no input: shortest and longest prompt, in tokens
    #[arg(long, num_args = 2, default_values_t = [32, 128])]
    prompt_tokens: Vec<usize>,
    /// With --replay: recorded lengths are divided by this
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    divide_lengths: u32,
    /// Write the requests as JSONL {"id", "prompt", "tokens"} (token ids; the replayed length), so that another engine
    /// can be timed on the very same
    #[arg(long, requires = "replay")]
    export_workload: Option<PathBuf>,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    weights: QuantizeArgs,
}

pub fn run(global: &Global, args: &BenchArgs) -> anyhow::Result<()> {
    let schedules = args.sweep.schedules(&args.schedule)?;
    let model = global.open_quantized(args.weights)?;
    let engine = engine_beside(args.cache, &args.strategy, &args.predictions);
    let mut decoder = local_decoder(&model, None, args.schedule.batch_size, engine)?;
    let workload = workload(global, args, &decoder)?;
    args.sweep.check(workload.sequences.len())?;
    predict::check(args, &workload)?;
    let sizes: Vec<usize> = args.sweep.batch_sizes.iter().map(|size| size.get()).collect();
    check_sizes(decoder.engine(), &workload.sequences, &sizes)?;
    if let Some(path) = &args.export_workload {
        write_atomic(path, workload.sequences.iter().map(exported).collect::<String>())?;
    }
    warm_up(&mut decoder, &workload)?;
    let bench = Bench {
        global,
        args,
        cost: match args.schedule.wants_cost(&args.strategy) {
            true => Some(cost_model(&model, args.cache.engine(), Some(decoder.engine()))?),
            false => None,
        },
        model,
        workload,
        schedules,
    };
    let mut report = StrategyReport::default();
    for &strategy in &args.strategy {
        report.strategies.extend(bench.strategy(&mut decoder, strategy)?);
    }
    // By batch size, and within one in the order asked for.
    report.strategies.sort_by_key(|row| row.batch_size);
    match global.json {
        true => print_json(&report),
        false => print(&(Table::strategies(&report.strategies).text() + &slots::timelines(&report.strategies))),
    }
}

/// What all strategies have in common.
struct Bench<'a> {
    global: &'a Global,
    args: &'a BenchArgs,
    model: LoadedModel,
    workload: Workload,
    cost: Option<CostModel>,
    /// One for every batch size.
    schedules: Vec<ScheduleArgs>,
}

impl Bench<'_> {
    /// A strategy at every batch size and by every planner; it predicts once, and each run's time counts that.
    fn strategy(&self, decoder: &mut LocalDecoder, strategy: Strategy) -> anyhow::Result<Vec<StrategyRow>> {
        let Self {
            global, args, workload, ..
        } = self;
        let mut predictor = predictor(args, &self.model, workload, strategy)?;
        let began = Instant::now();
        let estimates = predict(global, args, predictor.as_mut(), workload, strategy)?;
        let seconds = began.elapsed().as_secs_f64();
        // Its cache is not kept beside the decoder's.
        drop(predictor);
        let length = |e: &LengthEstimate| scheduled_length(e, strategy, args.predictions.admit_quantile);
        let predicted: Vec<u32> = estimates.iter().map(length).collect();
        // Only strategies that sort are planned; the others need not read the history.
        let sorting = self.cost.filter(|_| strategy.sorts());
        let ids = workload.sequences.iter().map(|s| &s.id);
        let own = distributions(ids.zip(&estimates));
        let planning = sorting.map(|cost| planning(global, args, cost, own, strategy));
        let planning = planning.transpose()?;
        let configs = self
            .schedules
            .iter()
            .flat_map(|s| s.configs(strategy, planning.as_ref()));
        let mut rows = Vec::new();
        for config in configs {
            if args.sweep.timeline {
                decoder.engine().record_timeline();
            }
            let in_passes = in_passes(args, strategy)
                .map(|folder| self.in_passes(folder))
                .transpose()?;
            let lengths = Lengths {
                predicted: &predicted,
                seconds,
                in_passes: in_passes.as_ref(),
            };
            let row = time_strategy(decoder, &workload.sequences, &lengths, &config)?;
            rows.push(StrategyRow {
                timeline: decoder.engine().take_timeline(),
                ..row
            });
        }
        Ok(rows)
    }

    /// The head that predicts in the passes of one run.
    fn in_passes(&self, folder: &Path) -> anyhow::Result<InPasses<'_>> {
        let Self { args, workload, .. } = self;
        let asked = workload.sequences.iter().enumerate().map(|(i, sequence)| {
            let prompt = workload.prompts.as_ref().map(|prompts| Asked::Prompt(&prompts[i]));
            (&sequence.id, prompt.unwrap_or(Asked::Tokens(&sequence.prompt)))
        });
        let (cap, admit) = (args.schedule.max_new_tokens, args.predictions.admit_quantile);
        InPasses::open(&self.model, folder, asked, cap, admit)
    }
}

/// What the planner goes by for one strategy: the oracle's predictions are not disturbed.
fn planning(
    global: &Global,
    args: &BenchArgs,
    cost: CostModel,
    distributions: Distributions,
    strategy: Strategy,
) -> anyhow::Result<Arc<Planning>> {
    let noise = args.noise_mae.filter(|_| strategy != Strategy::Oracle);
    let history = History {
        path: args.schedule.history.as_deref(),
        actual: &args.actual,
        noise,
        divide_lengths: args.divide_lengths,
    };
    history.planning(cost, distributions, args.schedule.max_new_tokens, global.seed)
}

/// A few requests, so that the first strategy does not pay for cold caches.
fn warm_up(decoder: &mut LocalDecoder, workload: &Workload) -> anyhow::Result<()> {
    let short = |s: &SequenceRequest| PredictedRequest {
        request: SequenceRequest {
            max_new_tokens: 8,
            replay_tokens: None,
            ..s.clone()
        },
        predicted: 8,
    };
    let requests = workload.sequences.iter().take(16).map(short).collect();
    run_strategy(
        decoder.engine(),
        requests,
        &ScheduleConfig::new(Strategy::Continuous),
        &mut |_| Ok(()),
    )?;
    Ok(())
}

/// What a timed strategy knows of the lengths.
pub struct Lengths<'a> {
    /// By which it schedules, one per request.
    pub predicted: &'a [u32],
    /// That were spent on them before.
    pub seconds: f64,
    /// What tells more of them on the way.
    pub in_passes: Option<&'a InPasses<'a>>,
}

/// Times one strategy, with what was spent on its predictions.
pub fn time_strategy(
    decoder: &mut LocalDecoder,
    sequences: &[SequenceRequest],
    lengths: &Lengths,
    config: &ScheduleConfig,
) -> anyhow::Result<StrategyRow> {
    let both = sequences.iter().zip(lengths.predicted);
    let requests = both
        .map(|(request, &predicted)| PredictedRequest {
            request: request.clone(),
            predicted,
        })
        .collect();
    let name = format!("{}, {} slots", config.strategy, config.batch_size);
    let mut bar = Bar::new(&name, sequences.len() as u64);
    let (mut done, mut tokens) = (0, 0);
    let began = Instant::now();
    let controls = Controls {
        prober: lengths.in_passes.map(|in_passes| in_passes as &dyn Prober),
        ..Controls::default()
    };
    let stats = run_controlled(decoder.engine(), requests, config, controls, &mut |output| {
        (done, tokens) = (done + 1, tokens + output.tokens.len() as u64);
        bar.set(done, |elapsed| format!("{:.0} tokens/s", rate(tokens, elapsed)));
        Ok(())
    })?;
    let seconds = lengths.seconds + began.elapsed().as_secs_f64();
    bar.finish();
    if let Some(in_passes) = lengths.in_passes {
        in_passes.report(stats.probe_tokens);
    }
    Ok(stats.row(config, Some(seconds)))
}
