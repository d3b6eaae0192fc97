//! `collect`: sample responses and keep their lengths.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::Args;
use lengthwise_core::{Decoder, SamplingParams};
use lengthwise_train::collect::{CollectConfig, CollectJob, CollectSummary, EndpointConfig, EndpointDecoder};
use lengthwise_train::files::read_instructions;

use crate::args::Global;
use crate::inputs::{CacheArgs, local_decoder};
use crate::interrupt::end_saying;
use crate::output::print_json;
use crate::parse;
use crate::progress::{Bar, rate};

/// More samples of one instruction than this are a slip of the finger; all of an instruction's are kept in memory.
const MOST_SAMPLES: i64 = 1000;

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
    #[arg(long, value_delimiter = ',', default_value = "0,0.3,0.5,0.7", value_parser = parse::not_negative::<f32>)]
    temperatures: Vec<f32>,
    /// Samples at each temperature above 0
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MOST_SAMPLES))]
    samples_per_temperature: u32,
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
    #[arg(long, default_value = "8")]
    concurrency: NonZeroUsize,
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
        dtype: None,
        kv_cache_dtype: None,
        temperatures: args.temperatures.clone(),
        top_p: SamplingParams::GREEDY.top_p,
        top_k: SamplingParams::GREEDY.top_k,
        samples_per_temperature: args.samples_per_temperature as usize,
        max_new_tokens: args.max_new_tokens,
        seed: global.seed,
        save_text: args.save_text,
    };
    let kept = args.output.display();
    end_saying(format!(
        "what is finished of {kept} is kept; the same command goes on from there"
    ))?;
    let job = |skip_too_long, config| CollectJob {
        instructions: &instructions,
        config,
        output: &args.output,
        skip_too_long,
    };
    let summary = match (&args.endpoint, &args.remote_model) {
        (Some(url), Some(model)) => {
            config.model = format!("{model} at {url}");
            let endpoint = EndpointConfig {
                api_key: std::env::var("OPENAI_API_KEY").ok().filter(|key| !key.is_empty()),
                concurrency: args.concurrency.get(),
                ..EndpointConfig::new(url, model)
            };
            collect_with_bar(job(true, &config), &mut EndpointDecoder::new(endpoint))?
        }
        _ => {
            let mut decoder = local_decoder(&global.open_model()?, None, args.slots, args.cache.engine())?;
            // As `generate` draws, whose lengths these are to be.
            config.top_p = decoder.model().sampling.top_p;
            config.top_k = decoder.model().sampling.top_k;
            let dtype = decoder.model().network.dtype();
            config.dtype = Some(dtype.as_str().to_owned());
            config.kv_cache_dtype = Some(args.cache.kv_cache_dtype.of_cache(dtype).as_str().to_owned());
            collect_with_bar(job(false, &config), &mut decoder)?
        }
    };
    let (written, left_out) = (summary.records.len(), summary.refused.len() + summary.too_long.len());
    if left_out > 0 {
        tracing::warn!(
            "{left_out} of {} instructions were left out: {} too long, {} refused",
            instructions.len(),
            summary.too_long.len(),
            summary.refused.len()
        );
    }
    tracing::info!("lengths of {written} instructions written to {}", args.output.display());
    match global.json {
        true => print_json(&serde_json::json!({"output": args.output, "instructions": written})),
        false => Ok(()),
    }
}

/// Collects under a progress bar.
pub fn collect_with_bar(job: CollectJob, decoder: &mut dyn Decoder) -> anyhow::Result<CollectSummary> {
    let mut bar = Bar::new("collect", job.instructions.len() as u64);
    let summary = job.run(decoder, &mut |p| {
        bar.set(p.done as u64, |elapsed| {
            format!("{:.0} tokens/s", rate(p.tokens, elapsed))
        });
    })?;
    bar.finish();
    Ok(summary)
}
