//! Cutting a group of requests into the batches that take the least time, by a cost model.

mod outlook;
mod steps;
#[cfg(test)]
mod tests;

use std::collections::HashMap;

use lengthwise_core::RequestId;

use crate::residuals::{GRID, Residuals};
use crate::simulate::PROMPT_TOKENS;
use crate::{Job, PlannedBatch, Planning, ScheduleConfig};
use outlook::{Outlook, Outlooks, Sums};
use steps::StepCosts;

/// Rounds of requests that were stopped; the last runs them to their ends. Each brings together what is left in fuller
/// batches; on the published lengths 16 rounds took up to 11 % less modelled time than 8, 32 up to 5 % less than 16, and 40
/// no less.
const ROUNDS: usize = 32;
/// What a token of a stopped request costs above one in a batch without padding, where stopping again is free: as a share
/// of what the harmonic excess of a batch run to its end would add. On the published lengths 0.15 and 0 were mostly
/// worse.
const EXCESS_IN_ROUNDS: f64 = 0.05;
/// The same where they are run to their ends: half, since they are sorted as well.
const EXCESS_AT_ONCE: f64 = 0.5;
/// Sequences × stopping length of a batch: what the published table's largest batches hold (256 × 50).
const PUBLISHED_CACHE: usize = 12_800;

/// Plans with a cost model, with what is predicted of single requests, and with what earlier groups have shown of
/// predictions that are one number.
pub(crate) struct Planner<'a> {
    planning: &'a Planning,
    config: &'a ScheduleConfig,
    /// Tokens of stopped requests that are kept; none where they begin anew.
    kept_tokens: usize,
    residuals: Residuals,
    steps: StepCosts,
}

/// A request as the planner sees it.
struct Expected<'a> {
    job: &'a Job,
    /// Tokens that need not be done again.
    done: u32,
    /// Which outlook it shares with others.
    outlook: usize,
}

/// The cheapest way to cut the first requests, as its last batch.
#[derive(Clone, Copy)]
struct Cut {
    seconds: f64,
    size: usize,
    /// Where the batch stops on the grid.
    stop: usize,
}

impl<'a> Planner<'a> {
    /// `kept_tokens`: see [`BatchExecutor::kept_tokens`](crate::BatchExecutor::kept_tokens).
    pub fn new(planning: &'a Planning, config: &'a ScheduleConfig, kept_tokens: usize) -> Self {
        let mut residuals = Residuals::default();
        residuals.observe(planning.history.iter().copied());
        Self {
            planning,
            config,
            kept_tokens,
            residuals,
            steps: StepCosts::of(&planning.cost, width(config)),
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
        self.cut(group.iter().map(|job| (job, 0)), self.config.fcr)
    }

    /// Batches of those of a group that were stopped, `(id, tokens so far)`. Where a request goes on from where it was,
    /// they may be stopped again, but in the last round (the first is 1).
    pub fn plan_rest(&self, group: &[Job], stopped: &[(RequestId, u32)], round: usize) -> Vec<PlannedBatch> {
        let tokens: HashMap<&RequestId, u32> = stopped.iter().map(|(id, tokens)| (id, *tokens)).collect();
        let left = group.iter().filter_map(|job| Some((job, *tokens.get(&job.id)?)));
        self.cut(left, round < ROUNDS)
    }

    /// Requests of which so many tokens are known to be exceeded, in batches. They may stop early where `may_stop`, and,
    /// where some were stopped before, as long as all that they will have fits what is kept.
    fn cut<'j>(&self, jobs: impl Iterator<Item = (&'j Job, u32)>, may_stop: bool) -> Vec<PlannedBatch> {
        let cost = &self.planning.cost;
        let mut outlooks = Outlooks::new(width(self.config), cost, self.kept_tokens > 0);
        let mut expected: Vec<Expected> = Vec::new();
        let (mut tokens, mut rest) = (0.0, false);
        for (job, known) in jobs {
            let done = if self.kept_tokens > 0 { known } else { 0 };
            let whole = || match self.planning.distributions.get(&job.id) {
                Some(quantiles) => outlook::of_quantiles(quantiles, self.config.cap()),
                None => self.residuals.distribution(job.predicted, self.config.cap()),
            };
            let own = self.planning.distributions.contains_key(&job.id);
            let outlook = outlooks.add(
                (!own).then_some((job.predicted, known)),
                whole,
                self.cell(known),
                self.cell(done),
            );
            tokens += PROMPT_TOKENS + f64::from(done) + outlooks.all[outlook].mean;
            rest |= known > 0;
            expected.push(Expected { job, done, outlook });
        }
        let in_rounds = tokens <= self.kept_tokens as f64;
        let published = self.config.batch_size.get() * self.config.cap() as usize;
        // Where all of the group fits, whatever is cut out of it does.
        let (excess, room) = match in_rounds {
            true => (EXCESS_IN_ROUNDS, f64::INFINITY),
            false => (EXCESS_AT_ONCE, PUBLISHED_CACHE.max(published) as f64),
        };
        outlooks.reckon_failures(excess);
        self.best(expected, &outlooks.all, room, may_stop && (in_rounds || !rest))
    }

    /// Where so many tokens are on the grid.
    fn cell(&self, tokens: u32) -> usize {
        (tokens as usize * GRID / self.config.cap() as usize).min(GRID - 1)
    }

    /// The cheapest cut of the requests in the order of their expected lengths: dynamic programming over where the
    /// last batch begins.
    fn best(&self, mut jobs: Vec<Expected>, outlooks: &[Outlook], room: f64, may_stop: bool) -> Vec<PlannedBatch> {
        jobs.sort_by(|a, b| outlooks[a.outlook].mean.total_cmp(&outlooks[b.outlook].mean));
        let sums = Sums::of(jobs.iter().map(|job| (&outlooks[job.outlook], job.done)));
        // Where a cost is no number, each request runs alone.
        let alone = Cut {
            seconds: f64::INFINITY,
            size: 1,
            stop: GRID - 1,
        };
        let mut best = vec![alone; jobs.len() + 1];
        best[0].seconds = 0.0;
        for end in 1..=jobs.len() {
            // What was best before is likely to be again, and then the others need not be reckoned to their ends.
            for costs in self.steps.up_to(end, best[end - 1].size) {
                let before = best[end - costs.size].seconds;
                let bound = best[end].seconds - before;
                if let Some((seconds, stop)) = costs.batch(&sums, end, room, may_stop, bound) {
                    best[end] = Cut {
                        seconds: before + seconds,
                        size: costs.size,
                        stop,
                    };
                }
            }
        }
        let mut batches = Vec::new();
        let mut end = jobs.len();
        while end > 0 {
            let Cut { size, stop, .. } = best[end];
            let ids = jobs[end - size..end].iter().map(|e| e.job.id.clone()).collect();
            batches.push(PlannedBatch {
                ids,
                stop_at: self.stop_at(stop, may_stop),
            });
            end -= size;
        }
        batches.reverse();
        batches
    }

    /// A point of the grid as steps.
    fn stop_at(&self, stop: usize, may_stop: bool) -> u32 {
        let cap = self.config.cap();
        let steps = ((stop as f64 + 1.0) * width(self.config)).round() as u32;
        if may_stop { steps.clamp(1, cap) } else { cap }
    }
}

/// Tokens from one point of the grid to the next.
fn width(config: &ScheduleConfig) -> f64 {
    f64::from(config.cap()) / GRID as f64
}
