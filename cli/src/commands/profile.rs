//! `profile`: what prefill and a decode step cost on this device, and how near that is to what it can do.

mod products;

use std::num::NonZeroUsize;
use std::time::Instant;

use anyhow::bail;
use clap::Args;
use lengthwise_core::SamplingParams;
use lengthwise_decoder::{Engine, PredictedRequest, SequenceRequest, run_strategy};
use lengthwise_model::LoadedModel;
use lengthwise_scheduler::{ScheduleConfig, Strategy};
use serde::{Deserialize, Serialize};

use crate::args::{Global, QuantizeArgs};
use crate::inputs::CacheArgs;
use crate::output::{print, print_json};
use crate::progress::Bar;
use crate::table::Table;

/// Flags of `profile`.
#[derive(Args)]
pub struct ProfileArgs {
    /// Batch sizes, with commas; where there are some of 32 and more, and 16 steps, --planner cost plans by this profile
    /// from now on
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64,128")]
    batch_sizes: Vec<NonZeroUsize>,
    /// Contexts in tokens, with commas
    #[arg(long, value_delimiter = ',', default_value = "32,128,512")]
    contexts: Vec<NonZeroUsize>,
    /// Decode steps that are timed together
    #[arg(long, default_value_t = crate::cost::STEPS, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    #[command(flatten)]
    cache: CacheArgs,
    #[command(flatten)]
    weights: QuantizeArgs,
}

/// What one batch size at one context costs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProfilePoint {
    /// Sequences.
    pub batch_size: usize,
    /// Tokens of each before the timed steps.
    pub context: usize,
    /// Time to run all prompts, in milliseconds.
    pub prefill_ms: f64,
    /// Time of one decode step, in milliseconds.
    pub step_ms: f64,
}

impl ProfilePoint {
    /// Itself, unless its steps took no time that could be told from the prompts'.
    pub fn measured(self) -> Option<Self> {
        if self.step_ms > 0.0 {
            return Some(self);
        }
        let Self {
            batch_size, context, ..
        } = self;
        tracing::warn!("steps of batch {batch_size} at context {context} are lost in the noise: left out");
        None
    }
}

pub fn run(global: &Global, args: &ProfileArgs) -> anyhow::Result<()> {
    let model = global.open_quantized(args.weights)?;
    let points = measure(&model, args)?;
    // The planner's cost model reads it.
    let has_large = points.iter().any(|p| p.batch_size >= crate::cost::LARGE_BATCH);
    if has_large && args.steps >= crate::cost::STEPS {
        crate::cost::keep(&model, args.cache.engine(), &points)?;
    }
    let products = products::measure(&model.network, &points);
    if global.json {
        let products = serde_json::to_value(&products)?;
        return print_json(&serde_json::json!({"model": model.name, "points": points, "products": products}));
    }
    let header = vec!["batch", "context", "prefill ms", "step ms", "tokens/s"];
    let mut table = Table {
        header,
        rows: Vec::new(),
    };
    for p in &points {
        table.rows.push(vec![
            p.batch_size.to_string(),
            p.context.to_string(),
            format!("{:.2}", p.prefill_ms),
            format!("{:.3}", p.step_ms),
            format!("{:.0}", p.batch_size as f64 / p.step_ms * 1000.0),
        ]);
    }
    let products = products.map(|p| format!("\n{}", p.text())).unwrap_or_default();
    print(&(table.text() + &products))
}

fn measure(model: &LoadedModel, args: &ProfileArgs) -> anyhow::Result<Vec<ProfilePoint>> {
    let most = model
        .network
        .config()
        .max_position_embeddings
        .saturating_sub(args.steps as usize + 1);
    if most == 0 {
        bail!(
            "{} steps leave no room for a prompt: the model has {} positions",
            args.steps,
            model.network.config().max_position_embeddings
        );
    }
    let eos = model.tokenizer.eos().to_vec();
    let mut engine = Engine::new(model.network.clone(), None, eos, args.cache.engine())?;
    let mut points = Vec::new();
    let contexts = within(&args.contexts, most);
    let mut bar = Bar::new("profile", (args.batch_sizes.len() * contexts.len()) as u64);
    for batch_size in &args.batch_sizes {
        for &context in &contexts {
            if batch_size.get() * (context + args.steps as usize + 1) > engine.cache_tokens() {
                tracing::warn!("batch {batch_size} at context {context} does not fit the KV cache: left out");
                continue;
            }
            points.extend(profile_point(&mut engine, batch_size.get(), context, args.steps)?.measured());
            bar.set(points.len() as u64, |_| {
                format!("batch {batch_size}, context {context}")
            });
        }
    }
    bar.finish();
    if points.is_empty() {
        bail!("nothing could be measured: raise --kv-cache-tokens, or give smaller --batch-sizes and --contexts");
    }
    Ok(points)
}

/// The contexts that are measured: those beyond `most` tokens are one of so many, which is said once.
fn within(contexts: &[NonZeroUsize], most: usize) -> Vec<usize> {
    let mut measured = Vec::new();
    for context in contexts.iter().map(|context| context.get()) {
        if context > most {
            tracing::warn!("context {context} is beyond the model's positions: {most} is measured");
        }
        if !measured.contains(&context.min(most)) {
            measured.push(context.min(most));
        }
    }
    measured
}

/// Runs of which the fastest counts.
const REPEATS: usize = 3;
/// Prompts that take so long, in milliseconds, are run twice alone and twice with their steps, the first run included.
const LONG_MS: f64 = 1000.0;

/// Times a batch whose sequences all have `context` tokens: once up to the first token, once `steps` further.
pub fn profile_point(
    engine: &mut Engine,
    batch_size: usize,
    context: usize,
    steps: u32,
) -> anyhow::Result<ProfilePoint> {
    let vocab = engine.model().config().vocab_size as u32;
    let mut time = |tokens: u32| -> anyhow::Result<f64> {
        let request = |i: usize| SequenceRequest {
            id: i.to_string().into(),
            prompt: (0..context as u32).map(|t| (t * 7 + i as u32) % vocab).collect(),
            max_new_tokens: tokens,
            sampling: SamplingParams::GREEDY,
            replay_tokens: Some(tokens),
        };
        let requests = (0..batch_size)
            .map(|i| PredictedRequest {
                request: request(i),
                predicted: tokens,
            })
            .collect();
        let batch_size = NonZeroUsize::new(batch_size).unwrap_or(NonZeroUsize::MIN);
        let config = ScheduleConfig {
            batch_size,
            group_size: batch_size,
            ..ScheduleConfig::new(Strategy::Vanilla)
        };
        let began = Instant::now();
        run_strategy(engine, requests, &config, &mut |_| Ok(()))?;
        Ok(began.elapsed().as_secs_f64() * 1000.0)
    };
    // The least of a few: what else the machine does only adds, and a step is the small difference of two runs. The very
    // first run mostly warms up.
    let mut prefill_ms = time(1)?;
    let repeats = if prefill_ms < LONG_MS { REPEATS } else { 2 };
    let mut whole = f64::INFINITY;
    for repeat in 0..repeats {
        whole = whole.min(time(1 + steps)?);
        if repeat == 0 || prefill_ms < LONG_MS {
            prefill_ms = prefill_ms.min(time(1)?);
        }
    }
    Ok(ProfilePoint {
        batch_size,
        context,
        prefill_ms,
        step_ms: (whole - prefill_ms).max(0.0) / f64::from(steps),
    })
}
