//! Bins of lengths, of equal width in log space where they are wider than one token.

use serde::{Deserialize, Serialize};

/// Relative width of a bin. With it every length up to 34 tokens has a bin of its own, and 512 tokens make 86 bins.
const RELATIVE_WIDTH: f64 = 0.06;

/// Bins that cut the lengths from 1 token to a largest length, which is the last bin alone: an answer that was stopped
/// there counts into it, and so does a longer one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<u32>", into = "Vec<u32>")]
pub struct LengthBins {
    /// The largest length of each bin, ascending, in tokens.
    last: Vec<u32>,
}

impl LengthBins {
    /// Bins up to `max_tokens`, at least 1: each at most 6 % wide, and at least one token.
    pub fn new(max_tokens: u32) -> Self {
        let max_tokens = max_tokens.max(1);
        let mut last = Vec::new();
        let mut end = 0;
        while end + 1 < max_tokens {
            let wide = f64::from(end) * (1.0 + RELATIVE_WIDTH);
            end = (wide as u32).clamp(end + 1, max_tokens - 1);
            last.push(end);
        }
        last.push(max_tokens);
        Self { last }
    }

    /// The largest length of each bin, ascending, in tokens.
    pub fn edges(&self) -> &[u32] {
        &self.last
    }

    /// How many there are; at least 1.
    #[expect(clippy::len_without_is_empty, reason = "there is always a bin")]
    pub fn len(&self) -> usize {
        self.last.len()
    }

    /// The largest length, in tokens: the cap.
    pub fn max_tokens(&self) -> u32 {
        self.last[self.last.len() - 1]
    }

    /// The bin of a length: the last one where it is the cap or more, the first for 0.
    pub fn of(&self, tokens: u32) -> usize {
        self.last.partition_point(|&last| last < tokens).min(self.len() - 1)
    }

    /// Smallest and largest length of a bin, in tokens.
    pub fn range(&self, bin: usize) -> (u32, u32) {
        let first = if bin == 0 { 1 } else { self.last[bin - 1] + 1 };
        (first, self.last[bin])
    }

    /// What share of an instruction's samples lies in each bin: `[bins]`, sum 1.
    ///
    /// Each sample is spread by a Gaussian of standard deviation `smoothing` in the logarithm of the length, taken at
    /// the bins' geometric centres. One that reached the cap is not: how long it would have become is not known, but
    /// not that it was shorter.
    pub fn soft_label(&self, lengths: &[u32], smoothing: f64) -> Vec<f32> {
        let mut label = vec![0f64; self.len()];
        for &tokens in lengths {
            self.spread(tokens, smoothing, 1.0 / lengths.len() as f64, &mut label);
        }
        label.into_iter().map(|share| share as f32).collect()
    }

    fn spread(&self, tokens: u32, smoothing: f64, mass: f64, label: &mut [f64]) {
        let bin = self.of(tokens);
        let weight = |bin: usize| {
            let (first, last) = self.range(bin);
            let (low, high) = ((f64::from(first) - 0.5).ln(), (f64::from(last) + 0.5).ln());
            let away = (f64::from(tokens.max(1)).ln() - f64::midpoint(f64::from(first).ln(), f64::from(last).ln()))
                / smoothing;
            (-0.5 * away * away).exp() * (high - low)
        };
        let weights: Vec<f64> = (0..self.len()).map(weight).collect();
        let sum: f64 = weights.iter().sum();
        if tokens >= self.max_tokens() || smoothing <= 0.0 || !sum.is_normal() {
            label[bin] += mass;
            return;
        }
        label.iter_mut().zip(weights).for_each(|(l, w)| *l += mass * w / sum);
    }
}

impl TryFrom<Vec<u32>> for LengthBins {
    type Error = String;

    fn try_from(last: Vec<u32>) -> Result<Self, String> {
        let ascending = last.windows(2).all(|pair| pair[0] < pair[1]);
        match last.first() {
            Some(&first) if ascending && first > 0 => Ok(Self { last }),
            _ => Err("the bins' edges must be ascending lengths of at least 1".to_owned()),
        }
    }
}

impl From<LengthBins> for Vec<u32> {
    fn from(bins: LengthBins) -> Self {
        bins.last
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn short_lengths_have_their_own_bins_and_the_cap_is_the_last() {
        let bins = LengthBins::new(512);
        assert_eq!(bins.len(), 86);
        assert_eq!((bins.range(33), bins.range(34)), ((34, 34), (35, 36)));
        assert_eq!(bins.range(85), (512, 512));
        assert_eq!((bins.of(0), bins.of(1), bins.of(512), bins.of(9000)), (0, 0, 85, 85));
        assert_eq!(LengthBins::new(0).edges(), [1]);
    }

    #[test]
    fn a_label_without_smoothing_counts_the_samples() {
        let bins = LengthBins::new(4);
        assert_eq!(bins.soft_label(&[1, 3, 3, 9], 0.0), [0.25, 0.0, 0.5, 0.25]);
    }

    #[test]
    fn a_label_is_spread_to_both_sides_in_the_logarithm() {
        // Three bins of one token around 10, by hand: weights exp(-(ln t - ln 10)² / 2σ²) (ln(t + .5) - ln(t - .5)).
        let bins = LengthBins::new(200);
        let label = bins.soft_label(&[10], 0.1);
        let weight = |t: f64| (-0.5 * ((t / 10.0).ln() / 0.1).powi(2)).exp() * ((t + 0.5) / (t - 0.5)).ln();
        let sum: f64 = (1..=34).map(|t| weight(f64::from(t))).sum();
        for t in [9u32, 10, 11] {
            let want = weight(f64::from(t)) / sum;
            assert!(
                (f64::from(label[bins.of(t)]) - want).abs() < 1e-6,
                "{t}: {}, want {want}",
                label[bins.of(t)]
            );
        }
        // What was stopped at the cap was not shorter.
        assert_eq!(bins.soft_label(&[200], 0.1)[bins.len() - 1], 1.0);
    }

    proptest! {
        #[test]
        fn bins_cut_every_length_once(max in 1u32..3000) {
            let bins = LengthBins::new(max);
            prop_assert_eq!(bins.max_tokens(), max);
            let mut next = 1;
            for bin in 0..bins.len() {
                let (first, last) = bins.range(bin);
                prop_assert_eq!(first, next);
                prop_assert!(f64::from(last - first) <= RELATIVE_WIDTH * f64::from(first));
                prop_assert_eq!((bins.of(first), bins.of(last)), (bin, bin));
                next = last + 1;
            }
            prop_assert_eq!(next, max + 1);
        }

        #[test]
        fn a_label_is_a_distribution(
            lengths in prop::collection::vec(0u32..700, 1..8), max in 1u32..600, smoothing in 0.0f64..0.5,
        ) {
            let label = LengthBins::new(max).soft_label(&lengths, smoothing);
            prop_assert!(label.iter().all(|share| (0.0..=1.0).contains(share)));
            prop_assert!((label.iter().sum::<f32>() - 1.0).abs() < 1e-5);
        }
    }
}
