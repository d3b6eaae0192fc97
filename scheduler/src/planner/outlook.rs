//! What is expected of the requests of a group.

use std::collections::HashMap;

use lengthwise_core::Quantile;

use crate::CostModel;
use crate::residuals::GRID;
use crate::simulate::PROMPT_TOKENS;

/// What is left of a request, and what stopping it costs.
pub(super) struct Outlook {
    /// `P(at most so many tokens are left)` on the grid.
    distribution: [f64; GRID],
    /// Its logarithm.
    ended: [f64; GRID],
    /// Expected seconds of finishing it where it is stopped at each point of the grid.
    failure: [f64; GRID],
    /// Tokens that its row has got in the cache, as expected, between each point of the grid and the one before. A row that
    /// has ended gets none where it goes on from there later; else batches are those of decoders that pad.
    held: [f64; GRID],
    /// The point of the grid from which on it has to be done.
    done: usize,
    /// Tokens left.
    pub mean: f64,
}

/// The outlooks of a group: requests of which the same is known share one.
pub(super) struct Outlooks<'a> {
    pub all: Vec<Outlook>,
    known: HashMap<(u32, u32), usize>,
    /// Tokens from one point of the grid to the next.
    width: f64,
    cost: &'a CostModel,
    resumes: bool,
}

impl<'a> Outlooks<'a> {
    pub fn new(width: f64, cost: &'a CostModel, resumes: bool) -> Self {
        Self {
            all: Vec::new(),
            known: HashMap::new(),
            width,
            cost,
            resumes,
        }
    }

    /// The outlook of a request; `whole` is its distribution before anything was known.
    ///
    /// - `key`: what it follows from, where others may have the same
    /// - `known`, `done`: the point of the grid that its length exceeds, and that from which on it has to be done
    pub fn add(
        &mut self,
        key: Option<(u32, u32)>,
        whole: impl FnOnce() -> [f64; GRID],
        known: usize,
        done: usize,
    ) -> usize {
        let shared = key.and_then(|key| self.known.get(&key).copied());
        shared.unwrap_or_else(|| {
            self.all
                .push(Outlook::new(&whole(), known, done, self.width, !self.resumes));
            let index = self.all.len() - 1;
            if let Some(key) = key {
                self.known.insert(key, index);
            }
            index
        })
    }

    /// Reckons what failures cost, given how much of the harmonic excess of their batches is padding.
    pub fn reckon_failures(&mut self, excess: f64) {
        let late = |g: usize| late_token(self.cost, PROMPT_TOKENS + (g as f64 + 1.5) * self.width, excess);
        let late: [f64; GRID] = std::array::from_fn(late);
        for outlook in &mut self.all {
            let mut beyond = 0.0; // expected seconds after g
            for g in (0..GRID - 1).rev() {
                let failed = 1.0 - outlook.distribution[g];
                let late = late[(g + outlook.done).min(GRID - 1)];
                beyond += failed * self.width * late;
                let again = match self.resumes {
                    true => 0.0,
                    false => (g + 1) as f64 * self.width * late + PROMPT_TOKENS * self.cost.prompt_token,
                };
                outlook.failure[g] = beyond + failed * again;
            }
        }
    }
}

impl Outlook {
    fn new(whole: &[f64; GRID], known: usize, done: usize, width: f64, pads: bool) -> Self {
        let before = if known == 0 { 0.0 } else { whole[known - 1] };
        let left = (1.0 - before).max(1e-9);
        let mut distribution = [1.0; GRID];
        for (g, point) in distribution.iter_mut().enumerate() {
            if let Some(at) = whole.get(g + done) {
                *point = ((at - before) / left).clamp(0.0, 1.0);
            }
        }
        let mut at_point = 0.0;
        let held = |g: usize| {
            let before = at_point;
            at_point += width * if pads { 1.0 } else { running(&distribution, g) };
            (before + at_point) / 2.0
        };
        Self {
            held: std::array::from_fn(held),
            ended: distribution.map(|p| p.max(1e-9).ln()),
            failure: [0.0; GRID],
            done,
            mean: distribution.iter().map(|f| 1.0 - f).sum::<f64>() * width,
            distribution,
        }
    }
}

/// How likely a request runs on in the middle between a point of the grid and the one before.
fn running(distribution: &[f64; GRID], g: usize) -> f64 {
    let before = if g == 0 { 0.0 } else { distribution[g - 1] };
    1.0 - (before + distribution[g]) / 2.0
}

/// The distribution on the grid up to `cap` that goes straight from 0 through the quantiles (ascending) to the cap.
pub(super) fn of_quantiles(quantiles: &[Quantile], cap: u32) -> [f64; GRID] {
    let width = f64::from(cap) / GRID as f64;
    let end = Quantile {
        probability: 1.0,
        tokens: cap,
    };
    let mut points = quantiles.iter().chain([&end]).peekable();
    let mut low = (0.0, 0.0);
    std::array::from_fn(|g| {
        let at = (g + 1) as f64 * width;
        while let Some(point) = points.next_if(|point| f64::from(point.tokens) <= at) {
            low = (f64::from(point.tokens), point.probability);
        }
        let Some(high) = points.peek() else { return 1.0 };
        let part = (at - low.0) / (f64::from(high.tokens) - low.0);
        (low.1 + part * (high.probability - low.1)).clamp(0.0, 1.0)
    })
}

/// Seconds of a useful token in a batch of failures, of the best size. The longest of b exponential lengths is expected
/// to be 1 + 1/2 + … + 1/b times the mean; of that excess a share is reckoned.
fn late_token(cost: &CostModel, context: f64, excess: f64) -> f64 {
    let mut harmonic = 0.0;
    let seconds = |b: usize| {
        harmonic += 1.0 / b as f64;
        cost.decode_step(b as f64, context) / b as f64 * (1.0 + excess * (harmonic - 1.0))
    };
    (1..=64).map(seconds).fold(f64::INFINITY, f64::min)
}

/// Sums over the sorted requests before each, so that a batch's figures are differences.
pub(super) struct Sums {
    /// `Σ ln P(ended by g)`: the logarithm of the probability that all have.
    pub ended: Vec<[f64; GRID]>,
    /// Expected seconds of finishing those that have not ended at g.
    pub failures: Vec<[f64; GRID]>,
    /// Tokens that their rows have got between each point of the grid and the one before.
    pub held: Vec<[f64; GRID]>,
    /// Tokens that need not be done again.
    pub done: Vec<f64>,
}

impl Sums {
    pub fn of<'a>(jobs: impl Iterator<Item = (&'a Outlook, u32)>) -> Self {
        let mut sums = Self {
            ended: vec![[0.0; GRID]],
            failures: vec![[0.0; GRID]],
            held: vec![[0.0; GRID]],
            done: vec![0.0],
        };
        let (mut ended, mut failures, mut held, mut before) = ([0.0; GRID], [0.0; GRID], [0.0; GRID], 0.0);
        for (outlook, done) in jobs {
            for g in 0..GRID {
                ended[g] += outlook.ended[g];
                failures[g] += outlook.failure[g];
                held[g] += outlook.held[g];
            }
            before += f64::from(done);
            sums.ended.push(ended);
            sums.failures.push(failures);
            sums.held.push(held);
            sums.done.push(before);
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantile(probability: f64, tokens: u32) -> Quantile {
        Quantile { probability, tokens }
    }

    #[test]
    fn a_distribution_goes_straight_between_quantiles() {
        // 64 points, 8 tokens apart. Half are up to 256, the rest up to 384, but for a tenth beyond.
        let points = of_quantiles(&[quantile(0.5, 256), quantile(0.9, 384)], 512);
        let at = |tokens: usize| points[tokens / 8 - 1];
        assert_eq!((at(128), at(256), at(384), at(512)), (0.25, 0.5, 0.9, 1.0));
        assert!((at(320) - 0.7).abs() < 1e-12 && (at(448) - 0.95).abs() < 1e-12);
    }

    #[test]
    fn quantiles_at_one_length_or_at_the_cap_are_a_jump() {
        let points = of_quantiles(&[quantile(0.1, 64), quantile(0.8, 64), quantile(0.9, 512)], 512);
        assert_eq!((points[7], points[63]), (0.8, 1.0));
        assert!(points[6] < 0.1 && points[62] < 0.9);
    }

    #[test]
    fn what_is_known_to_be_exceeded_is_left_out() {
        // Even up to 512 tokens. Known to exceed 256: even over the 256 that are left.
        let whole = std::array::from_fn(|g| (g + 1) as f64 / GRID as f64);
        let left = Outlook::new(&whole, 32, 32, 8.0, false);
        assert_eq!((left.distribution[15], left.distribution[31]), (0.5, 1.0));
        // 8 × Σ (1 - (g + 1) / 32) over 32 points: 8 × 15.5.
        assert!((left.mean - 124.0).abs() < 1e-9, "{}", left.mean);
        // In the middle of the first 8 tokens 3.9375 of 4: one in 32 has ended by their end. At the last point all that are left.
        assert!((left.held[0] - 3.9375).abs() < 1e-9, "{}", left.held[0]);
        assert!((left.held[GRID - 1] - 128.0).abs() < 1e-9, "{}", left.held[GRID - 1]);
        // Where it begins anew, the first 256 have to be done again.
        let anew = Outlook::new(&whole, 32, 0, 8.0, true);
        assert_eq!((anew.distribution[31], anew.distribution[47]), (0.0, 0.5));
        assert_eq!((anew.held[0], anew.held[GRID - 1]), (4.0, 508.0));
    }
}
