//! What a batch of each size costs.

use super::outlook::Sums;
use crate::CostModel;
use crate::residuals::GRID;
use crate::simulate::PROMPT_TOKENS;

/// Batch sizes that are tried; all of them would cost ten times the planning and save little.
const SIZES: [usize; 16] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];
/// Points of the grid that are reckoned together.
const CHUNK: usize = 8;
/// A batch of which so few are expected to run on has ended.
const NOBODY: f64 = 1e-3;

/// The costs of all sizes.
pub(super) struct StepCosts(Vec<SizeCosts>);

/// The costs of a batch of one size.
pub(super) struct SizeCosts {
    pub size: usize,
    prompts: f64,
    /// Seconds from one point of the grid to the next, but for what the cached tokens cost.
    cell: f64,
    /// Seconds of a cell for each cached token, and for each that is more than the usual price is for.
    token: f64,
    token_beyond: f64,
    /// Cached tokens that the usual price is for.
    usual_tokens: f64,
    width: f64,
}

impl StepCosts {
    /// `width`: tokens from one point of the grid to the next.
    pub fn of(cost: &CostModel, width: f64) -> Self {
        let of_size = |size: usize| SizeCosts {
            size,
            prompts: size as f64 * cost.prompt_token * PROMPT_TOKENS,
            cell: width * cost.decode_step(size as f64, 0.0),
            token: width * cost.cached_token,
            token_beyond: cost.many_cached_tokens.map_or(0.0, |rise| width * rise.more),
            usual_tokens: cost.many_cached_tokens.map_or(0.0, |rise| rise.beyond),
            width,
        };
        Self(SIZES.map(of_size).into())
    }

    /// Those of at most so many requests, `first` before the others.
    pub fn up_to(&self, requests: usize, first: usize) -> impl Iterator<Item = &SizeCosts> {
        let fit = || self.0.iter().take_while(move |costs| costs.size <= requests);
        let others = fit().filter(move |costs| costs.size != first);
        fit().filter(move |costs| costs.size == first).chain(others)
    }
}

impl SizeCosts {
    /// Expected seconds of a batch of the last `size` requests before `end`, what it leaves undone included, and where it
    /// had best stop on the grid. `None` where that is not below `bound`, or where it would hold more than `room` tokens.
    pub fn batch(&self, sums: &Sums, end: usize, room: f64, may_stop: bool, bound: f64) -> Option<(f64, usize)> {
        let first = end - self.size;
        let (ended, ended_before) = (&sums.ended[end], &sums.ended[first]);
        let (failures, failures_before) = (&sums.failures[end], &sums.failures[first]);
        let (held, held_before) = (&sums.held[end], &sums.held[first]);
        let done = sums.done[end] - sums.done[first];
        let at_first = done + self.size as f64 * PROMPT_TOKENS;
        let room = ((room - done) / self.size as f64).max(self.width);
        let mut seconds = self.prompts;
        let mut before = 1.0;
        let mut best = (bound, GRID);
        let mut running = [1.0; CHUNK];
        for g in 0..GRID {
            if g % CHUNK == 0 {
                // The share of batches that run on after each point: a few in one loop, which is vectorised.
                running = shares(&ended[g..g + CHUNK], &ended_before[g..g + CHUNK]);
            }
            let tokens = at_first + (held[g] - held_before[g]);
            let beyond = (tokens - self.usual_tokens).max(0.0);
            seconds += before * (self.cell + self.token * tokens + self.token_beyond * beyond);
            before = running[g % CHUNK];
            // What is spent already is no longer below what is known to do.
            if seconds > best.0 || self.size > 1 && before > NOBODY && (g + 1) as f64 * self.width > room {
                break;
            }
            let over = before < NOBODY || g == GRID - 1;
            let whole = seconds + (failures[g] - failures_before[g]);
            // Of stops that cost the same the latest: it leaves less to the model of failures.
            if whole <= best.0 && (may_stop || over) {
                best = (whole, if may_stop { g } else { GRID - 1 });
            }
            if over {
                break;
            }
        }
        (best.0 < bound).then_some(best)
    }
}

/// The shares of batches that run on, of the logarithms of how likely all requests up to the last of a batch, and all
/// before its first, have ended. On its own, since within the loop that uses it planning took longer in most trials.
#[inline(never)]
fn shares(ended: &[f64], before: &[f64]) -> [f64; CHUNK] {
    let mut shares = [0.0; CHUNK];
    for ((share, ended), before) in shares.iter_mut().zip(ended).zip(before) {
        *share = 1.0 - exp(ended - before);
    }
    shares
}

/// `e^x` for x up to 0, within a millionth; 0 below -14. Without a call, so that a loop over it is vectorised: most of
/// the planning's time goes in here.
fn exp(x: f64) -> f64 {
    // Adding and taking away 1.5 × 2^52 rounds to a whole number, whose low bits then are those of the sum.
    const ROUND: f64 = 6_755_399_441_055_744.0;
    let power = x.max(-700.0) * std::f64::consts::LOG2_E;
    let rounded = power + ROUND;
    let x = (power - (rounded - ROUND)) * std::f64::consts::LN_2;
    // |x| is at most ln 2 / 2: the next term of the series is below 4e-7 of the whole.
    let part = 1.0 + x * (1.0 + x * (0.5 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0 + x / 720.0)))));
    let scale = f64::from_bits((rounded.to_bits() << 52).wrapping_add(1023 << 52));
    // A mask and not an `if`, which could become a branch that is often guessed wrong.
    let keep = u64::from(power >= -20.2).wrapping_neg();
    f64::from_bits((part * scale).to_bits() & keep)
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn the_exponential_is_right_to_a_millionth_and_zero_far_below() {
        for i in 0..14_000 {
            let x = -f64::from(i) / 1000.0;
            assert!((exp(x) / x.exp() - 1.0).abs() < 1e-6, "at {x}: {}", exp(x));
        }
        assert_eq!([0.0, -15.0, -1e9, f64::NEG_INFINITY].map(exp), [1.0, 0.0, 0.0, 0.0]);
    }
}
