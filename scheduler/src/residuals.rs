//! How far predictions have been off so far, and so what lengths to expect of the next ones.

/// Points of a length distribution: `P(length <= (g + 1) * cap / GRID)` at index g.
pub(crate) const GRID: usize = 64;
/// Observed answers that are asked about a prediction: those with the most similar ones.
const NEIGHBOURS: usize = 64;
/// Length divided by prediction before anything was observed. Broad: a prediction stands for the largest of several
/// samples, so most answers are shorter.
const PRIOR: [f64; 16] = [
    0.2, 0.35, 0.45, 0.55, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.0, 1.05, 1.2, 1.5,
];

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
        for ratio in PRIOR {
            add(ratio * f64::from(predicted), missing / PRIOR.len() as f64);
        }
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
