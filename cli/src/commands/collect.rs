//! `collect`: sample responses and keep their lengths.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::Args;
use lengthwise_core::{Decoder, SamplingParams};
use lengthwise_train::collect::{CollectConfig, EndpointConfig, EndpointDecoder, collect};
use lengthwise_train::files::{InstructionRecord, LengthRecord, read_instructions};

use crate::args::Global;
use crate::inputs::{CacheArgs, local_decoder};
use crate::output::print_json;
use crate::progress::{Bar, rate};

/// Flags of `collect`.
#[derive(Args)]
pub struct CollectArgs {
    /// Instructions: JSONL, an Alpaca array, FastChat conversations or an OpenAI batch file
    #[arg(long)]
    input: PathBuf,
    /// Where the lengths go; a run that was stopped goes on where it was
    #[arg(long)]
    output: PathBuf,
    /// Temperatures to sample at, with commas; top_p and top_k are those of the model's generation_config.json if it says
    /// do_sample
    #[arg(long, value_delimiter = ',', default_value = "0,0.3,0.5,0.7")]
    temperatures: Vec<f32>,
    /// Samples at each temperature above 0
    #[arg(long, default_value_t = 1)]
    samples_per_temperature: usize,
    /// Cap on every response, in tokens
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// Keep the responses' texts too
    #[arg(long)]
    save_text: bool,
    /// Sample from an OpenAI-compatible server instead of the local model (key: OPENAI_API_KEY)
    #[arg(long, requires = "remote_model")]
    endpoint: Option<String>,
    /// The model's name on that server
    #[arg(long, requires = "endpoint")]
    remote_model: Option<String>,
    /// Requests under way at once on that server
    #[arg(long, default_value_t = 8)]
    concurrency: usize,
    /// Sequences that the local model decodes at once
    #[arg(long, default_value = "64")]
    slots: NonZeroUsize,
    #[command(flatten)]
    cache: CacheArgs,
}

pub fn run(global: &Global, args: &CollectArgs) -> anyhow::Result<()> {
    let instructions = read_instructions(&args.input)?;
    let mut config = CollectConfig {
        model: global.model.clone(),
        temperatures: args.temperatures.clone(),
        top_p: SamplingParams::GREEDY.top_p,
        top_k: SamplingParams::GREEDY.top_k,
        samples_per_temperature: args.samples_per_temperature,
        max_new_tokens: args.max_new_tokens,
        seed: global.seed,
        save_text: args.save_text,
    };
    let records = match (&args.endpoint, &args.remote_model) {
        (Some(url), Some(model)) => {
            config.model = format!("{model} at {url}");
            let endpoint = EndpointConfig {
                api_key: std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.is_empty()),
                concurrency: args.concurrency.max(1),
                ..EndpointConfig::new(url, model)
            };
            collect_with_bar(
                &instructions,
                &mut EndpointDecoder::new(endpoint),
                &config,
                &args.output,
            )?
        }
        _ => {
            let mut decoder = local_decoder(&global.open_model()?, None, args.slots, args.cache.engine())?;
            // As `generate` draws, whose lengths these are to be.
            config.top_p = decoder.model().sampling.top_p;
            config.top_k = decoder.model().sampling.top_k;
            collect_with_bar(&instructions, &mut decoder, &config, &args.output)?
        }
    };
    tracing::info!(
        "lengths of {} instructions written to {}",
        records.len(),
        args.output.display()
    );
    match global.json {
        true => print_json(&serde_json::json!({"output": args.output, "instructions": records.len()})),
        false => Ok(()),
    }
}

/// Collects under a progress bar.
pub fn collect_with_bar(
    instructions: &[InstructionRecord],
    decoder: &mut dyn Decoder,
    config: &CollectConfig,
    output: &Path,
) -> anyhow::Result<Vec<LengthRecord>> {
    let mut bar = Bar::new("collect", instructions.len() as u64);
    let records = collect(instructions, decoder, config, output, &mut |p| {
        bar.set(p.done as u64, |elapsed| {
            format!("{:.0} tokens/s", rate(p.tokens, elapsed))
        });
    })?;
    bar.finish();
    Ok(records)
}
