//! What a forward pass costs on one device.

mod fit;

use serde::{Deserialize, Serialize};

/// Seconds of a forward pass, as a sum of what it holds. Prices may rise: a GPU's step costs the same until rows keep its
/// arithmetic busy, a CPU's tokens are dearer once a batch no longer fits the processor's caches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct CostModel {
    /// A decode step, whatever is in it.
    pub step: f64,
    /// Each sequence in a decode step.
    pub row: f64,
    /// Each token that a sequence of a decode step has in the cache.
    pub cached_token: f64,
    /// Each prompt token.
    pub prompt_token: f64,
    /// What sequences of a decode step cost more where there are many; `None`: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub many_rows: Option<Rise>,
    /// What the cached tokens of all sequences together cost more where there are many; `None`: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub many_cached_tokens: Option<Rise>,
}

/// A price that rises.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rise {
    /// Up to so many the price is the usual one.
    pub beyond: f64,
    /// Seconds that each one beyond costs more than that.
    pub more: f64,
}

impl Rise {
    /// What so many cost more than at the usual price.
    fn seconds(&self, count: f64) -> f64 {
        self.more * (count - self.beyond).max(0.0)
    }
}

/// A measurement: a batch whose sequences have the same context.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CostPoint {
    /// Sequences.
    pub batch_size: f64,
    /// Tokens of each.
    pub context: f64,
    /// Seconds to run all prompts.
    pub prefill: f64,
    /// Seconds of one decode step.
    pub step: f64,
}

impl CostModel {
    /// One decode step of `rows` sequences with `context` tokens each, in seconds.
    pub fn decode_step(&self, rows: f64, context: f64) -> f64 {
        let risen = |rise: Option<Rise>, count| rise.map_or(0.0, |rise| rise.seconds(count));
        self.step
            + rows * (self.row + self.cached_token * context)
            + risen(self.many_rows, rows)
            + risen(self.many_cached_tokens, rows * context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prices_rise_beyond_a_number_and_are_the_sum_where_none_does() {
        let linear = CostModel {
            step: 10.0,
            row: 2.0,
            cached_token: 0.5,
            ..CostModel::default()
        };
        // 10 + 3 × 2 + 3 × 4 × 0.5.
        assert_eq!(linear.decode_step(3.0, 4.0), 22.0);
        let rise = |beyond, more| Some(Rise { beyond, more });
        let rising = CostModel {
            many_rows: rise(2.0, 100.0),
            many_cached_tokens: rise(8.0, 1000.0),
            ..linear
        };
        // One row too many, four tokens too many.
        assert_eq!(rising.decode_step(3.0, 4.0), 4122.0);
        assert_eq!(rising.decode_step(2.0, 4.0), linear.decode_step(2.0, 4.0));
    }
}
