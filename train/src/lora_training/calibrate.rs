//! A head's temperature and point estimate, fitted on instructions that it was not trained on.

use lengthwise_model::{LengthDistribution, LengthHead, Llama, ModelError};

use super::data::Encoded;
use super::tuned::Tuned;

/// Prompt tokens in one forward pass.
const PASS_TOKENS: usize = 2048;
/// Prompts between two looks at whether the run is to end.
const PROMPTS: usize = 64;

/// How a calibration ended.
pub(super) enum Calibration {
    /// The head is fitted, or there is nothing to fit.
    Done,
    /// The run is to end.
    Stopped,
}

/// Fits the head to `held_out`; without examples it stays as it is.
///
/// - `temperature` (Guo et al. 2017, arXiv 1706.04599): least mean negative log-likelihood of the sampled lengths.
/// - `point_probability`: least mean absolute error of the largest sampled length. The samples of an instruction share
///   what the head does not know of it, so that they are not independent given the prediction: the largest of four lies
///   lower than `F⁴` says.
pub(super) fn calibrate(
    tuned: &mut Tuned,
    llama: &Llama,
    held_out: &[Encoded],
    stop: &dyn Fn() -> bool,
) -> Result<Calibration, ModelError> {
    let Some(head) = tuned.head.as_mut().filter(|_| !held_out.is_empty()) else {
        return Ok(Calibration::Done);
    };
    let mut logits = Vec::with_capacity(held_out.len());
    for examples in held_out.chunks(PROMPTS) {
        if stop() {
            return Ok(Calibration::Stopped);
        }
        let prompts: Vec<&[u32]> = examples.iter().map(Encoded::tokens).collect();
        logits.extend(head.predict(llama, Some(&tuned.adapter), &prompts, PASS_TOKENS)?);
    }
    let lengths: Vec<&[u32]> = held_out.iter().map(Encoded::lengths).collect();
    fit(head, &logits, &lengths)?;
    Ok(Calibration::Done)
}

fn fit(head: &mut LengthHead, logits: &[Vec<f32>], lengths: &[&[u32]]) -> Result<(), ModelError> {
    // From 1/2 to 4 in steps of 3.5 %, short enough to be read back from JSON as they are.
    let temperatures = (0..=60).map(|i| (500.0 * 2f64.powf(f64::from(i) / 20.0)).round() / 1000.0);
    head.config.temperature = least(temperatures, |temperature| {
        head.config.temperature = temperature;
        let distributions = head.distributions(logits)?;
        Ok(distributions
            .iter()
            .zip(lengths)
            .map(|(f, l)| surprise(f, head, l))
            .sum())
    })?;
    let distributions = head.distributions(logits)?;
    let cap = head.config.bins.max_tokens();
    let largest: Vec<u32> = lengths
        .iter()
        .map(|l| l.iter().copied().max().unwrap_or(0).min(cap))
        .collect();
    let error = |point: f64| {
        let pairs = distributions.iter().zip(&largest);
        Ok(pairs.map(|(f, &l)| f64::from(f.quantile(point).abs_diff(l))).sum())
    };
    head.config.point_probability = least((30..=98).map(|i| f64::from(i) / 100.0), error)?;
    Ok(())
}

/// Mean negative log-likelihood of an instruction's sampled lengths, in nats.
fn surprise(f: &LengthDistribution, head: &LengthHead, lengths: &[u32]) -> f64 {
    let p = f.probabilities();
    let one = |&tokens: &u32| -p[head.config.bins.of(tokens)].max(1e-12).ln();
    lengths.iter().map(one).sum::<f64>() / lengths.len().max(1) as f64
}

/// The candidate with the least cost.
fn least(
    candidates: impl Iterator<Item = f64>,
    mut cost: impl FnMut(f64) -> Result<f64, ModelError>,
) -> Result<f64, ModelError> {
    let mut best = (f64::INFINITY, 1.0);
    for candidate in candidates {
        let cost = cost(candidate)?;
        if cost < best.0 {
            best = (cost, candidate);
        }
    }
    Ok(best.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use lengthwise_model::{LengthBins, LengthHeadConfig, largest_of};

    #[test]
    fn the_temperature_makes_the_shares_true_and_the_point_is_the_median_of_the_largest() -> anyhow::Result<()> {
        let config = LengthHeadConfig {
            bins: LengthBins::new(3),
            asks_length: false,
            smoothing: 0.0,
            samples: 2,
            temperature: 1.0,
            point_probability: largest_of(2),
        };
        let mut head = LengthHead::init(config, 1, &[1.0; 3], &Device::Cpu)?;
        // Odds of 9 to 1 are said of a length of 1 or 3, odds of 3 to 1 are true: at the temperature 2, √9 = 3.
        let logits = vec![vec![9f32.ln(), -30.0, 0.0]; 2];
        let samples: [&[u32]; 2] = [&[1, 1], &[1, 3]];
        fit(&mut head, &logits, &samples)?;
        assert!(
            (head.config.temperature - 2.0).abs() < 0.04,
            "{}",
            head.config.temperature
        );
        // The largest are 1 and 3: every point has the same error, and the first candidate stays.
        assert!((head.config.point_probability - 0.3).abs() < 1e-9);
        // The largest are 1, 3 and 3: only what lies above the share of 1 says 3.
        let (logits, samples): (Vec<_>, [&[u32]; 3]) = (vec![logits[0].clone(); 3], [&[1, 1], &[1, 3], &[3, 1]]);
        fit(&mut head, &logits, &samples)?;
        let f = head.distributions(&logits)?;
        assert_eq!(f[0].quantile(head.config.point_probability), 3);
        Ok(())
    }
}
