//! A predicted distribution of a length, and what is read off it.

use lengthwise_core::{LengthEstimate, Quantile};

use super::LengthBins;

/// The probabilities whose quantiles an estimate gives.
pub const QUANTILES: [f64; 8] = [0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99];

/// A distribution of the length of one response; inside a bin every length is equally likely.
#[derive(Debug, Clone)]
pub struct LengthDistribution<'a> {
    bins: &'a LengthBins,
    /// Probability of a length at most the bin's last; ascending to 1.
    cumulative: Vec<f64>,
}

impl<'a> LengthDistribution<'a> {
    /// `softmax(logits / temperature)`; one logit per bin.
    ///
    /// `None` where a logit is not finite.
    pub fn from_logits(bins: &'a LengthBins, logits: &[f32], temperature: f64) -> Option<Self> {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: &f32| (f64::from(logit - largest) / temperature).exp();
        let sum: f64 = logits.iter().map(weight).sum();
        if !sum.is_finite() {
            return None;
        }
        let mut total = 0.0;
        let mut cumulative: Vec<f64> = logits
            .iter()
            .map(|logit| {
                // Rounding must not lead past the last bin, nor leave a length beyond it.
                total = f64::min(total + weight(logit) / sum, 1.0);
                total
            })
            .collect();
        *cumulative.last_mut()? = 1.0;
        Some(Self { bins, cumulative })
    }

    /// Probability of each bin: `[bins]`, sum 1.
    pub fn probabilities(&self) -> Vec<f64> {
        let before = std::iter::once(0.0).chain(self.cumulative.iter().copied());
        self.cumulative.iter().zip(before).map(|(c, b)| c - b).collect()
    }

    /// The smallest length whose cumulative probability is at least `probability`, in tokens.
    pub fn quantile(&self, probability: f64) -> u32 {
        let bin = self.cumulative.partition_point(|&c| c < probability);
        let bin = bin.min(self.bins.len() - 1);
        let below = if bin == 0 { 0.0 } else { self.cumulative[bin - 1] };
        let (first, last) = self.bins.range(bin);
        let mass = self.cumulative[bin] - below;
        let share = if mass > 0.0 { (probability - below) / mass } else { 1.0 };
        // Rounding would else turn an exact multiple of a token's mass into the next token.
        let tokens = (share * f64::from(last - first + 1) - 1e-9).ceil() as u32;
        first + tokens.clamp(1, last - first + 1) - 1
    }

    /// The median of the largest of `samples` independent lengths, in tokens: its distribution function is `F^samples`,
    /// so that it is the quantile of `0.5^(1 / samples)`. Of all constants the median has the least absolute error.
    pub fn median_of_largest(&self, samples: u32) -> u32 {
        self.quantile(largest_of(samples))
    }

    /// The estimate: the quantile of `point` as the largest length to expect, and the quantiles of [`QUANTILES`].
    pub fn estimate(&self, point: f64) -> LengthEstimate {
        let quantile = |probability| Quantile {
            probability,
            tokens: self.quantile(probability),
        };
        LengthEstimate {
            quantiles: QUANTILES.map(quantile).to_vec(),
            ..LengthEstimate::of(self.quantile(point))
        }
    }
}

/// `0.5^(1 / samples)`: the probability of one sample at the median of the largest of `samples` independent ones.
pub fn largest_of(samples: u32) -> f64 {
    0.5f64.powf(1.0 / f64::from(samples.max(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bins(edges: &[u32]) -> LengthBins {
        LengthBins::try_from(edges.to_vec()).expect("ascending")
    }

    #[test]
    fn quantiles_of_a_hand_worked_case() {
        // Lengths 1 to 4 with 1/2, 5 to 8 with 1/2: every length 1/8.
        let bins = bins(&[4, 8]);
        let even = LengthDistribution::from_logits(&bins, &[3.0, 3.0], 1.0).expect("finite");
        assert_eq!(
            [0.0, 0.125, 0.126, 0.5, 0.51, 1.0].map(|p| even.quantile(p)),
            [1, 1, 2, 4, 5, 8]
        );
        // P(largest of 2 <= 5) = (5/8)² = 0.39, of 6: 0.56. Of one sample the median is 4.
        assert_eq!((even.median_of_largest(1), even.median_of_largest(2)), (4, 6));
        // At twice the temperature odds of 9 become odds of 3.
        let odds = LengthDistribution::from_logits(&bins, &[0.0, 9f32.ln()], 2.0).expect("finite");
        assert!((odds.probabilities()[1] - 0.75).abs() < 1e-6);
        assert!(LengthDistribution::from_logits(&bins, &[0.0, f32::NAN], 1.0).is_none());
    }

    proptest! {
        #[test]
        fn quantiles_ascend_and_probabilities_sum_to_one(
            logits in prop::collection::vec(-40f32..40.0, 86), temperature in 0.2f64..5.0, point in 0.0f64..1.0,
        ) {
            let bins = LengthBins::new(512);
            let f = LengthDistribution::from_logits(&bins, &logits, temperature).expect("finite");
            let p = f.probabilities();
            prop_assert!(p.iter().all(|p| *p >= 0.0) && (p.iter().sum::<f64>() - 1.0).abs() < 1e-9);
            let estimate = f.estimate(point);
            prop_assert!(estimate.quantiles.is_sorted_by(|a, b| a.probability < b.probability && a.tokens <= b.tokens));
            prop_assert!((1..=512).contains(&estimate.max_tokens));
            for k in 1..6 {
                prop_assert!(f.median_of_largest(k) <= f.median_of_largest(k + 1));
            }
        }

        #[test]
        fn the_largest_of_samples_has_the_power_of_the_distribution(
            logits in prop::collection::vec(-3f32..3.0, 6), k in 1u32..6,
        ) {
            // Bins of one token: F^k at the median is the first to reach one half.
            let bins = bins(&[1, 2, 3, 4, 5, 6]);
            let f = LengthDistribution::from_logits(&bins, &logits, 1.0).expect("finite");
            let power = |t: u32| f.cumulative[t as usize - 1].powi(k as i32);
            let median = f.median_of_largest(k);
            prop_assert!(power(median) >= 0.5 - 1e-9 && (median == 1 || power(median - 1) < 0.5 + 1e-9));
        }
    }
}
