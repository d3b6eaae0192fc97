//! `pretrain`: make the bundled model.

use std::path::PathBuf;

use clap::Args;
use lengthwise_train::pretrain::{PretrainConfig, pretrain};

use crate::args::Global;
use crate::progress::{Bar, rate};

/// Flags of `pretrain`.
#[derive(Args)]
pub struct PretrainArgs {
    /// The model folder to write
    #[arg(long)]
    output: PathBuf,
    /// Optimiser steps
    #[arg(long, default_value_t = PretrainConfig::default().steps)]
    steps: usize,
    /// Tokens of a step's batch
    #[arg(long, default_value_t = PretrainConfig::default().batch_tokens)]
    batch_tokens: usize,
}

pub fn run(global: &Global, args: &PretrainArgs) -> anyhow::Result<()> {
    let config = PretrainConfig {
        seed: global.seed,
        steps: args.steps,
        batch_tokens: args.batch_tokens,
        ..PretrainConfig::default()
    };
    let mut bar = Bar::new("pretrain", config.steps as u64);
    let mut tokens = 0;
    pretrain(&config, &args.output, &mut |p| {
        tokens += p.tokens as u64;
        bar.set(p.step as u64, |elapsed| {
            format!("loss {:.3}, {:.0} tokens/s", p.loss, rate(tokens, elapsed))
        });
    })?;
    bar.finish();
    tracing::info!("model written to {}", args.output.display());
    Ok(())
}
