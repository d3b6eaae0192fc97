//! Drawing the next token.

use lengthwise_core::SamplingParams;
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::ModelError;
use crate::ops::vector;

/// How one token is drawn, decided before its logits are known.
#[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Draw {
    /// The request's settings.
    pub params: SamplingParams,
    /// A number in [0, 1); 0 at temperature 0, where none is needed.
    pub random: f64,
}

/// Draws one request's tokens. The n-th token depends on the request's seed and the logits alone: exactly one random
/// number is taken per token, so a request's sample does not depend on its batch.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    rng: ChaCha8Rng,
    /// Candidates of the current token, kept to save the allocation.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// At the beginning of the request's random stream.
    pub fn new(params: SamplingParams) -> Self {
        Self {
            params,
            rng: ChaCha8Rng::seed_from_u64(params.seed),
            candidates: Vec::new(),
        }
    }

    /// Where a request's random stream is after `drawn` tokens: a request that was interrupted goes on as it would have.
    pub fn at(params: SamplingParams, drawn: u64) -> Self {
        let mut sampler = Self::new(params);
        // A number of 64 bits is two words of the stream.
        sampler.rng.set_word_pos(2 * u128::from(drawn));
        sampler
    }

    /// The next token's draw, for a device that makes it from the logits as [`Sampler::sample`] would.
    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    pub(crate) fn next_draw(&mut self) -> Draw {
        let random = if self.is_greedy() { 0.0 } else { self.random() };
        Draw {
            params: self.params,
            random,
        }
    }

    fn is_greedy(&self) -> bool {
        self.params.temperature.is_nan() || self.params.temperature <= 0.0
    }

    /// 53 bits: a number in [0, 1).
    fn random(&mut self) -> f64 {
        (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// The next token; of equally likely ones the lowest at temperature 0.
    ///
    /// - `logits`: `[vocab]`
    ///
    /// # Errors
    /// No logit is finite.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, ModelError> {
        let (best, largest) = argmax(logits).ok_or(ModelError::NonFiniteLogits)?;
        if self.is_greedy() {
            return Ok(best);
        }
        let draw = self.random();
        let weigh = |logit: f32| ((logit - largest) / self.params.temperature).exp();
        let candidates = logits.iter().enumerate().filter(|(_, l)| l.is_finite());
        let candidates = candidates.map(|(token, &logit)| (token as u32, weigh(logit)));
        self.candidates.clear();
        // What has no weight may never be drawn, not even where sums are rounded.
        self.candidates.extend(candidates.filter(|(_, weight)| *weight > 0.0));
        self.keep_top_k();
        self.keep_top_p();
        Ok(pick(&self.candidates, draw).unwrap_or(best))
    }

    fn keep_top_k(&mut self) {
        let k = self.params.top_k as usize;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, by_weight);
            self.candidates.truncate(k);
            // In the order of the tokens again, so that a draw does not depend on how the selection moved them.
            self.candidates.sort_unstable_by_key(|(token, _)| *token);
        }
    }

    fn keep_top_p(&mut self) {
        if self.params.top_p.is_nan() || self.params.top_p >= 1.0 {
            return;
        }
        let total: f64 = self.candidates.iter().map(|(_, w)| f64::from(*w)).sum();
        let enough = total * f64::from(self.params.top_p.max(0.0));
        // A full sort of a large vocabulary costs more than the rest of the draw: only the heaviest are sorted, four
        // times as many until they suffice.
        let mut heaviest = 256;
        while heaviest < self.candidates.len() {
            self.candidates.select_nth_unstable_by(heaviest - 1, by_weight);
            let sum: f64 = self.candidates[..heaviest].iter().map(|(_, w)| f64::from(*w)).sum();
            if sum >= enough {
                self.candidates.truncate(heaviest);
            }
            heaviest *= 4;
        }
        self.candidates.sort_unstable_by(by_weight);
        let mut sum = 0.0;
        let reaches = |(_, w): &(u32, f32)| {
            sum += f64::from(*w);
            sum >= enough
        };
        if let Some(last) = self.candidates.iter().position(reaches) {
            self.candidates.truncate(last + 1);
        }
        // In the order of the tokens again, as a device draws.
        self.candidates.sort_unstable_by_key(|(token, _)| *token);
    }
}

/// The heaviest first, of equals the lowest token.
fn by_weight(a: &(u32, f32), b: &(u32, f32)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// The token at `draw` (in [0, 1)) of the candidates' weights laid end to end.
fn pick(candidates: &[(u32, f32)], draw: f64) -> Option<u32> {
    let total: f64 = candidates.iter().map(|(_, w)| f64::from(*w)).sum();
    let mut left = draw * total;
    for (token, weight) in candidates {
        left -= f64::from(*weight);
        if left < 0.0 {
            return Some(*token);
        }
    }
    candidates.last().map(|(token, _)| *token)
}

/// The largest finite logit and the first token that has it.
fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    // Nearly always all are finite, and then the largest is found many at a time.
    let largest = vector::max(logits);
    if largest.is_finite() {
        let first = vector::position(logits, largest)?;
        return Some((first as u32, largest));
    }
    let mut best: Option<(u32, f32)> = None;
    for (token, &logit) in logits.iter().enumerate() {
        if logit.is_finite() && best.is_none_or(|(_, b)| logit > b) {
            best = Some((token as u32, logit));
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(params: SamplingParams, logits: &[f32], draws: usize) -> Vec<usize> {
        let mut sampler = Sampler::new(params);
        let mut counts = vec![0; logits.len()];
        for _ in 0..draws {
            counts[sampler.sample(logits).expect("finite logits") as usize] += 1;
        }
        counts
    }

    fn params(temperature: f32, top_k: u32, top_p: f32) -> SamplingParams {
        SamplingParams {
            temperature,
            top_k,
            top_p,
            seed: 3,
        }
    }

    #[test]
    fn temperature_zero_takes_the_lowest_of_the_most_likely() {
        let mut sampler = Sampler::new(SamplingParams::GREEDY);
        assert_eq!(sampler.sample(&[1.0, 5.0, 5.0, f32::NAN]).expect("finite"), 1);
        assert!(sampler.sample(&[f32::NAN, f32::NEG_INFINITY]).is_err());
    }

    #[test]
    fn draws_follow_the_distribution() {
        // Weights 1 : 2 : 5 at temperature 1, 1 : 4 : 25 at one half.
        let logits = [0.0, 2f32.ln(), 5f32.ln()];
        let got = counts(params(1.0, 0, 1.0), &logits, 8000);
        assert!(
            (900..1100).contains(&got[0]) && (4850..5150).contains(&got[2]),
            "{got:?}"
        );
        let got = counts(params(0.5, 0, 1.0), &logits, 3000);
        assert!((60..140).contains(&got[0]) && (2400..2600).contains(&got[2]), "{got:?}");
    }

    #[test]
    fn top_k_and_top_p_cut_the_unlikely() {
        let logits = [0.0, 2f32.ln(), 5f32.ln()];
        assert_eq!(counts(params(1.0, 2, 1.0), &logits, 500)[0], 0);
        assert_eq!(counts(params(1.0, 1, 1.0), &logits, 50), [0, 0, 50]);
        // 5/8 is enough for 0.6, 7/8 needs two.
        assert_eq!(counts(params(1.0, 0, 0.6), &logits, 50), [0, 0, 50]);
        let got = counts(params(1.0, 0, 0.8), &logits, 500);
        assert!(got[0] == 0 && got[1] > 0, "{got:?}");
    }

    #[test]
    fn top_p_keeps_of_a_large_vocabulary_what_a_full_sort_keeps() {
        // Zipf's weights 1/n, out of order: the heaviest whose sum first reaches nine tenths.
        let n = 5000u32;
        let rank = |token: u32| (token * 1237) % n + 1;
        let logits: Vec<f32> = (0..n).map(|t| -(rank(t) as f32).ln()).collect();
        let total: f64 = (1..=n).map(|r| 1.0 / f64::from(r)).sum();
        let mut sum = 0.0;
        let kept = (1..=n)
            .take_while(|r| {
                let before = sum;
                sum += 1.0 / f64::from(*r);
                before < 0.9 * total
            })
            .count();
        let mut sampler = Sampler::new(params(1.0, 0, 0.9));
        sampler.sample(&logits).expect("finite");
        assert!(
            sampler.candidates.len().abs_diff(kept) <= 1,
            "{} kept, want {kept}",
            sampler.candidates.len()
        );
        assert!(sampler.candidates.iter().all(|(t, _)| rank(*t) as usize <= kept + 1));
    }

    #[test]
    fn values_that_are_not_finite_are_never_drawn() {
        let logits = [f32::NAN, 0.0, f32::NEG_INFINITY, 0.0, f32::INFINITY, -1e9];
        let got = counts(params(1.0, 0, 1.0), &logits, 400);
        assert_eq!([got[0], got[2], got[4], got[5]], [0; 4]);
        assert!(got[1] > 100 && got[3] > 100, "{got:?}");
        assert_eq!(counts(params(f32::NAN, 0, 1.0), &[0.0, 1.0], 5), [0, 5]);
    }

    #[test]
    fn a_stream_goes_on_where_it_was_interrupted() {
        let params = params(1.0, 0, 1.0);
        let mut whole = Sampler::new(params);
        let tokens: Vec<u32> = (0..12).map(|_| whole.sample(&[0.0; 90]).expect("finite")).collect();
        for drawn in [0, 1, 7] {
            let mut rest = Sampler::at(params, drawn);
            for want in &tokens[drawn as usize..] {
                assert_eq!(rest.sample(&[0.0; 90]).expect("finite"), *want, "after {drawn}");
            }
        }
    }

    #[test]
    fn a_token_depends_on_its_place_and_logits_not_on_what_was_drawn_before() {
        let params = params(1.0, 0, 1.0);
        let (mut a, mut b) = (Sampler::new(params), Sampler::new(params));
        a.sample(&[0.0; 8]).expect("finite");
        b.sample(&[0.0, 9.0]).expect("finite");
        assert_eq!(
            a.sample(&[0.0; 70]).expect("finite"),
            b.sample(&[0.0; 70]).expect("finite")
        );
    }

    #[test]
    fn the_same_seed_draws_the_same_tokens() {
        let run = |seed| {
            let mut sampler = Sampler::new(SamplingParams {
                temperature: 1.0,
                top_k: 0,
                top_p: 1.0,
                seed,
            });
            (0..20)
                .map(|_| sampler.sample(&[0.0; 50]).expect("finite"))
                .collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }
}
