//! What came of earlier predictions, for the cost planner.

use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use lengthwise_scheduler::{CostModel, Planning};
use lengthwise_train::files::{LengthRecord, read_lengths};
use serde::Deserialize;

use crate::inputs::actual_length;
use crate::predictions::{Distributions, disturb};

/// Where the history is, and how its lengths stand to the requests'.
pub struct History<'a> {
    /// An output of generate, recorded lengths, or nothing.
    pub path: Option<&'a Path>,
    /// Of recorded lengths, the sample that counts as generated: t0.0, …
    pub actual: &'a str,
    /// Of recorded lengths, the mean absolute error that predictions are to have.
    pub noise: Option<f64>,
    /// Recorded lengths are divided by this.
    pub divide_lengths: u32,
}

/// A line of generate's output.
#[derive(Deserialize)]
struct Answered {
    tokens: u32,
    predicted_max_tokens: Option<u32>,
}

impl History<'_> {
    /// What the planner goes by: the cost model, what is predicted of single requests, and this history.
    pub fn planning(
        &self,
        cost: CostModel,
        distributions: Distributions,
        cap: u32,
        seed: u64,
    ) -> anyhow::Result<Arc<Planning>> {
        let history = self.read(cap, seed)?;
        Ok(Arc::new(Planning {
            cost,
            history,
            distributions,
        }))
    }

    /// `(predicted, actual)` in tokens, none above `cap`.
    fn read(&self, cap: u32, seed: u64) -> anyhow::Result<Vec<(u32, u32)>> {
        let Some(path) = self.path else {
            return Ok(Vec::new());
        };
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let answered: Option<Vec<Answered>> = text.lines().map(|line| serde_json::from_str(line).ok()).collect();
        if let Some(answered) = answered {
            let pair = |a: &Answered| Some((a.predicted_max_tokens?.min(cap), a.tokens.min(cap)));
            return Ok(answered.iter().filter_map(pair).collect());
        }
        self.of_lengths(&read_lengths(path)?, cap, seed)
    }

    fn of_lengths(&self, records: &[LengthRecord], cap: u32, seed: u64) -> anyhow::Result<Vec<(u32, u32)>> {
        let scaled = |tokens: u32| tokens.div_ceil(self.divide_lengths).clamp(1, cap);
        let largest: Vec<u32> = records.iter().map(|r| scaled(r.largest())).collect();
        let predicted = match self.noise {
            // Another stream than the requests': the planner is not to know their noise.
            Some(mae) => disturb(&largest, mae, cap, seed.wrapping_add(1)),
            None => largest,
        };
        let actual = records.iter().map(|r| Ok(scaled(actual_length(r, self.actual)?)));
        let actual = actual.collect::<anyhow::Result<Vec<u32>>>()?;
        Ok(predicted.into_iter().zip(actual).collect())
    }
}
