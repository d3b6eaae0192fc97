//! `eval`: how good predictions are.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::bail;
use clap::{Args, ValueEnum};
use lengthwise_core::{LengthEstimate, LengthPredictor, Prompt};
use lengthwise_predictor::{ConstantPredictor, Question, RemotePredictor};
use lengthwise_train::files::{Pair, read_pairs};
use lengthwise_train::{PredictorReport, PredictorRow, coverage_90, evaluate};

use crate::args::{Global, QuantizeArgs};
use crate::output::{print, print_json};
use crate::predictions::{ask_each, local_predictor, predicted};
use crate::table::Table;

/// Flags of `eval`.
#[derive(Args)]
pub struct EvalArgs {
    /// Pairs with their sampled lengths, pairs.jsonl; the truth is the largest length
    #[arg(long)]
    data: PathBuf,
    /// A length adapter; several with commas
    #[arg(long, value_delimiter = ',')]
    adapter: Vec<PathBuf>,
    /// A running predictor, http://host:port
    #[arg(long)]
    predictor: Option<String>,
    /// Methods without training; several with commas
    #[arg(long, value_enum, value_delimiter = ',')]
    method: Vec<Method>,
    /// What `constant` says [default: the median of the data's lengths]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    constant: Option<u32>,
    /// Cap on a prediction, in tokens
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    #[command(flatten)]
    weights: QuantizeArgs,
}

/// Methods without training.
#[derive(Clone, Copy, ValueEnum)]
enum Method {
    /// The untuned model is asked before it answers
    Pia,
    /// Always the same length
    Constant,
}

pub fn run(global: &Global, args: &EvalArgs) -> anyhow::Result<()> {
    let pairs = read_pairs(&args.data)?;
    let cap = args.max_new_tokens;
    if args.adapter.is_empty() && args.predictor.is_none() && args.method.is_empty() {
        bail!("nothing to evaluate: give --adapter, --predictor or --method");
    }
    let mut report = PredictorReport::default();
    let mut add = |name: &str, predictor: &mut dyn LengthPredictor| -> anyhow::Result<()> {
        report.predictors.push(measure(name, predictor, &pairs, cap)?.0);
        Ok(())
    };
    for path in &args.adapter {
        let mut predictor = local_predictor(&global.open_quantized(args.weights)?, Some(path), Question::Length, cap)?;
        add(&path.display().to_string(), predictor.as_mut())?;
    }
    if let Some(url) = &args.predictor {
        add(url, &mut RemotePredictor::connect(url)?)?;
    }
    for method in &args.method {
        match method {
            Method::Pia => add(
                "pia",
                local_predictor(&global.open_quantized(args.weights)?, None, Question::Pia, cap)?.as_mut(),
            )?,
            Method::Constant => {
                let max_tokens = args.constant.unwrap_or_else(|| median(&pairs));
                add("constant", &mut ConstantPredictor { max_tokens })?;
            }
        }
    }
    match global.json {
        true => print_json(&report),
        false => print(&Table::predictors(&report.predictors).text()),
    }
}

/// The true length of a pair: the largest of its samples; its label where the samples are not kept.
pub fn truth(pair: &Pair) -> u32 {
    pair.lengths.iter().copied().max().unwrap_or(pair.label)
}

/// The median of the true lengths.
pub fn median(pairs: &[Pair]) -> u32 {
    let mut lengths: Vec<u32> = pairs.iter().map(truth).collect();
    lengths.sort_unstable();
    lengths.get(lengths.len() / 2).copied().unwrap_or(1)
}

/// Evaluates a predictor; returns its figures and every (predicted, true).
pub fn measure(
    name: &str,
    predictor: &mut dyn LengthPredictor,
    pairs: &[Pair],
    cap: u32,
) -> anyhow::Result<(PredictorRow, Vec<(u32, u32)>)> {
    let prompts: Vec<Prompt> = pairs.iter().map(Pair::prompt).collect();
    let began = Instant::now();
    let results = ask_each(predictor, &prompts, cap)?;
    let ms = began.elapsed().as_secs_f64() * 1000.0 / pairs.len().max(1) as f64;
    let refused = results.iter().filter(|result| result.is_err()).count();
    let or_cap = |(result, pair): (_, &Pair)| predicted(result, &pair.id, cap).unwrap_or(LengthEstimate::fallback(cap));
    let estimates: Vec<LengthEstimate> = results.into_iter().zip(pairs).map(or_cap).collect();
    let both: Vec<(u32, u32)> = estimates
        .iter()
        .zip(pairs)
        .map(|(e, pair)| (e.max_tokens, truth(pair)))
        .collect();
    let beyond = both.iter().filter(|(_, truth)| *truth > cap).count();
    if beyond > 0 {
        tracing::warn!(
            "{beyond} of {} lengths are beyond --max-new-tokens {cap}, which no prediction is",
            pairs.len()
        );
    }
    // A distribution says no more of what is beyond than that it is.
    let capped = |pair: &Pair| pair.lengths.iter().map(|&l| l.min(cap)).collect();
    let samples: Vec<Vec<u32>> = pairs.iter().map(capped).collect();
    let row = PredictorRow {
        coverage_90: coverage_90(&estimates, &samples),
        ms_per_prediction: Some(ms),
        ..evaluate(name, &both)
    };
    let unparsed = estimates.iter().filter(|e| !e.parsed).count() - refused;
    for (count, what) in [(unparsed, "answers were no number"), (refused, "prompts were refused")] {
        if count > 0 {
            tracing::info!("{name}: {count} of {} {what}; {cap} stands in", pairs.len());
        }
    }
    Ok((row, both))
}
