//! What a report is made of: a command's `--json` output, each part optional.

use lengthwise_scheduler::StrategyRow;
use lengthwise_train::PredictorRow;
use serde::{Deserialize, Serialize};

/// Everything that a report can show; keys that it does not know are passed over.
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
}

impl ReportData {
    /// Whether there is nothing to show.
    pub fn is_empty(&self) -> bool {
        *self
            == Self {
                setup: self.setup.clone(),
                ..Self::default()
            }
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
    /// What was measured, "decode" or a strategy's name.
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
