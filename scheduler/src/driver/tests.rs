//! Failures are collected and finished, and an executor that loses or miscounts is found out.

use super::*;
use crate::Strategy;
use std::convert::Infallible;
use std::num::NonZeroUsize;

/// A miscount or loss that is put into an otherwise good run.
type Spoil = fn(&mut BatchRun);
type Ran = Vec<(String, u32)>;
type Stats = Result<StrategyStats, DriverError<Infallible>>;

/// Knows every length, keeps what it has of a stopped request if `resumes`, and writes down what it was given.
struct Script {
    lengths: HashMap<RequestId, u32>,
    resumes: bool,
    generated: HashMap<RequestId, u32>,
    ran: Ran,
    spoil: Spoil,
}

impl BatchExecutor for Script {
    type Error = Infallible;

    fn kept_tokens(&self) -> usize {
        if self.resumes { usize::MAX } else { 0 }
    }

    fn run_batch(&mut self, batch: &PlannedBatch) -> Result<BatchRun, Infallible> {
        let names: Vec<&str> = batch.ids.iter().map(RequestId::as_str).collect();
        self.ran.push((names.join(" "), batch.stop_at));
        let mut steps = 0;
        let mut outcomes = Vec::new();
        for id in &batch.ids {
            let before = self.generated.get(id).copied().filter(|_| self.resumes).unwrap_or(0);
            let tokens = self.lengths[id].min(before + batch.stop_at);
            steps = steps.max(tokens - before);
            self.generated.insert(id.clone(), tokens);
            let ended = tokens == self.lengths[id];
            let outcome = if ended {
                Outcome::Finished { tokens }
            } else {
                Outcome::Stopped
            };
            outcomes.push((id.clone(), outcome));
        }
        let slot_steps = u64::from(steps) * batch.ids.len() as u64;
        let mut run = BatchRun {
            steps,
            slot_steps,
            outcomes,
        };
        (self.spoil)(&mut run);
        Ok(run)
    }
}

fn run(lengths: &[(&str, u32, u32)], resumes: bool, spoil: Spoil) -> (Stats, Ran) {
    let job = |&(id, _, predicted): &(&str, u32, u32)| Job {
        id: id.into(),
        predicted,
    };
    let jobs: Vec<Job> = lengths.iter().map(job).collect();
    let mut script = Script {
        lengths: lengths.iter().map(|&(id, actual, _)| (id.into(), actual)).collect(),
        resumes,
        generated: HashMap::new(),
        ran: Vec::new(),
        spoil,
    };
    let config = ScheduleConfig {
        batch_size: NonZeroUsize::new(2).expect("not 0"),
        group_size: NonZeroUsize::new(4).expect("not 0"),
        max_new_tokens: 100,
        ..ScheduleConfig::new(Strategy::SeqSch).with(false, true)
    };
    let result = run_groups(&jobs, &config, &mut script);
    (result, script.ran)
}

/// A group of four of which c, a and d fail, then a group of one.
const TWO_GROUPS: [(&str, u32, u32); 5] = [("a", 60, 20), ("b", 20, 20), ("c", 30, 10), ("d", 90, 40), ("e", 5, 5)];

fn batches(ran: &[(String, u32)]) -> Vec<(&str, u32)> {
    ran.iter().map(|(ids, stop)| (ids.as_str(), *stop)).collect()
}

#[test]
fn failures_run_to_the_cap_at_the_end_of_their_own_group_in_the_order_collected() {
    let (stats, ran) = run(&TWO_GROUPS, false, |_| {});
    let expected = [("c a", 20), ("b d", 40), ("c a", 100), ("d", 100), ("e", 5)];
    assert_eq!(batches(&ran), expected);
    let stats = stats.expect("runs");
    assert_eq!((stats.requests, stats.failures), (5, 3));
    // 20, 40, then 60 for a, 90 for d, 5 for e; d is alone in its second batch and e in its only one.
    assert_eq!(stats.steps, 20 + 40 + 60 + 90 + 5);
    assert_eq!(stats.slot_steps, 40 + 80 + 120 + 90 + 5);
    assert_eq!(stats.useful_tokens, 60 + 20 + 30 + 90 + 5);
}

#[test]
fn a_resumed_failure_counts_only_its_further_steps() {
    let (stats, ran) = run(&TWO_GROUPS, true, |_| {});
    assert_eq!(ran.len(), 5);
    let stats = stats.expect("runs");
    // a goes on from 20 (40 more, two slots), d from 40 (50 more, alone): the answers are the same.
    assert_eq!(stats.steps, 20 + 40 + 40 + 50 + 5);
    assert_eq!(stats.slot_steps, 40 + 80 + 80 + 50 + 5);
    assert_eq!((stats.useful_tokens, stats.failures), (205, 3));
}

#[test]
fn an_executor_that_loses_doubles_or_invents_a_request_is_found_out() {
    let spoils: [(&str, Spoil); 3] = [
        ("a", |run| run.outcomes.truncate(0)),
        ("a", |run| run.outcomes.push(run.outcomes[0].clone())),
        ("x", |run| run.outcomes.push(("x".into(), Outcome::Stopped))),
    ];
    for (expected, spoil) in spoils {
        match run(&[("a", 5, 5)], false, spoil).0 {
            Err(DriverError::Outcomes { id }) => assert_eq!(id.as_str(), expected),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn an_executor_that_miscounts_is_found_out() {
    let (result, _) = run(&[("a", 5, 5)], false, |run| run.slot_steps = 4);
    assert!(
        matches!(result, Err(DriverError::Uncounted { useful: 5, computed: 4 })),
        "{result:?}"
    );
    let too_long = |run: &mut BatchRun| run.outcomes[0].1 = Outcome::Finished { tokens: 101 };
    let (result, _) = run(&[("a", 5, 5)], false, too_long);
    assert!(
        matches!(
            result,
            Err(DriverError::TooLong {
                tokens: 101,
                cap: 100,
                ..
            })
        ),
        "{result:?}"
    );
}

#[test]
fn a_request_still_unfinished_at_the_cap_is_an_error_not_a_loss() {
    let (result, _) = run(&[("a", 101, 5)], false, |_| {});
    assert!(
        matches!(result, Err(DriverError::Unfinished { cap: 100, .. })),
        "{result:?}"
    );
}

#[test]
fn an_id_that_occurs_twice_is_refused_before_anything_runs() {
    // In different groups, where no batch could notice.
    let lengths = [("a", 5, 5), ("b", 5, 5), ("c", 5, 5), ("d", 5, 5), ("a", 9, 9)];
    let (result, ran) = run(&lengths, false, |_| {});
    assert!(matches!(result, Err(DriverError::DuplicateId { id }) if id.as_str() == "a"));
    assert!(ran.is_empty());
}

#[test]
fn a_cancelled_request_is_computed_of_no_use_and_not_run_again() {
    // a would have been stopped by its batch; what its batch computed counts, and it is in no later batch.
    let (stats, ran) = run(&TWO_GROUPS, true, |run| {
        for (id, outcome) in &mut run.outcomes {
            if id.as_str() == "a" {
                *outcome = Outcome::Cancelled;
            }
        }
    });
    assert_eq!(batches(&ran), [("c a", 20), ("b d", 40), ("c d", 100), ("e", 5)]);
    let stats = stats.expect("runs");
    // 2 × 20 + 2 × 40, then d's other 50 beside c's other 10, and e's 5.
    assert_eq!((stats.requests, stats.failures, stats.slot_steps), (4, 2, 225));
    assert_eq!(stats.useful_tokens, 20 + 30 + 90 + 5);
}
