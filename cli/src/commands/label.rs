//! `label`: lengths to pairs.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use lengthwise_train::files::{PairFormat, pair_line, read_lengths, write_atomic};
use lengthwise_train::{LabelTarget, label};

use crate::args::Global;
use crate::error::UsageError;
use crate::output::print_json;

/// Flags of `label`.
#[derive(Args)]
pub struct LabelArgs {
    /// Sampled lengths, lengths.jsonl
    #[arg(long)]
    input: PathBuf,
    /// Where the pairs go
    #[arg(long)]
    output: PathBuf,
    /// Which length is predicted: max, mean, median, or t0.0 for the sample at a temperature
    #[arg(long, default_value = "max")]
    target: LabelTarget,
    /// Labels are rounded up to a multiple of this, in tokens
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    bucket: u32,
    /// pairs, or chat for PEFT's trainers, axolotl and LLaMA-Factory
    #[arg(long, default_value = "pairs")]
    format: PairFormat,
}

pub fn run(global: &Global, args: &LabelArgs) -> anyhow::Result<()> {
    if is_same_file(&args.input, &args.output) {
        let path = args.output.display();
        return Err(UsageError(format!(
            "{path} is the input, which the pairs would replace: choose another --output"
        ))
        .into());
    }
    let pairs = label(&read_lengths(&args.input)?, args.target, args.bucket)
        .with_context(|| args.input.display().to_string())?;
    let text: String = pairs.iter().map(|pair| pair_line(pair, args.format)).collect();
    write_atomic(&args.output, &text)?;
    tracing::info!("{} pairs written to {}", pairs.len(), args.output.display());
    match global.json {
        true => print_json(&serde_json::json!({"output": args.output, "pairs": pairs.len()})),
        false => Ok(()),
    }
}

/// Whether both names lead to one file that is there.
fn is_same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}
