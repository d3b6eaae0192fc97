//! How good predictions are.

use lengthwise_core::LengthEstimate;
use serde::{Deserialize, Serialize};

/// One predictor's figures, as `--json` prints them; null where it has none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PredictorRow {
    /// Its name.
    pub predictor: String,
    /// Instructions.
    pub n: usize,
    /// Mean absolute error, in tokens.
    pub error: f64,
    /// Share within 50 tokens.
    pub acc_50: f64,
    /// Share within 100 tokens.
    pub acc_100: f64,
    /// Share predicted below the true length.
    pub underestimate_rate: f64,
    /// Rank correlation; null where all predictions or all lengths are equal.
    pub kendall_tau: Option<f64>,
    /// Share inside the 90 % interval; null where there is none.
    pub coverage_90: Option<f64>,
    /// Time per prediction, in milliseconds.
    pub ms_per_prediction: Option<f64>,
}

/// The results of several predictors.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PredictorReport {
    /// In the order they were evaluated.
    pub predictors: Vec<PredictorRow>,
}

/// Figures of predictions against the true lengths; `pairs` is (predicted, true), at least one.
pub fn evaluate(name: &str, pairs: &[(u32, u32)]) -> PredictorRow {
    let n = pairs.len().max(1) as f64;
    let share = |test: &dyn Fn(u32, u32) -> bool| pairs.iter().filter(|&&(p, t)| test(p, t)).count() as f64 / n;
    PredictorRow {
        predictor: name.to_owned(),
        n: pairs.len(),
        error: pairs.iter().map(|&(p, t)| f64::from(p.abs_diff(t))).sum::<f64>() / n,
        acc_50: share(&|p, t| p.abs_diff(t) <= 50),
        acc_100: share(&|p, t| p.abs_diff(t) <= 100),
        underestimate_rate: share(&|p, t| p < t),
        kendall_tau: kendall_tau(pairs),
        coverage_90: None,
        ms_per_prediction: None,
    }
}

/// Share of the sampled lengths inside the estimates' 90 % intervals, from their 5 % to their 95 % quantile; `lengths` has
/// the samples of each estimate's instruction, every sample counts alike. `None` where there are no samples, or an estimate
/// has no quantiles as far out as that.
pub fn coverage_90<L: AsRef<[u32]>>(estimates: &[LengthEstimate], lengths: &[L]) -> Option<f64> {
    const REACH: f64 = 1e-9;
    let (mut inside, mut n) = (0, 0);
    for (estimate, lengths) in estimates.iter().zip(lengths) {
        let (first, last) = (estimate.quantiles.first()?, estimate.quantiles.last()?);
        if first.probability > 0.05 + REACH || last.probability < 0.95 - REACH {
            return None;
        }
        let interval = estimate.quantile(0.05)..=estimate.quantile(0.95);
        inside += lengths.as_ref().iter().filter(|l| interval.contains(l)).count();
        n += lengths.as_ref().len();
    }
    (n > 0).then(|| inside as f64 / n as f64)
}

/// Kendall's tau-b, which allows for ties: (concordant - discordant) / sqrt((all - ties in x)(all - ties in y)).
/// Knight's algorithm (1966), O(n log n).
fn kendall_tau(pairs: &[(u32, u32)]) -> Option<f64> {
    let ties = |keys: &mut dyn Iterator<Item = (u32, u32)>| -> u64 {
        let mut keys: Vec<_> = keys.collect();
        keys.sort_unstable();
        keys.chunk_by(|a, b| a == b)
            .map(|run| (run.len() * (run.len() - 1) / 2) as u64)
            .sum()
    };
    let ties_x = ties(&mut pairs.iter().map(|&(x, _)| (x, 0)));
    let ties_y = ties(&mut pairs.iter().map(|&(_, y)| (y, 0)));
    let ties_both = ties(&mut pairs.iter().copied());
    let mut sorted = pairs.to_vec();
    sorted.sort_unstable();
    let mut ys: Vec<u32> = sorted.iter().map(|&(_, y)| y).collect();
    // Sorted by x and then y, a pair is discordant exactly where its ys are out of order.
    let discordant = inversions(&mut ys);
    let all = (pairs.len() * pairs.len().saturating_sub(1) / 2) as u64;
    let untied = ((all - ties_x) as f64 * (all - ties_y) as f64).sqrt();
    let concordant = all + ties_both - ties_x - ties_y - discordant;
    (untied > 0.0).then(|| (concordant as f64 - discordant as f64) / untied)
}

/// Sorts, and counts the pairs that were out of order.
fn inversions(values: &mut [u32]) -> u64 {
    if values.len() < 2 {
        return 0;
    }
    let (left, right) = values.split_at_mut(values.len() / 2);
    let mut count = inversions(left) + inversions(right);
    let mut merged = Vec::with_capacity(left.len() + right.len());
    let (mut i, mut j) = (0, 0);
    while i < left.len() && j < right.len() {
        if right[j] < left[i] {
            count += (left.len() - i) as u64;
            merged.push(right[j]);
            j += 1;
        } else {
            merged.push(left[i]);
            i += 1;
        }
    }
    merged.extend_from_slice(&left[i..]);
    merged.extend_from_slice(&right[j..]);
    values.copy_from_slice(&merged);
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use lengthwise_core::Quantile;
    use proptest::prelude::*;

    #[test]
    fn figures_of_a_hand_worked_case() {
        // Errors 0, 50, 51, 150; the second is too low, the others not.
        let row = evaluate("x", &[(10, 10), (50, 100), (151, 100), (300, 150)]);
        assert_eq!(
            (row.error, row.acc_50, row.acc_100, row.underestimate_rate),
            (62.75, 0.5, 0.75, 0.25)
        );
        // Truths 10, 100, 100, 150 in the order of the predictions: 5 concordant, 1 tie in the truths.
        let tau = row.kendall_tau.expect("it varies");
        assert!((tau - 5.0 / 30f64.sqrt()).abs() < 1e-12, "{tau}");
    }

    #[test]
    fn a_constant_has_no_rank_correlation() {
        assert_eq!(evaluate("x", &[(5, 1), (5, 2)]).kendall_tau, None);
        assert_eq!(evaluate("x", &[(5, 1)]).kendall_tau, None);
        assert_eq!(evaluate("x", &[]).kendall_tau, None);
    }

    #[test]
    fn figures_are_printed_under_the_names_that_readers_rely_on() {
        let row = PredictorRow {
            ms_per_prediction: Some(1.5),
            ..evaluate("x", &[(10, 20)])
        };
        let want = r#"{"predictor":"x","n":1,"error":10.0,"acc_50":1.0,"acc_100":1.0,"underestimate_rate":1.0,"#;
        let want = format!(r#"{want}"kendall_tau":null,"coverage_90":null,"ms_per_prediction":1.5}}"#);
        assert_eq!(serde_json::to_string(&row).expect("JSON"), want);
        assert!(
            !serde_json::to_string(&evaluate("x", &[]))
                .expect("JSON")
                .contains("NaN")
        );
    }

    #[test]
    fn coverage_counts_truths_inside_the_interval() {
        let quantile = |probability, tokens| Quantile { probability, tokens };
        let estimate = |low, high| LengthEstimate {
            quantiles: vec![quantile(0.05, low), quantile(0.95, high)],
            ..LengthEstimate::of(high)
        };
        // Both ends belong to the interval: 10 and 90 are inside, 9 and 91 are not.
        let estimates = vec![estimate(10, 90); 2];
        assert_eq!(coverage_90(&estimates, &[vec![10, 90, 9], vec![91]]), Some(0.5));
        assert_eq!(coverage_90(&[estimate(1, 9), LengthEstimate::of(9)], &[[5], [5]]), None);
        let narrow = LengthEstimate {
            quantiles: vec![quantile(0.25, 1), quantile(0.75, 9)],
            ..LengthEstimate::of(9)
        };
        assert_eq!(coverage_90(&[narrow], &[[5]]), None);
        assert_eq!(coverage_90(&[], &[[5]]), None);
    }

    proptest! {
        #[test]
        fn tau_is_the_count_over_all_pairs(pairs in prop::collection::vec((0u32..12, 0u32..12), 2..40)) {
            let (mut sum, mut tied_x, mut tied_y, mut all) = (0i64, 0i64, 0i64, 0i64);
            for (i, a) in pairs.iter().enumerate() {
                for b in &pairs[i + 1..] {
                    let sign = |p: u32, q: u32| (i64::from(p) - i64::from(q)).signum();
                    let (x, y) = (sign(a.0, b.0), sign(a.1, b.1));
                    sum += x * y;
                    tied_x += i64::from(x == 0);
                    tied_y += i64::from(y == 0);
                    all += 1;
                }
            }
            let untied = ((all - tied_x) as f64 * (all - tied_y) as f64).sqrt();
            match kendall_tau(&pairs) {
                Some(tau) => prop_assert!((tau - sum as f64 / untied).abs() < 1e-9),
                None => prop_assert!(untied == 0.0),
            }
        }
    }
}
