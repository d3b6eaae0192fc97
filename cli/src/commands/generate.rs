//! `generate`: answer every request of a file.

mod settings;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use lengthwise_core::{DecodeError, FinishReason, LengthEstimate, Prompt, Request, RequestId, SamplingParams};
use lengthwise_decoder::{Controls, LocalDecoder, PredictedRequest, Prober, SequenceOutput, run_controlled};
use lengthwise_scheduler::{Planning, ScheduleConfig, Strategy, StrategyReport, StrategyStats};
use lengthwise_train::files::{Answer, InstructionRecord, Journal, answer_line, read_instructions};

use crate::args::{Global, QuantizeArgs};
use crate::cost::cost_model;
use crate::history::History;
use crate::in_passes::{self, Asked, InPasses};
use crate::inputs::{CacheArgs, ScheduleArgs, local_decoder};
use crate::interrupt::Interrupt;
use crate::kept::Marks;
use crate::output::print_json;
use crate::parse::{not_negative, top_p};
use crate::predictions::{
    CHUNK, Distributions, PredictionArgs, ask, distributions, engine_beside, from_file, predictor_for, scheduled_length,
};
use crate::progress::{Bar, rate};
use settings::settings;

/// Flags of `generate`.
#[derive(Args)]
pub struct GenerateArgs {
    /// Requests: JSONL, an Alpaca array, FastChat conversations or an OpenAI batch file
    #[arg(long)]
    input: PathBuf,
    /// Where the answers go, in the order of the input; a run that was stopped goes on where it was
    #[arg(long)]
    output: PathBuf,
    /// vanilla, po, seqsch, oracle or continuous
    #[arg(long, default_value = "continuous")]
    strategy: Strategy,
    #[command(flatten)]
    schedule: ScheduleArgs,
    #[command(flatten)]
    predictions: PredictionArgs,
    /// Sampling temperature; 0 takes the most likely token [default: that of the model's generation_config.json if it
    /// says do_sample, else 0]
    #[arg(long, value_parser = not_negative::<f32>)]
    temperature: Option<f32>,
    /// Draw only from the most likely tokens that together have this probability [default: likewise, else 1]
    #[arg(long, value_parser = top_p)]
    top_p: Option<f32>,
    /// Draw only from this many most likely tokens; 0: all [default: likewise, else 0]
    #[arg(long)]
    top_k: Option<u32>,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    weights: QuantizeArgs,
}

pub fn run(global: &Global, args: &GenerateArgs) -> anyhow::Result<()> {
    let records = read_instructions(&args.input)?;
    let (mut journal, finished) = Journal::open(&args.output, &settings(global, args, &records)?)?;
    let marks = Marks::of(&records);
    let mut lines = marks.answers(&finished, journal.path())?;
    let waiting: Vec<&InstructionRecord> = records.iter().filter(|r| !lines.contains_key(&r.id)).collect();
    let began = Instant::now();
    let mut stats = StrategyStats::default();
    let mut config = schedule(args, None)?;
    if !waiting.is_empty() {
        let interrupt = Interrupt::watch()?;
        let mut decoder = local_decoder(
            &global.open_quantized(args.weights)?,
            None,
            args.schedule.batch_size,
            engine_beside(args.cache, &[args.strategy], &args.predictions),
        )?;
        let (requests, distributions) = requests(global, args, &waiting, &decoder, &interrupt)?;
        if args.schedule.wants_cost(&[args.strategy]) && !interrupt.is_asked() {
            let model = decoder.model().clone();
            let cost = cost_model(&model, args.cache.engine(), Some(decoder.engine()))?;
            let history = History {
                path: args.schedule.history.as_deref(),
                actual: "t0.0",
                noise: None,
                divide_lengths: 1,
            };
            let planning = history.planning(cost, distributions, args.schedule.max_new_tokens, global.seed)?;
            config = schedule(args, Some(&planning))?;
        }
        let asked = waiting.iter().map(|r| (&r.id, Asked::Prompt(&r.prompt)));
        let (cap, admit) = (args.schedule.max_new_tokens, args.predictions.admit_quantile);
        let in_passes = in_passes::folder(&args.predictions, &args.schedule, args.strategy)
            .map(|folder| InPasses::open(decoder.model(), folder, asked, cap, admit))
            .transpose()?;
        let mut keep = |id, line: String| {
            let kept = marks.line(&id, &line).map_err(DecodeError::sink)?;
            journal.push(&kept).map_err(DecodeError::sink)?;
            lines.insert(id, line);
            Ok(())
        };
        let decoding = Decoding {
            config: &config,
            records: &waiting,
            in_passes: in_passes.as_ref(),
            interrupt: &interrupt,
        };
        stats = decoding.run(requests, &mut decoder, &mut keep)?;
        if interrupt.is_asked() && lines.len() < records.len() {
            return Err(stopped(lines.len(), records.len(), &args.output));
        }
    }
    let text = records.iter().map(|r| {
        Ok(lines
            .get(&r.id)
            .with_context(|| format!("request {} was lost", r.id))?
            .clone()
            + "\n")
    });
    journal.finish(&text.collect::<anyhow::Result<String>>()?)?;
    let row = stats.row(&config, Some(began.elapsed().as_secs_f64()));
    tracing::info!("{} answers written to {}", records.len(), args.output.display());
    match global.json {
        true => print_json(&StrategyReport { strategies: vec![row] }),
        false => Ok(()),
    }
}

/// What is said of a run that was asked to end before it was done.
fn stopped(done: usize, of: usize, output: &Path) -> anyhow::Error {
    let output = output.display();
    anyhow!("stopped: {done} of {of} answers for {output} are kept; the same command goes on from there")
}

/// Tokenised requests with the lengths that they are scheduled by, and the largest length expected of each; and the
/// predicted distributions.
fn requests(
    global: &Global,
    args: &GenerateArgs,
    records: &[&InstructionRecord],
    decoder: &LocalDecoder,
    interrupt: &Interrupt,
) -> anyhow::Result<(Vec<(PredictedRequest, u32)>, Distributions)> {
    let cap = args.schedule.max_new_tokens;
    let defaults = decoder.model().sampling;
    let request = |record: &&InstructionRecord| {
        let body = record.batch.clone().unwrap_or_default();
        let request = Request {
            id: record.id.clone(),
            prompt: record.prompt.clone(),
            max_new_tokens: body.max_tokens.unwrap_or(cap).min(cap),
            sampling: SamplingParams {
                temperature: body.temperature.or(args.temperature).unwrap_or(defaults.temperature),
                top_p: body.top_p.or(args.top_p).unwrap_or(defaults.top_p),
                top_k: args.top_k.unwrap_or(defaults.top_k),
                seed: body.seed.unwrap_or(global.seed),
            },
        };
        decoder.tokenize(&request)
    };
    let longer = |r: &&InstructionRecord| {
        r.batch
            .as_ref()
            .and_then(|body| body.max_tokens)
            .is_some_and(|n| n > cap)
    };
    let beyond = records.iter().copied().filter(longer).count();
    if beyond > 0 {
        tracing::warn!("{beyond} requests ask for more than --max-new-tokens {cap}: their answers end there");
    }
    // Every request is checked before the first is predicted or decoded.
    let sequences = records.iter().map(request).collect::<Result<Vec<_>, _>>()?;
    let predictor = match in_passes::folder(&args.predictions, &args.schedule, args.strategy) {
        // By the cap, until the passes have told more.
        Some(_) => None,
        None => predictor_for(args.strategy, &args.predictions, decoder.model(), cap)?,
    };
    let estimates: Vec<LengthEstimate> = match (predictor, &args.predictions.predictions) {
        (Some(mut predictor), _) => {
            let mut estimates = Vec::with_capacity(records.len());
            // A run that was asked to end needs no more of them.
            for chunk in records.chunks(CHUNK).take_while(|_| !interrupt.is_asked()) {
                let prompts: Vec<Prompt> = chunk.iter().map(|r| r.prompt.clone()).collect();
                let ids = chunk.iter().map(|r| &r.id);
                estimates.extend(ask(predictor.as_mut(), &prompts, ids, cap)?);
            }
            estimates.resize(records.len(), LengthEstimate::of(cap));
            estimates
        }
        (None, Some(path)) => {
            let ids: Vec<RequestId> = records.iter().map(|r| r.id.clone()).collect();
            from_file(path, &ids)?
        }
        (None, None) => vec![LengthEstimate::of(cap); records.len()],
    };
    let distributions = distributions(records.iter().map(|r| &r.id).zip(&estimates));
    let both = sequences.into_iter().zip(estimates).map(|(request, estimate)| {
        let predicted = scheduled_length(&estimate, args.strategy, args.predictions.admit_quantile);
        (PredictedRequest { request, predicted }, estimate.max_tokens)
    });
    Ok((both.collect(), distributions))
}

/// The one schedule that the flags ask for.
fn schedule(args: &GenerateArgs, planning: Option<&Arc<Planning>>) -> anyhow::Result<ScheduleConfig> {
    match args.schedule.configs(args.strategy, planning).as_slice() {
        [config] => Ok(config.clone()),
        _ => bail!("generate runs one schedule: give --planner one name"),
    }
}

/// Requests on their way to lines of the output.
struct Decoding<'a> {
    config: &'a ScheduleConfig,
    records: &'a [&'a InstructionRecord],
    /// Predicts them meanwhile, where they have not been predicted before.
    in_passes: Option<&'a InPasses<'a>>,
    interrupt: &'a Interrupt,
}

impl Decoding<'_> {
    /// Decodes the requests, each with the largest length expected of it, and hands over each answer as a line.
    fn run(
        &self,
        requests: Vec<(PredictedRequest, u32)>,
        decoder: &mut LocalDecoder,
        on_line: &mut dyn FnMut(RequestId, String) -> Result<(), DecodeError>,
    ) -> anyhow::Result<StrategyStats> {
        let by_id: HashMap<RequestId, (&InstructionRecord, usize, u32)> = self
            .records
            .iter()
            .zip(&requests)
            .map(|(record, (r, largest))| (record.id.clone(), (*record, r.request.prompt.len(), *largest)))
            .collect();
        let predicts = self.config.strategy != Strategy::Vanilla;
        let model = decoder.model().clone();
        let requests: Vec<PredictedRequest> = requests.into_iter().map(|(request, _)| request).collect();
        let mut bar = Bar::new("generate", requests.len() as u64);
        let (mut done, mut tokens) = (0, 0);
        let mut on_output = |output: SequenceOutput| {
            if output.finish == FinishReason::Cancelled {
                return Ok(());
            }
            (done, tokens) = (done + 1, tokens + output.tokens.len() as u64);
            bar.set(done, |elapsed| format!("{:.0} tokens/s", rate(tokens, elapsed)));
            let Some(&(record, prompt_tokens, largest)) = by_id.get(&output.id) else {
                return Ok(());
            };
            let id = output.id.clone();
            let response = LocalDecoder::response_of(&model, output)?;
            let predicted = match self.in_passes {
                Some(in_passes) => in_passes.largest(&id),
                None => predicts.then_some(largest),
            };
            let answer = Answer::new(response, predicted);
            on_line(id, answer_line(&answer, record, prompt_tokens).trim_end().to_owned())
        };
        let controls = Controls {
            cancellation: Some(&self.interrupt.cancellation),
            prober: self.in_passes.map(|in_passes| in_passes as &dyn Prober),
        };
        let stats = run_controlled(decoder.engine(), requests, self.config, controls, &mut on_output);
        bar.finish();
        let stats = stats?;
        if let Some(in_passes) = self.in_passes {
            in_passes.report(stats.probe_tokens);
        }
        Ok(stats)
    }
}
