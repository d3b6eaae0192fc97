//! How far predictions have been off so far, and so what lengths to expect of the next ones.

/// Points of a length distribution: `P(length <= (g + 1) * cap / GRID)` at index g.
pub(crate) const GRID: usize = 64;
/// Observed answers that are asked about a prediction: those with the most similar ones.
const NEIGHBOURS: usize = 64;
/// Mean absolute error of predictions before anything was observed, as a share of the cap: the published predictor's, whose
/// errors are about exponential to either side (arXiv 2305.13144: 63 tokens of 512; 56 % within 50, 81 % within 100).
const PUBLISHED_ERROR: f64 = 63.0 / 512.0;
/// An answer's length divided by the largest of several samples, before anything was observed.
const OF_LARGEST: [f64; 8] = [0.4, 0.6, 0.7, 0.8, 0.87, 0.93, 0.97, 1.0];

/// Predictions and the lengths that came of them, by prediction.
#[derive(Debug, Clone, Default)]
pub(crate) struct Residuals {
    /// `(predicted, actual)`, by prediction, and equal ones in the order in which they came.
    seen: Vec<(u32, u32)>,
}

impl Residuals {
    /// Takes note of answers that have ended.
    pub fn observe(&mut self, answers: impl Iterator<Item = (u32, u32)>) {
        self.seen.extend(answers);
        self.seen.sort_by_key(|(predicted, _)| *predicted);
    }

    /// The distribution of the length of a request with this prediction, on the grid up to `cap`; the last point is 1.
    ///
    /// Lengths of similar predictions, each moved by as much as its prediction differs; the prior counts as one
    /// neighbour in four until there are enough.
    pub fn distribution(&self, predicted: u32, cap: u32) -> [f64; GRID] {
        let below = self.seen.partition_point(|(p, _)| *p < predicted);
        let middle = (below + self.seen.partition_point(|(p, _)| *p <= predicted)) / 2;
        let first = middle
            .saturating_sub(NEIGHBOURS / 2)
            .min(self.seen.len().saturating_sub(NEIGHBOURS));
        let near = &self.seen[first..(first + NEIGHBOURS).min(self.seen.len())];
        let mut counts = [0f64; GRID];
        let mut add = |length: f64, weight: f64| {
            let cell = (length.ceil().max(1.0) - 1.0) * GRID as f64 / f64::from(cap);
            counts[(cell as usize).min(GRID - 1)] += weight;
        };
        for &(p, actual) in near {
            add(f64::from(actual) + f64::from(predicted) - f64::from(p), 1.0);
        }
        let missing = (NEIGHBOURS - near.len()) as f64 / 4.0 + 1.0;
        prior(f64::from(predicted.clamp(1, cap)), f64::from(cap), |length, share| {
            add(length, missing * share)
        });
        let total: f64 = counts.iter().sum();
        let mut sum = 0.0;
        let mut points = counts.map(|count| {
            sum += count / total;
            sum
        });
        points[GRID - 1] = 1.0;
        points
    }
}

/// What lengths a prediction stands for before anything was observed, and with which shares: the largest length is one of
/// those around it within the cap, by the published error; the answer is a part of that.
fn prior(predicted: f64, cap: f64, mut add: impl FnMut(f64, f64)) {
    let largest: [f64; GRID] = std::array::from_fn(|g| (g as f64 + 0.5) * cap / GRID as f64);
    let near = largest.map(|length| (-(length - predicted).abs() / (PUBLISHED_ERROR * cap)).exp());
    let whole = near.iter().sum::<f64>() * OF_LARGEST.len() as f64;
    for (length, near) in largest.into_iter().zip(near) {
        for part in OF_LARGEST {
            add(part * length, near / whole);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first point of the grid at which the distribution reaches `p`, in tokens.
    fn quantile(points: &[f64; GRID], p: f64, cap: u32) -> u32 {
        let g = points.iter().position(|f| *f >= p).expect("the last point is 1");
        (g as u32 + 1) * cap / GRID as u32
    }

    #[test]
    fn before_anything_is_seen_lengths_spread_below_the_prediction() {
        let points = Residuals::default().distribution(256, 512);
        assert!(points.windows(2).all(|w| w[0] <= w[1]));
        assert!((150..260).contains(&quantile(&points, 0.5, 512)));
        assert!(quantile(&points, 0.99, 512) > 300);
    }

    #[test]
    fn a_short_prediction_may_be_as_far_off_as_a_long_one() {
        // Error of 63 around 20: a largest length beyond 130 in 1 of 7 cases, 63 e^(-110 / 63) / (126 - 63 e^(-20 / 63)),
        // and an answer has 4 in 5 of it.
        let points = Residuals::default().distribution(20, 512);
        assert!(
            (90..150).contains(&quantile(&points, 0.9, 512)),
            "{}",
            quantile(&points, 0.9, 512)
        );
        // The same where every length is a quarter.
        let quarter = Residuals::default().distribution(5, 128);
        assert!(
            points.iter().zip(quarter).all(|(a, b)| (a - b).abs() < 0.05),
            "{points:?}\n{quarter:?}"
        );
    }

    #[test]
    fn what_was_seen_is_expected_again() {
        let mut residuals = Residuals::default();
        residuals.observe((0..200).map(|i| (2 * i, 2 * i + 40)));
        let points = residuals.distribution(200, 512);
        assert!(
            (232..=248).contains(&quantile(&points, 0.5, 512)),
            "{}",
            quantile(&points, 0.5, 512)
        );
        assert!((232..=248).contains(&quantile(&points, 0.9, 512)));
        // Nothing is known of predictions so large but what the nearest say.
        assert_eq!(quantile(&residuals.distribution(5000, 512), 0.9, 512), 512);
    }
}
