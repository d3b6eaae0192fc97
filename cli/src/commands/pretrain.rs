//! `pretrain`: make the bundled model.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use lengthwise_train::pretrain::{PretrainConfig, pretrain};

use crate::args::Global;
use crate::interrupt::end_saying;
use crate::output::print_json;
use crate::parse;
use crate::progress::{Bar, rate};

/// Flags of `pretrain`.
#[derive(Args)]
pub struct PretrainArgs {
    /// The model folder to write, missing or empty
    #[arg(long)]
    output: PathBuf,
    /// Optimiser steps
    #[arg(long, default_value_t = at_least_one(PretrainConfig::default().steps))]
    steps: NonZeroUsize,
    /// Tokens of a step's batch
    #[arg(long, default_value_t = at_least_one(PretrainConfig::default().batch_tokens), value_parser = parse::up_to(1 << 22))]
    batch_tokens: NonZeroUsize,
}

pub fn run(global: &Global, args: &PretrainArgs) -> anyhow::Result<()> {
    let config = PretrainConfig {
        seed: global.seed,
        steps: args.steps.get(),
        batch_tokens: args.batch_tokens.get(),
        ..PretrainConfig::default()
    };
    let mut bar = Bar::new("pretrain", config.steps as u64);
    let (began, mut tokens, mut loss) = (Instant::now(), 0, 0.0);
    end_saying("nothing of the model is kept; the same command begins anew".to_owned())?;
    pretrain(&config, &args.output, &mut |p| {
        tokens += p.tokens as u64;
        loss = p.loss;
        bar.set(p.step as u64, |elapsed| {
            format!("loss {:.3}, {:.0} tokens/s", p.loss, rate(tokens, elapsed))
        });
    })?;
    bar.finish();
    tracing::info!("model written to {}", args.output.display());
    match global.json {
        true => print_json(&serde_json::json!({
            "output": args.output, "steps": config.steps, "loss": loss, "tokens": tokens,
            "seconds": began.elapsed().as_secs_f64(),
        })),
        false => Ok(()),
    }
}

fn at_least_one(n: usize) -> NonZeroUsize {
    NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN)
}
