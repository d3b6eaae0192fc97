//! `predict`: one-off estimates.

use std::path::PathBuf;

use anyhow::bail;
use clap::Args;
use lengthwise_core::{LengthEstimate, LengthPredictor, Prompt};
use lengthwise_predictor::{Question, RemotePredictor};
use serde::Serialize;

use crate::args::{Global, QuantizeArgs};
use crate::output::{print, print_json};
use crate::predictions::{ask_each, local_predictor};
use crate::table::Table;

/// Flags of `predict`.
#[derive(Args)]
pub struct PredictArgs {
    /// Instructions
    #[arg(required = true)]
    text: Vec<String>,
    /// A length adapter; without one the untuned model is asked (PiA)
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// A running predictor, http://host:port
    #[arg(long, conflicts_with = "adapter")]
    predictor: Option<String>,
    /// Cap on an estimate, in tokens
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    #[command(flatten)]
    weights: QuantizeArgs,
}

pub fn run(global: &Global, args: &PredictArgs) -> anyhow::Result<()> {
    let cap = args.max_new_tokens;
    let mut predictor: Box<dyn LengthPredictor> = match &args.predictor {
        Some(url) => Box::new(RemotePredictor::connect(url)?),
        None => {
            let question = if args.adapter.is_some() {
                Question::Length
            } else {
                Question::Pia
            };
            local_predictor(
                &global.open_quantized(args.weights)?,
                args.adapter.as_deref(),
                question,
                cap,
            )?
        }
    };
    let prompts: Vec<Prompt> = args.text.iter().cloned().map(Prompt::Instruction).collect();
    let results = ask_each(predictor.as_mut(), &prompts, cap)?;
    let (mut predictions, mut refused) = (Vec::new(), Vec::new());
    for (index, result) in results.into_iter().enumerate() {
        match result {
            Ok(estimate) => predictions.push(Prediction { index, estimate }),
            Err(err) => refused.push(format!("text {} of {}: {err}", index + 1, args.text.len())),
        }
    }
    match global.json {
        true => print_json(&serde_json::json!({ "predictions": predictions }))?,
        false if predictions.is_empty() => {}
        false => print(&table(&args.text, &predictions).text())?,
    }
    match refused.is_empty() {
        true => Ok(()),
        false => bail!("{}", refused.join("; ")),
    }
}

/// The estimate of one text.
#[derive(Serialize)]
struct Prediction {
    /// The text's place on the command line, from 0.
    index: usize,
    #[serde(flatten)]
    estimate: LengthEstimate,
}

fn table(texts: &[String], predictions: &[Prediction]) -> Table {
    let row = |Prediction { index, estimate }: &Prediction| {
        let parsed = if estimate.parsed { "yes" } else { "no" };
        vec![
            texts[*index].replace('\n', " "),
            estimate.max_tokens.to_string(),
            interval(estimate),
            parsed.to_owned(),
        ]
    };
    Table {
        header: vec!["instruction", "max tokens", "5 to 95 %", "parsed"],
        rows: predictions.iter().map(row).collect(),
    }
}

/// The middle 90 % of a predicted distribution.
fn interval(estimate: &LengthEstimate) -> String {
    match estimate.quantiles.is_empty() {
        true => "–".to_owned(),
        false => format!("{} to {}", estimate.quantile(0.05), estimate.quantile(0.95)),
    }
}
