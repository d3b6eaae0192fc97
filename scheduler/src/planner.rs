//! Cutting a group of requests into the batches that take the least time, by a cost model.

use std::collections::HashMap;

use lengthwise_core::RequestId;

use crate::residuals::{GRID, Residuals};
use crate::simulate::PROMPT_TOKENS;
use crate::{CostModel, Job, PlannedBatch, Planning, ScheduleConfig};

/// Batch sizes that are tried; all of them would cost ten times the planning and save little.
const SIZES: [usize; 16] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256];
/// Sequences × stopping length of a batch: what the published table's largest batches hold (256 × 50).
const PUBLISHED_CACHE: usize = 12_800;

/// Plans with a cost model and with what earlier groups have shown of the predictions.
pub(crate) struct Planner<'a> {
    cost: CostModel,
    config: &'a ScheduleConfig,
    resumes: bool,
    residuals: Residuals,
    /// Seconds of a token that a failure still needs, by where it stands on the grid.
    late_tokens: [f64; GRID],
}

/// A request as the planner sees it.
struct Expected<'a> {
    job: &'a Job,
    /// `P(at most so many tokens are left)` on the grid.
    distribution: [f64; GRID],
    mean: f64,
}

impl<'a> Planner<'a> {
    /// `resumes`: whether a request that was stopped goes on from where it was.
    pub fn new(planning: &Planning, config: &'a ScheduleConfig, resumes: bool) -> Self {
        let cost = planning.cost;
        let mut residuals = Residuals::default();
        residuals.observe(planning.history.iter().copied());
        let width = f64::from(config.cap()) / GRID as f64;
        let late = |g: usize| late_token(&cost, PROMPT_TOKENS + (g as f64 + 1.5) * width);
        Self {
            cost,
            config,
            resumes,
            residuals,
            late_tokens: std::array::from_fn(late),
        }
    }

    /// Takes note of a group's answers.
    pub fn observe(&mut self, group: &[Job], lengths: &HashMap<RequestId, u32>) {
        let ended = group
            .iter()
            .filter_map(|job| Some((job.predicted, *lengths.get(&job.id)?)));
        self.residuals.observe(ended);
    }

    /// Batches of a group, each with the stopping length that is expected to save most.
    pub fn plan(&self, group: &[Job]) -> Vec<PlannedBatch> {
        self.best(
            group.iter().map(|job| self.expect(job, 0, 0)).collect(),
            self.config.fcr,
        )
    }

    /// Batches of those of a group that were stopped, `(id, tokens so far)`, each run to its end.
    pub fn plan_rest(&self, group: &[Job], stopped: &[(RequestId, u32)]) -> Vec<PlannedBatch> {
        let tokens: HashMap<&RequestId, u32> = stopped.iter().map(|(id, tokens)| (id, *tokens)).collect();
        let left = group.iter().filter_map(|job| {
            let known = *tokens.get(&job.id)?;
            Some(self.expect(job, known, if self.resumes { known } else { 0 }))
        });
        self.best(left.collect(), false)
    }

    /// What is left of a request whose answer is known to be longer than `known`, of which `done` need not be done again.
    fn expect<'j>(&self, job: &'j Job, known: u32, done: u32) -> Expected<'j> {
        let whole = self.residuals.distribution(job.predicted, self.config.cap());
        let cell = |tokens: u32| (tokens as usize * GRID / self.config.cap() as usize).min(GRID - 1);
        let (known, done) = (cell(known), cell(done));
        let before = if known == 0 { 0.0 } else { whole[known - 1] };
        let left = (1.0 - before).max(1e-9);
        let mut distribution = [1.0; GRID];
        for (g, point) in distribution.iter_mut().enumerate() {
            if let Some(at) = whole.get(g + done) {
                *point = ((at - before) / left).clamp(0.0, 1.0);
            }
        }
        let mean = distribution.iter().map(|f| 1.0 - f).sum::<f64>() * self.width();
        Expected {
            job,
            distribution,
            mean,
        }
    }

    /// Tokens from one point of the grid to the next.
    fn width(&self) -> f64 {
        f64::from(self.config.cap()) / GRID as f64
    }

    /// The cheapest cut of the requests in the order of their expected lengths: dynamic programming over where the
    /// last batch begins.
    fn best(&self, mut jobs: Vec<Expected>, may_stop: bool) -> Vec<PlannedBatch> {
        jobs.sort_by(|a, b| a.mean.total_cmp(&b.mean));
        let sums = Sums::of(&jobs, self);
        // (seconds, batch size, stop on the grid); where a cost is no number, each request runs alone.
        let mut best = vec![(f64::INFINITY, 1, GRID - 1); jobs.len() + 1];
        best[0].0 = 0.0;
        for end in 1..=jobs.len() {
            for size in SIZES.into_iter().take_while(|size| *size <= end) {
                let (seconds, stop) = self.batch(&sums, end - size, end, may_stop);
                let seconds = seconds + best[end - size].0;
                if seconds < best[end].0 {
                    best[end] = (seconds, size, stop);
                }
            }
        }
        let mut batches = Vec::new();
        let mut end = jobs.len();
        while end > 0 {
            let (_, size, stop) = best[end];
            let ids = jobs[end - size..end].iter().map(|e| e.job.id.clone()).collect();
            let stop_at = ((stop as f64 + 1.0) * self.width()).round() as u32;
            let stop_at = if may_stop {
                stop_at.clamp(1, self.config.cap())
            } else {
                self.config.cap()
            };
            batches.push(PlannedBatch { ids, stop_at });
            end -= size;
        }
        batches.reverse();
        batches
    }

    /// Expected seconds of a batch of the requests `first..end`, what it leaves undone included, and where it had best
    /// stop on the grid. Infinite where it would hold too many tokens.
    fn batch(&self, sums: &Sums, first: usize, end: usize, may_stop: bool) -> (f64, usize) {
        let (size, width) = ((end - first) as f64, self.width());
        let published = self.config.batch_size.get() * self.config.cap() as usize;
        let room = PUBLISHED_CACHE.max(published) as f64 / size;
        let mut seconds = size * self.cost.prompt_token * PROMPT_TOKENS;
        let mut best = (f64::INFINITY, GRID - 1);
        // One until the first cell in which the batch may end.
        let mut running = 1.0;
        for g in 0..GRID {
            let context = PROMPT_TOKENS + (g as f64 + 0.5) * width;
            seconds += running * width * self.cost.decode_step(size, context);
            running = 1.0 - sums.all_ended(first, end, g);
            let left = sums.failures(first, end, g);
            let too_long = running > 1e-3 && (g + 1) as f64 * width > room.max(width);
            if too_long && size > 1.0 {
                return best;
            }
            let whole = seconds + left;
            // Of stops that cost the same the latest: it leaves less to the model of failures.
            if (may_stop || g == GRID - 1) && whole <= best.0 {
                best = (whole, g);
            }
            if running < 1e-3 && !may_stop {
                // Nobody is expected beyond.
                return (whole, GRID - 1);
            }
            if running < 1e-3 {
                break;
            }
        }
        best
    }

    /// Expected seconds of finishing one request that is stopped at each point of the grid.
    fn failure_costs(&self, distribution: &[f64; GRID]) -> [f64; GRID] {
        let (width, mut costs) = (self.width(), [0.0; GRID]);
        let mut beyond = 0.0; // expected seconds after g
        for g in (0..GRID - 1).rev() {
            let failed = 1.0 - distribution[g];
            let token = self.late_tokens[g];
            beyond += failed * width * token;
            let again = match self.resumes {
                true => 0.0,
                false => failed * ((g + 1) as f64 * width * token + PROMPT_TOKENS * self.cost.prompt_token),
            };
            costs[g] = beyond + again;
        }
        costs
    }
}

/// Seconds of a useful token in a batch of failures, of the best size. The longest of b exponential lengths is expected
/// to be 1 + 1/2 + … + 1/b times the mean; half of that excess is reckoned, since failures are sorted as well.
fn late_token(cost: &CostModel, context: f64) -> f64 {
    let mut harmonic = 0.0;
    let seconds = |b: usize| {
        harmonic += 1.0 / b as f64;
        cost.decode_step(b as f64, context) / b as f64 * (1.0 + harmonic) / 2.0
    };
    (1..=64).map(seconds).fold(f64::INFINITY, f64::min)
}

/// Sums over the sorted requests before each, so that a batch's figures are differences.
struct Sums {
    /// `Σ ln P(ended by g)`: the logarithm of the probability that all have.
    ended: Vec<[f64; GRID]>,
    /// Expected seconds of finishing those that have not ended at g.
    failures: Vec<[f64; GRID]>,
}

impl Sums {
    fn of(jobs: &[Expected], planner: &Planner) -> Self {
        let mut sums = Self {
            ended: Vec::with_capacity(jobs.len() + 1),
            failures: Vec::with_capacity(jobs.len() + 1),
        };
        let (mut ended, mut failures) = ([0.0; GRID], [0.0; GRID]);
        sums.ended.push(ended);
        sums.failures.push(failures);
        for job in jobs {
            let costs = planner.failure_costs(&job.distribution);
            for g in 0..GRID {
                ended[g] += job.distribution[g].max(1e-9).ln();
                failures[g] += costs[g];
            }
            sums.ended.push(ended);
            sums.failures.push(failures);
        }
        sums
    }

    /// The probability that all of `first..end` have ended by g.
    fn all_ended(&self, first: usize, end: usize, g: usize) -> f64 {
        match self.ended[end][g] - self.ended[first][g] {
            // Below a millionth; most of the planning's time would go into finding out how far.
            log if log < -14.0 => 0.0,
            log => log.exp(),
        }
    }

    fn failures(&self, first: usize, end: usize, g: usize) -> f64 {
        self.failures[end][g] - self.failures[first][g]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::Strategy;

    const COST: CostModel = CostModel {
        step: 1e-3,
        row: 1e-3,
        cached_token: 0.0,
        prompt_token: 0.0,
    };

    fn jobs(predicted: &[u32]) -> Vec<Job> {
        let job = |(i, &predicted): (usize, &u32)| Job {
            id: i.to_string().into(),
            predicted,
        };
        predicted.iter().enumerate().map(job).collect()
    }

    fn plan(predicted: &[u32], cost: CostModel, exact: bool) -> Vec<PlannedBatch> {
        let config = ScheduleConfig::new(Strategy::SeqSch).with(false, true);
        let history = if exact {
            (1..=512).flat_map(|p| [(p, p); 3]).collect()
        } else {
            Vec::new()
        };
        Planner::new(&Planning { cost, history }, &config, false).plan(&jobs(predicted))
    }

    #[test]
    fn where_a_step_costs_the_same_whatever_it_holds_batches_are_large() {
        let dear_steps = CostModel { row: 0.0, ..COST };
        let batches = plan(&[40; 200], dear_steps, true);
        assert!(batches.len() <= 2, "{} batches", batches.len());
    }

    #[test]
    fn where_rows_cost_all_no_row_waits_for_another() {
        let dear_rows = CostModel { step: 1e-9, ..COST };
        let batches = plan(&[20, 500, 20, 500], dear_rows, true);
        let mixed = batches.iter().any(|b| {
            let long = b.ids.iter().filter(|id| ["1", "3"].contains(&id.as_str())).count();
            long > 0 && long < b.ids.len()
        });
        assert!(!mixed, "{batches:?}");
    }

    #[test]
    fn a_batch_stops_where_its_predictions_end_and_not_at_the_cap() {
        for batch in plan(&[100; 32], COST, true) {
            assert!((100..200).contains(&batch.stop_at), "{}", batch.stop_at);
        }
    }

    #[test]
    fn a_cost_that_is_no_number_still_plans_every_request() {
        let broken = CostModel { row: f64::NAN, ..COST };
        let batches = plan(&[10, 20, 30], broken, false);
        assert_eq!(batches.iter().map(|b| b.ids.len()).sum::<usize>(), 3);
    }

    proptest! {
        #[test]
        fn every_request_is_in_one_batch(predicted in proptest::collection::vec(0u32..2000, 0..300), exact: bool) {
            let batches = plan(&predicted, COST, exact);
            let ids: Vec<&RequestId> = batches.iter().flat_map(|b| &b.ids).collect();
            prop_assert_eq!(ids.len(), predicted.len());
            prop_assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), predicted.len());
            for batch in &batches {
                prop_assert!((1..=512).contains(&batch.stop_at) && !batch.ids.is_empty());
            }
        }
    }
}
