//! What a strategy cost, counted alike for simulated and for real decoding.

use serde::{Deserialize, Serialize};

use crate::{ScheduleConfig, Timeline};

/// Work done and work that was of use, in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StrategyStats {
    /// Requests answered.
    pub requests: u64,
    /// Decode steps, whatever the batch.
    pub steps: u64,
    /// Slots × steps: every token that was computed, padding after an end included.
    pub slot_steps: u64,
    /// Tokens of the answers.
    pub useful_tokens: u64,
    /// Requests that had not ended when their batch stopped.
    pub failures: u64,
    /// Tokens of a predictor's prompts that went through the passes of the continuous mode beside the slots.
    pub probe_tokens: u64,
}

impl StrategyStats {
    /// Tokens computed that are in no answer: padding, and what failures threw away. The published code leaves the
    /// latter out.
    pub fn wasted_tokens(&self) -> u64 {
        self.slot_steps - self.useful_tokens
    }

    /// Slots × steps per request.
    pub fn average_length(&self) -> f64 {
        self.slot_steps as f64 / self.requests.max(1) as f64
    }

    /// Useful tokens per slot and step.
    pub fn effective_token_ratio(&self) -> f64 {
        self.useful_tokens as f64 / self.slot_steps.max(1) as f64
    }

    /// Failures per request.
    pub fn failure_ratio(&self) -> f64 {
        self.failures as f64 / self.requests.max(1) as f64
    }

    /// The row of a result table; `seconds` is `None` where nothing was timed.
    pub fn row(&self, config: &ScheduleConfig, seconds: Option<f64>) -> StrategyRow {
        let per_second = |amount: u64| seconds.map(|s| amount as f64 / s);
        StrategyRow {
            strategy: config.strategy.name().to_owned(),
            vbs: config.vbs,
            fcr: config.fcr,
            cost_model: config.planning.is_some(),
            batch_size: config.batch_size.get(),
            requests: self.requests,
            steps: self.steps,
            seconds,
            samples_per_s: per_second(self.requests),
            tokens_per_s: per_second(self.useful_tokens),
            average_length: self.average_length(),
            effective_token_ratio: self.effective_token_ratio(),
            failure_ratio: self.failure_ratio(),
            wasted_tokens: self.wasted_tokens(),
            modelled_seconds: None,
            timeline: None,
        }
    }
}

/// One strategy's result, as `--json` prints it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct StrategyRow {
    pub strategy: String,
    pub vbs: bool,
    pub fcr: bool,
    /// Planned by a cost model instead of the published rules; left out where not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cost_model: bool,
    pub batch_size: usize,
    pub requests: u64,
    pub steps: u64,
    pub seconds: Option<f64>,
    pub samples_per_s: Option<f64>,
    pub tokens_per_s: Option<f64>,
    pub average_length: f64,
    pub effective_token_ratio: f64,
    pub failure_ratio: f64,
    pub wasted_tokens: u64,
    /// What a cost model says that a simulated run takes; left out where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modelled_seconds: Option<f64>,
    /// What every slot of a simulated run did; left out where it was not asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<Timeline>,
}

/// The results of several strategies.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StrategyReport {
    /// In the order they were run.
    pub strategies: Vec<StrategyRow>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Strategy;

    #[test]
    fn a_row_has_ratios_of_slots_times_steps_and_no_rate_where_nothing_was_timed() {
        // 4 requests, 100 slot-steps of which 60 in answers, one failure.
        let stats = StrategyStats {
            requests: 4,
            steps: 50,
            slot_steps: 100,
            useful_tokens: 60,
            failures: 1,
            probe_tokens: 0,
        };
        let config = ScheduleConfig::new(Strategy::SeqSch).with(true, true);
        let row = stats.row(&config, None);
        assert_eq!(
            (row.average_length, row.effective_token_ratio, row.failure_ratio),
            (25.0, 0.6, 0.25)
        );
        assert_eq!(
            (row.wasted_tokens, row.strategy.as_str(), row.vbs, row.fcr),
            (40, "seqsch", true, true)
        );
        assert_eq!((row.seconds, row.samples_per_s, row.tokens_per_s), (None, None, None));
        let row = stats.row(&config, Some(2.0));
        assert_eq!((row.samples_per_s, row.tokens_per_s), (Some(2.0), Some(30.0)));
    }
}
