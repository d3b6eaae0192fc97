//! `predict`: one-off estimates.

use std::path::PathBuf;

use clap::Args;
use lengthwise_core::{LengthEstimate, LengthPredictor, Prompt};
use lengthwise_predictor::{Question, RemotePredictor};

use crate::args::{Global, QuantizeArgs};
use crate::output::{print, print_json};
use crate::predictions::{ask, local_predictor};
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
    let estimates = ask(predictor.as_mut(), &prompts, cap)?;
    if global.json {
        return print_json(&serde_json::json!({ "predictions": estimates }));
    }
    let mut table = Table {
        header: vec!["instruction", "max tokens", "5 to 95 %", "parsed"],
        rows: Vec::new(),
    };
    for (text, estimate) in args.text.iter().zip(&estimates) {
        let parsed = if estimate.parsed { "yes" } else { "no" };
        table.rows.push(vec![
            text.replace('\n', " "),
            estimate.max_tokens.to_string(),
            interval(estimate),
            parsed.to_owned(),
        ]);
    }
    print(&table.text())
}

/// The middle 90 % of a predicted distribution.
fn interval(estimate: &LengthEstimate) -> String {
    match estimate.quantiles.is_empty() {
        true => "–".to_owned(),
        false => format!("{} to {}", estimate.quantile(0.05), estimate.quantile(0.95)),
    }
}
