//! Where predicted lengths come from.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, bail};
use candle_core::Device;
use clap::Args;
use lengthwise_core::{LengthEstimate, LengthPredictor, PredictError, PredictInput, Prompt, Quantile, RequestId};
use lengthwise_decoder::EngineConfig;
use lengthwise_model::{Adapter, LengthHead, LoadedModel};
use lengthwise_predictor::{
    ConstantPredictor, FallbackPredictor, HeadPredictor, LlmPredictor, Question, RemotePredictor,
};
use lengthwise_scheduler::Strategy;
use lengthwise_train::files::read_predictions;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::inputs::{CacheArgs, default_slots, local_decoder};
use crate::progress::{Bar, NO_BAR_FOR};

/// Sources of predictions.
#[derive(Args, Clone)]
pub struct PredictionArgs {
    /// A running predictor, http://host:port
    #[arg(long, conflicts_with_all = ["adapter", "predictions"])]
    pub predictor: Option<String>,
    /// A length adapter, run in this process on the same weights
    #[arg(long, conflicts_with = "predictions")]
    pub adapter: Option<PathBuf>,
    /// A JSONL file of {"id", "max_tokens"}, and "quantiles" [{"probability", "tokens"}] where they are known
    #[arg(long)]
    pub predictions: Option<PathBuf>,
    /// Continuous mode: the quantile of a predicted distribution that a request is admitted with; a prediction of one
    /// number is taken as it is
    #[arg(long, default_value_t = ADMIT_QUANTILE, value_parser = parse_probability)]
    pub admit_quantile: f64,
}

/// Where a strategy's lengths come from.
pub enum Source<'a> {
    /// It needs none.
    Nobody,
    /// The model is asked as it is (PiA).
    Model,
    File(&'a Path),
    /// A running predictor's address.
    Server(&'a str),
    Adapter(&'a Path),
    /// No flag names one.
    Unnamed,
}

impl PredictionArgs {
    /// The source for `strategy`: some need none or have their own, whatever the flags name.
    pub fn source(&self, strategy: Strategy) -> Source<'_> {
        match (strategy, &self.predictions, &self.predictor, &self.adapter) {
            (Strategy::Po, ..) => Source::Model,
            (Strategy::Vanilla, ..) => Source::Nobody,
            (_, Some(path), ..) => Source::File(path),
            (_, _, Some(url), _) => Source::Server(url),
            (.., Some(folder)) => Source::Adapter(folder),
            _ => Source::Unnamed,
        }
    }
}

/// The quantile that the continuous mode admits with, unless it is asked for another: one answer in ten outgrows its
/// share of the KV cache.
pub const ADMIT_QUANTILE: f64 = 0.9;

/// The length that `strategy` counts with: the continuous mode reserves the `admit_quantile` of the distribution, the
/// others batch by the largest length expected.
pub fn scheduled_length(estimate: &LengthEstimate, strategy: Strategy, admit_quantile: f64) -> u32 {
    match strategy {
        Strategy::Continuous => estimate.quantile(admit_quantile),
        _ => estimate.max_tokens,
    }
}

/// Inputs that one call predicts.
pub const CHUNK: usize = 256;

/// A predictor that runs the model in this process: the head of the adapter's folder where there is one, else the model
/// is asked.
pub fn local_predictor(
    model: &LoadedModel,
    adapter: Option<&Path>,
    question: Question,
    fallback: u32,
) -> anyhow::Result<Box<dyn LengthPredictor>> {
    if let Some(folder) = adapter.filter(|folder| LengthHead::is_in(folder)) {
        return Ok(Box::new(head_predictor(model, folder, model.network.device())?));
    }
    let decoder = local_decoder(model, adapter, default_slots(), EngineConfig::default())?;
    Ok(Box::new(LlmPredictor::new(decoder, question, fallback)))
}

/// The predictor of an adapter's folder that has a length head, which lies on `device`.
pub fn head_predictor(model: &LoadedModel, folder: &Path, device: &Device) -> anyhow::Result<HeadPredictor> {
    let config = model.network.config();
    let adapter = Arc::new(Adapter::load(folder, config, model.network.device())?);
    let head = LengthHead::load(folder, config.hidden_size, device)?;
    Ok(HeadPredictor::new(model.clone(), adapter, head))
}

/// Whether the predictor of a strategy has a KV cache in this process: it asks the model.
fn has_cache(strategy: Strategy, args: &PredictionArgs) -> bool {
    match args.source(strategy) {
        Source::Model => true,
        Source::Adapter(folder) => !LengthHead::is_in(folder),
        Source::Nobody | Source::File(_) | Source::Server(_) | Source::Unnamed => false,
    }
}

/// The engine's settings of a decoder, beside which the strategies' predictors will be.
pub fn engine_beside(cache: CacheArgs, strategies: &[Strategy], args: &PredictionArgs) -> EngineConfig {
    match strategies.iter().any(|strategy| has_cache(*strategy, args)) {
        true => cache.engine().for_two(),
        false => cache.engine(),
    }
}

/// The predictor that the flags and the strategy name; `None` where predictions are read from a file or not needed.
pub fn predictor_for(
    strategy: Strategy,
    args: &PredictionArgs,
    model: &LoadedModel,
    cap: u32,
) -> anyhow::Result<Option<Box<dyn LengthPredictor>>> {
    let predictor: Box<dyn LengthPredictor> = match (args.source(strategy), strategy) {
        (Source::Nobody | Source::File(_), _) => return Ok(None),
        (Source::Model, _) => local_predictor(model, None, Question::Pia, cap)?,
        (Source::Server(url), _) => Box::new(FallbackPredictor::new(RemotePredictor::connect(url)?, cap)),
        (Source::Adapter(folder), _) => local_predictor(model, Some(folder), Question::Length, cap)?,
        // Without predictions the continuous mode admits by the cap.
        (Source::Unnamed, Strategy::Continuous) => Box::new(ConstantPredictor { max_tokens: cap }),
        (Source::Unnamed, Strategy::Oracle) => bail!("oracle needs the true lengths: give --predictions or --lengths"),
        (Source::Unnamed, _) => {
            bail!("{strategy} needs predicted lengths: give --predictor, --adapter or --predictions")
        }
    };
    Ok(Some(predictor))
}

/// The distributions of single requests' lengths, as far as they are predicted.
pub type Distributions = HashMap<RequestId, Vec<Quantile>>;

/// The distributions among predictions.
pub fn distributions<'a>(predicted: impl Iterator<Item = (&'a RequestId, &'a LengthEstimate)>) -> Distributions {
    let with = predicted.filter(|(_, estimate)| !estimate.quantiles.is_empty());
    with.map(|(id, estimate)| (id.clone(), estimate.quantiles.clone()))
        .collect()
}

/// Predictions of one number each.
pub fn numbers(lengths: impl IntoIterator<Item = u32>) -> Vec<LengthEstimate> {
    lengths.into_iter().map(LengthEstimate::of).collect()
}

/// Predictions of a file; every id must be there.
pub fn from_file(path: &Path, ids: &[RequestId]) -> anyhow::Result<Vec<LengthEstimate>> {
    let predictions = read_predictions(path)?;
    look_up(&predictions, ids, path)
}

/// What a table read from `path` has of `ids`.
pub fn look_up<T: Clone>(table: &HashMap<RequestId, T>, ids: &[RequestId], path: &Path) -> anyhow::Result<Vec<T>> {
    let one = |id| {
        table
            .get(id)
            .cloned()
            .with_context(|| format!("{} has no length for request {id}", path.display()))
    };
    ids.iter().map(one).collect()
}

/// What was predicted of a request; `None`, with a warning that names it, where that failed.
pub fn predicted<T>(result: Result<T, PredictError>, id: &RequestId, cap: u32) -> Option<T> {
    let warn = |err: &PredictError| {
        tracing::warn!("request {id}: its length could not be predicted ({err}); going on with the cap of {cap}");
    };
    result.inspect_err(warn).ok()
}

/// Asks a predictor for every prompt. One that cannot be predicted gets the cap, with a warning that names its id.
pub fn ask<'a>(
    predictor: &mut dyn LengthPredictor,
    prompts: &[Prompt],
    ids: impl IntoIterator<Item = &'a RequestId>,
    cap: u32,
) -> anyhow::Result<Vec<LengthEstimate>> {
    let results = ask_each(predictor, prompts, cap)?.into_iter().zip(ids);
    let or_cap = |(result, id)| predicted(result, id, cap).unwrap_or(LengthEstimate::fallback(cap));
    Ok(results.map(or_cap).collect())
}

/// Asks a predictor for every prompt. One that cannot be predicted fails alone.
pub fn ask_each(
    predictor: &mut dyn LengthPredictor,
    prompts: &[Prompt],
    cap: u32,
) -> anyhow::Result<Vec<Result<LengthEstimate, PredictError>>> {
    let mut results = Vec::with_capacity(prompts.len());
    let (began, mut bar) = (Instant::now(), None);
    for chunk in prompts.chunks(CHUNK) {
        let input = |prompt: &Prompt| PredictInput {
            prompt: prompt.clone(),
            max_new_tokens: cap,
        };
        let inputs: Vec<PredictInput> = chunk.iter().map(input).collect();
        results.extend(predictor.predict(&inputs)?);
        if began.elapsed() >= NO_BAR_FOR {
            let new = || Bar::new("predicting", prompts.len() as u64);
            bar.get_or_insert_with(new).set(results.len() as u64, |_| String::new());
        }
    }
    if let Some(bar) = bar {
        bar.finish();
    }
    Ok(results)
}

/// True lengths disturbed by Laplace noise so that their mean absolute error is `mae`, never below 1 nor above `cap`.
/// Those bounds cut errors off, so the noise is scaled until what is left has the error asked for.
pub fn disturb(lengths: &[u32], mae: f64, cap: u32, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut unit = || {
        let uniform: f64 = rng.random_range(-0.5..0.5);
        -uniform.signum() * (1.0 - 2.0 * uniform.abs()).max(f64::MIN_POSITIVE).ln()
    };
    let noise: Vec<f64> = lengths.iter().map(|_| unit()).collect();
    let at_scale = |scale: f64| -> Vec<u32> {
        let one = |(&l, n): (&u32, &f64)| (f64::from(l) + n * scale).round().clamp(1.0, f64::from(cap)) as u32;
        lengths.iter().zip(&noise).map(one).collect()
    };
    let error = |predicted: &[u32]| {
        let sum: f64 = predicted
            .iter()
            .zip(lengths)
            .map(|(p, l)| f64::from(p.abs_diff(*l)))
            .sum();
        sum / lengths.len().max(1) as f64
    };
    let (mut low, mut high) = (0.0, mae * 64.0);
    for _ in 0..50 {
        let middle = (low + high) / 2.0;
        if error(&at_scale(middle)) < mae {
            low = middle
        } else {
            high = middle
        }
    }
    at_scale(low)
}

/// `--noise-mae` as a number of tokens.
pub fn parse_noise(text: &str) -> Result<f64, String> {
    let mae = text.parse::<f64>().ok().filter(|mae| mae.is_finite() && *mae >= 0.0);
    mae.ok_or_else(|| "expected a number of tokens, 0 or more".to_owned())
}

/// `--admit-quantile` as a probability.
fn parse_probability(text: &str) -> Result<f64, String> {
    let probability = text.parse::<f64>().ok().filter(|p| *p > 0.0 && *p < 1.0);
    probability.ok_or_else(|| "expected a probability between 0 and 1".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_continuous_mode_admits_by_the_quantile_where_there_is_one() {
        let quantile = |probability, tokens| Quantile { probability, tokens };
        let estimate = LengthEstimate {
            quantiles: vec![quantile(0.5, 40), quantile(0.9, 90)],
            ..LengthEstimate::of(70)
        };
        let length = |estimate, strategy| scheduled_length(estimate, strategy, 0.9);
        assert_eq!(length(&estimate, Strategy::Continuous), 90);
        assert_eq!(length(&estimate, Strategy::SeqSch), 70);
        assert_eq!(length(&LengthEstimate::of(70), Strategy::Continuous), 70);
        for text in ["0", "1", "NaN", "x"] {
            parse_probability(text).expect_err(text);
        }
    }

    #[test]
    fn a_predictor_that_asks_the_model_is_left_memory() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let args = |adapter: bool, predictions: bool| PredictionArgs {
            predictor: None,
            adapter: adapter.then(|| folder.path().to_owned()),
            predictions: predictions.then(|| "lengths.jsonl".into()),
            admit_quantile: ADMIT_QUANTILE,
        };
        let (none, adapter, file) = (args(false, false), args(true, false), args(false, true));
        assert!(has_cache(Strategy::Po, &none) && has_cache(Strategy::Po, &file));
        assert!(has_cache(Strategy::SeqSch, &adapter) && !has_cache(Strategy::Vanilla, &adapter));
        assert!(!has_cache(Strategy::Continuous, &none) && !has_cache(Strategy::SeqSch, &file));
        std::fs::write(folder.path().join("length_head.json"), "")?;
        assert!(!has_cache(Strategy::SeqSch, &adapter));
        Ok(())
    }

    #[test]
    fn noise_has_the_error_asked_for_in_spite_of_its_bounds() {
        let lengths: Vec<u32> = (0..4000).map(|i| 1 + (i * i) % 511).collect();
        for mae in [0.0, 20.0, 62.0, 100.0] {
            let noisy = disturb(&lengths, mae, 512, 7);
            let sum: u32 = noisy.iter().zip(&lengths).map(|(a, b)| a.abs_diff(*b)).sum();
            let got = f64::from(sum) / 4000.0;
            assert!((got - mae).abs() < 0.5, "{got}, asked for {mae}");
            assert!(noisy.iter().all(|l| (1..=512).contains(l)));
        }
    }
}
