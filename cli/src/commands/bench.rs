//! `bench`: strategies timed on the same requests.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use lengthwise_core::{LengthEstimate, LengthPredictor, Prompt, Request, RequestId, SamplingParams};
use lengthwise_decoder::{LocalDecoder, PredictedRequest, SequenceRequest, run_strategy};
use lengthwise_model::LoadedModel;
use lengthwise_scheduler::{CostModel, Planning, ScheduleConfig, Strategy, StrategyReport, StrategyRow};
use lengthwise_train::files::{InstructionRecord, LengthRecord, read_instructions, read_lengths, write_atomic};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::args::{Global, QuantizeArgs};
use crate::cost::cost_model;
use crate::history::History;
use crate::inputs::{CacheArgs, ScheduleArgs, actual_length, largest_lengths, local_decoder};
use crate::output::{print, print_json};
use crate::predictions::{
    Distributions, PredictionArgs, ask, distributions, disturb, from_file, look_up, numbers, parse_noise,
    predictor_for, scheduled_length,
};
use crate::progress::{Bar, rate};
use crate::table::Table;

/// Flags of `bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// Instructions to answer [with --replay: prompts of random tokens]
    #[arg(long, required_unless_present = "replay")]
    input: Option<PathBuf>,
    /// vanilla, po, seqsch, oracle or continuous; several with commas
    #[arg(long, value_delimiter = ',', default_value = "vanilla,oracle,continuous")]
    strategy: Vec<Strategy>,
    #[command(flatten)]
    schedule: ScheduleArgs,
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

/// The requests of a run.
struct Workload {
    sequences: Vec<SequenceRequest>,
    /// Texts for predictors; none where prompts are random tokens.
    prompts: Option<Vec<Prompt>>,
    /// The true largest lengths, where they are known.
    largest: Option<Vec<u32>>,
}

pub fn run(global: &Global, args: &BenchArgs) -> anyhow::Result<()> {
    let model = global.open_quantized(args.weights)?;
    let mut decoder = local_decoder(&model, None, args.schedule.batch_size, args.cache.engine())?;
    let workload = workload(global, args, &decoder)?;
    if let Some(path) = &args.export_workload {
        write_atomic(path, &workload.sequences.iter().map(exported).collect::<String>())?;
    }
    warm_up(&mut decoder, &workload)?;
    let cost = match args.schedule.wants_cost(&args.strategy) {
        true => Some(cost_model(&model, args.cache.engine())?),
        false => None,
    };
    let mut report = StrategyReport::default();
    for &strategy in &args.strategy {
        let mut predictor = predictor(args, &model, &workload, strategy)?;
        let began = Instant::now();
        let estimates = predict(global, args, predictor.as_mut(), &workload, strategy)?;
        let seconds = began.elapsed().as_secs_f64();
        // Its cache is not kept beside the decoder's.
        drop(predictor);
        let length = |e: &LengthEstimate| scheduled_length(e, strategy, args.predictions.admit_quantile);
        let predicted: Vec<u32> = estimates.iter().map(length).collect();
        // Only strategies that sort are planned; the others need not read the history.
        let sorting = cost.filter(|_| strategy.sorts());
        let ids = workload.sequences.iter().map(|s| &s.id);
        let own = distributions(ids.zip(&estimates));
        let planning = sorting.map(|cost| planning(global, args, cost, own, strategy));
        let planning = planning.transpose()?;
        for config in args.schedule.configs(strategy, planning.as_ref()) {
            let sequences = &workload.sequences;
            let row = time_strategy(&mut decoder, sequences, &predicted, &config, seconds)?;
            report.strategies.push(row);
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

fn workload(global: &Global, args: &BenchArgs, decoder: &LocalDecoder) -> anyhow::Result<Workload> {
    let num = args.num.map_or(usize::MAX, NonZeroUsize::get);
    let mut records = args
        .replay
        .as_deref()
        .map(read_lengths)
        .transpose()?
        .unwrap_or_default();
    for sample in records.iter_mut().flat_map(|r| &mut r.samples) {
        sample.tokens = sample.tokens.div_ceil(args.divide_lengths);
    }
    match &args.input {
        Some(path) => {
            let mut instructions = read_instructions(path)?;
            instructions.truncate(num);
            from_instructions(global, args, decoder, &instructions, &records)
        }
        None => {
            records.truncate(num);
            random_prompts(global, args, decoder.model(), &records)
        }
    }
}

/// The instructions' prompts; lengths by id where they are replayed.
fn from_instructions(
    global: &Global,
    args: &BenchArgs,
    decoder: &LocalDecoder,
    instructions: &[InstructionRecord],
    replay: &[LengthRecord],
) -> anyhow::Result<Workload> {
    let cap = args.schedule.max_new_tokens;
    let recorded: HashMap<&RequestId, &LengthRecord> = replay.iter().map(|r| (&r.id, r)).collect();
    let sequence = |record: &InstructionRecord| {
        let request = Request {
            id: record.id.clone(),
            prompt: record.prompt.clone(),
            max_new_tokens: cap,
            sampling: SamplingParams {
                seed: global.seed,
                ..SamplingParams::GREEDY
            },
        };
        let mut sequence = decoder.tokenize(&request)?;
        if args.replay.is_some() {
            let lengths = recorded
                .get(&record.id)
                .with_context(|| format!("no recorded length for {}", record.id))?;
            sequence.replay_tokens = Some(actual_length(lengths, &args.actual)?.clamp(1, cap));
        }
        Ok(sequence)
    };
    let source = args.lengths.as_deref().or(args.replay.as_deref());
    let ids: Vec<RequestId> = instructions.iter().map(|r| r.id.clone()).collect();
    let table = |path: &Path| look_up(&largest_lengths(path, cap)?, &ids, path);
    Ok(Workload {
        sequences: instructions.iter().map(sequence).collect::<anyhow::Result<_>>()?,
        prompts: Some(instructions.iter().map(|r| r.prompt.clone()).collect()),
        largest: source.map(table).transpose()?,
    })
}

/// A request as another engine is given it.
fn exported(sequence: &SequenceRequest) -> String {
    let value = serde_json::json!({
        "id": sequence.id.as_str(),
        "prompt": sequence.prompt,
        "tokens": sequence.replay_tokens,
    });
    format!("{value}\n")
}

/// Prompts of random tokens, as long as real ones: what they say does not matter where lengths are replayed.
fn random_prompts(
    global: &Global,
    args: &BenchArgs,
    model: &LoadedModel,
    replay: &[LengthRecord],
) -> anyhow::Result<Workload> {
    let &[shortest, longest] = args.prompt_tokens.as_slice() else {
        bail!("--prompt-tokens takes two numbers")
    };
    if shortest == 0 || shortest > longest {
        bail!("--prompt-tokens are {shortest} and {longest}: the first must be at least 1 and not above the second");
    }
    let cap = args.schedule.max_new_tokens;
    let mut rng = ChaCha8Rng::seed_from_u64(global.seed);
    let vocab = model.network.config().vocab_size as u32;
    let mut sequence = |record: &LengthRecord| {
        let tokens = rng.random_range(shortest..=longest);
        Ok(SequenceRequest {
            id: record.id.clone(),
            prompt: (0..tokens).map(|_| rng.random_range(0..vocab)).collect(),
            max_new_tokens: cap,
            sampling: SamplingParams::GREEDY,
            replay_tokens: Some(actual_length(record, &args.actual)?.clamp(1, cap)),
        })
    };
    Ok(Workload {
        sequences: replay.iter().map(&mut sequence).collect::<anyhow::Result<_>>()?,
        prompts: None,
        largest: Some(replay.iter().map(|r| r.largest().min(cap)).collect()),
    })
}

/// The predictor that one strategy asks; none where its predictions are known. Opened before the clock runs.
fn predictor(
    args: &BenchArgs,
    model: &LoadedModel,
    workload: &Workload,
    strategy: Strategy,
) -> anyhow::Result<Option<Box<dyn LengthPredictor>>> {
    let source = &args.predictions;
    let asks = source.predictor.is_some() || source.adapter.is_some() || strategy == Strategy::Po;
    let known = match strategy {
        Strategy::Vanilla => true,
        Strategy::Oracle if workload.largest.is_some() => true,
        Strategy::SeqSch | Strategy::Continuous if args.noise_mae.is_some() => true,
        _ => source.predictions.is_some() || !asks && args.replay.is_some(),
    };
    match known || workload.prompts.is_none() {
        true => Ok(None),
        false => predictor_for(strategy, source, model, args.schedule.max_new_tokens),
    }
}

/// The predictions of one strategy; the time they take counts as its own.
fn predict(
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
        return ask(predictor.as_mut(), prompts, cap);
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
    let asks = args.predictions.predictor.is_some() || args.predictions.adapter.is_some() || strategy == Strategy::Po;
    match asks || args.replay.is_none() {
        // Prompts of random tokens say nothing that could be asked about.
        true => Ok(at_cap()),
        false => Ok(numbers(known.cloned().context("--replay has no lengths")?)),
    }
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

/// Times one strategy; `seconds` were spent on its predictions before.
pub fn time_strategy(
    decoder: &mut LocalDecoder,
    sequences: &[SequenceRequest],
    predicted: &[u32],
    config: &ScheduleConfig,
    seconds: f64,
) -> anyhow::Result<StrategyRow> {
    let both = sequences.iter().zip(predicted);
    let requests = both
        .map(|(request, &predicted)| PredictedRequest {
            request: request.clone(),
            predicted,
        })
        .collect();
    let mut bar = Bar::new(config.strategy.name(), sequences.len() as u64);
    let (mut done, mut tokens) = (0, 0);
    let began = Instant::now();
    let stats = run_strategy(decoder.engine(), requests, config, &mut |output| {
        (done, tokens) = (done + 1, tokens + output.tokens.len() as u64);
        bar.set(done, |elapsed| format!("{:.0} tokens/s", rate(tokens, elapsed)));
        Ok(())
    })?;
    let seconds = seconds + began.elapsed().as_secs_f64();
    bar.finish();
    Ok(stats.row(config, Some(seconds)))
}
