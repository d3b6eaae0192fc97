//! What a report is made of: what one input held, each part optional.

use lengthwise_scheduler::StrategyRow;
use lengthwise_train::PredictorRow;
use serde::{Deserialize, Serialize};

/// Everything that a report can show of one input; keys that it does not know are passed over.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReportData {
    /// Name and value of what a reader must know: model, device, dtype, commit, date.
    #[serde(skip_serializing_if = "serde_json::Map::is_empty")]
    pub setup: serde_json::Map<String, serde_json::Value>,
    /// Strategies compared.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub strategies: Vec<StrategyRow>,
    /// Predictors compared.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub predictors: Vec<PredictorRow>,
    /// Predicted against true lengths, one series per predictor.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub predictions: Vec<PredictionSeries>,
    /// For every instruction the lengths of its samples, in tokens.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub length_samples: Vec<Vec<u32>>,
    /// Throughput by batch size.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub throughput: Vec<ThroughputPoint>,
    /// Step time by position.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub step_times: Vec<StepTime>,
    /// Matrix products, as `profile` measures them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub products: Option<Products>,
    /// Engines compared, as `scripts/bench_decode/summary.py` sums them up.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub engines: Vec<EngineRow>,
    /// What was asked of the comparison of engines, and what was reached.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bars: Vec<Bar>,
}

impl ReportData {
    /// Whether there is nothing to show.
    pub fn is_empty(&self) -> bool {
        self.parts() == [false; 7]
    }

    /// Which parts there are: those that two inputs have in common are told apart by the inputs' names.
    pub fn parts(&self) -> [bool; 7] {
        [
            !self.strategies.is_empty(),
            !self.predictors.is_empty() || !self.predictions.is_empty(),
            !self.length_samples.is_empty(),
            !self.throughput.is_empty(),
            !self.step_times.is_empty(),
            self.products.is_some(),
            !self.engines.is_empty(),
        ]
    }
}

/// The predictions of one predictor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PredictionSeries {
    /// The predictor.
    pub predictor: String,
    /// `[predicted, true]`, in tokens.
    pub points: Vec<(u32, u32)>,
}

/// How fast one way of decoding is at one batch size.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ThroughputPoint {
    /// What was measured, "decode" or the context.
    pub series: String,
    /// Sequences in the batch.
    pub batch_size: u32,
    /// Tokens of all of them per second.
    pub tokens_per_s: f64,
}

/// How long one decode step takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// Sequences in the batch.
    pub batch_size: u32,
    /// Tokens that every sequence has so far.
    pub position: u32,
    /// The step's time.
    pub milliseconds: f64,
}

/// The matrix products of a decode step.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Products {
    /// By batch size and shape.
    pub linears: Vec<ProductRate>,
    /// Whole steps, by batch size and context.
    pub steps: Vec<WholeStep>,
}

/// How near one linear shape comes to what the machine can do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProductRate {
    /// Sequences.
    pub batch_size: u32,
    /// `qkv`, `o`, `gate+up`, `down` or `lm_head`.
    pub linear: String,
    /// The rate reached by what the machine does of the shape with warm caches.
    pub share: f64,
}

/// A whole decode step against its matrix products.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WholeStep {
    /// Sequences.
    pub batch_size: u32,
    /// Tokens of each before the step.
    pub context: u32,
    /// The whole step, in milliseconds.
    pub step_ms: f64,
    /// The sum of its matrix products, in milliseconds.
    pub products_ms: f64,
}

/// An engine's rate over several runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EngineRow {
    /// Name and settings.
    pub engine: String,
    /// Runs.
    pub runs: u32,
    /// Requests per second.
    pub samples_per_s: Spread,
    /// Tokens of answers per second.
    pub tokens_per_s: Spread,
}

/// A figure of several runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The one in the middle.
    pub median: f64,
    /// The smallest.
    pub least: f64,
    /// The largest.
    pub most: f64,
}

/// A ratio that was asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bar {
    /// Of what.
    pub bar: String,
    /// At least so much.
    pub asked: f64,
    /// So much was reached.
    pub reached: f64,
}
