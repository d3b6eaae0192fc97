//! What strategies cost on known lengths.

use super::*;
use crate::{Planning, Strategy};
use proptest::prelude::*;
use std::num::NonZeroUsize;
use std::sync::Arc;

fn requests(lengths: &[(u32, u32)]) -> Vec<SimulatedRequest> {
    let request = |(i, &(actual, predicted)): (usize, &(u32, u32))| SimulatedRequest {
        id: i.to_string().into(),
        actual,
        predicted,
    };
    lengths.iter().enumerate().map(request).collect()
}

fn config(strategy: Strategy, batch_size: usize) -> ScheduleConfig {
    ScheduleConfig {
        batch_size: NonZeroUsize::new(batch_size).expect("not 0"),
        ..ScheduleConfig::new(strategy)
    }
}

fn run(lengths: &[(u32, u32)], config: &ScheduleConfig) -> StrategyStats {
    simulate(&requests(lengths), config, Machine::default())
        .expect("ids are distinct")
        .stats
}

#[test]
fn vanilla_pads_to_the_longest_of_each_batch() {
    // (10, 30) and (20, 600 cut at 512): 2 × 30 + 2 × 512.
    let stats = run(&[(10, 0), (30, 0), (20, 0), (600, 0)], &config(Strategy::Vanilla, 2));
    assert_eq!((stats.steps, stats.slot_steps, stats.useful_tokens), (542, 1084, 572));
    assert_eq!((stats.requests, stats.failures, stats.wasted_tokens()), (4, 0, 512));
}

#[test]
fn sorting_puts_like_lengths_together() {
    let stats = run(&[(10, 10), (30, 30), (10, 10), (30, 30)], &config(Strategy::SeqSch, 2));
    assert_eq!((stats.steps, stats.wasted_tokens()), (40, 0));
}

#[test]
fn a_failure_is_recomputed_and_its_thrown_away_tokens_count() {
    // Predicted 20 and 20, actual 5 and 50: the batch stops at 20 (40 slot-steps), then 50 alone.
    let stats = run(&[(5, 20), (50, 20)], &config(Strategy::SeqSch, 2).with(false, true));
    assert_eq!((stats.failures, stats.steps, stats.slot_steps), (1, 70, 90));
    assert_eq!((stats.useful_tokens, stats.wasted_tokens()), (55, 35));
    assert_eq!(stats.average_length(), 45.0);
}

#[test]
fn a_failure_that_goes_on_costs_its_further_steps_alone() {
    // As above, but the second goes on from 20: 20 steps of two, 30 of one.
    let machine = Machine {
        clock: Some(CostModel {
            step: 1.0,
            row: 0.0,
            cached_token: 0.0,
            prompt_token: 1.0,
            ..CostModel::default()
        }),
        resumes: true,
        timeline: true,
    };
    let requests = requests(&[(5, 20), (50, 20)]);
    let config = config(Strategy::SeqSch, 2).with(false, true);
    let ran = simulate(&requests, &config, machine).expect("ids are distinct");
    assert_eq!(
        (ran.stats.steps, ran.stats.slot_steps, ran.stats.wasted_tokens()),
        (50, 70, 15)
    );
    // Both prompts once, and the steps.
    assert_eq!(ran.seconds, 2.0 * PROMPT_TOKENS + 50.0);
    let timeline = ran.timeline.expect("asked for");
    assert_eq!(timeline.useful, [[0, 0, 5], [1, 0, 20], [0, 20, 50]]);
    assert_eq!((timeline.padding, timeline.thrown_away), (vec![[0, 5, 20]], vec![]));
    // Recomputed, the 20 tokens are thrown away.
    let anew = Machine {
        resumes: false,
        ..machine
    };
    let timeline = simulate(&requests, &config, anew).expect("ids are distinct").timeline;
    assert_eq!(timeline.expect("asked for").thrown_away, [[1, 0, 20]]);
}

#[test]
fn a_freed_slot_is_refilled_at_once() {
    // Two slots, longest first: 6 | 5, then 3 after the 5 and 2 after the 6: both end at 8.
    let lengths = [(2, 2), (6, 6), (3, 3), (5, 5)];
    let stats = run(&lengths, &config(Strategy::Continuous, 2));
    assert_eq!((stats.steps, stats.slot_steps, stats.useful_tokens), (8, 16, 16));
    let order = crate::AdmissionOrder::FirstCome;
    // 2 | 6, then 3 after the 2 (ends 5), 5 after the 3 (ends 10).
    let stats = run(
        &lengths,
        &ScheduleConfig {
            order,
            ..config(Strategy::Continuous, 2)
        },
    );
    assert_eq!(stats.steps, 10);
}

#[test]
fn three_slots_take_six_requests_as_slots_fall_free() {
    // Predicted longest first: 9 8 6 | 4 3 2. The 4 follows the 6 (ends 10), the 3 the 8 (11), the 2 the 9 (11).
    let lengths = [(2, 2), (9, 9), (4, 4), (8, 8), (3, 3), (6, 6)];
    let stats = run(&lengths, &config(Strategy::Continuous, 3));
    assert_eq!((stats.steps, stats.slot_steps, stats.useful_tokens), (11, 33, 32));
    assert_eq!((stats.requests, stats.failures, stats.wasted_tokens()), (6, 0, 1));
    // More slots than requests: the idle ones are wasted too.
    let stats = run(&[(5, 5)], &config(Strategy::Continuous, 3));
    assert_eq!((stats.slot_steps, stats.wasted_tokens()), (15, 10));
}

#[test]
fn an_id_that_occurs_twice_is_an_error_under_every_strategy() {
    for strategy in Strategy::ALL {
        let mut twice = requests(&[(10, 10), (20, 20)]);
        twice[1].id = twice[0].id.clone();
        let result = simulate(&twice, &config(strategy, 1), Machine::default());
        assert!(matches!(result, Err(DriverError::DuplicateId { .. })), "{strategy}");
    }
}

#[test]
fn no_request_at_all_costs_nothing() {
    for strategy in Strategy::ALL {
        assert_eq!(run(&[], &config(strategy, 4)), StrategyStats::default());
    }
}

/// Lengths with a long tail, and predictions of the largest of several samples that are off by about `error` tokens, by
/// exponential errors to either side.
fn predicted_with_an_error_of(error: f64, seed: u32) -> Vec<(u32, u32)> {
    let unit = |i: u32, prime: u32| (f64::from((i * prime + seed * 37) % 256) + 0.5) / 256.0;
    let one = |i: u32| {
        let largest = (-130.0 * unit(i, 89).ln()).clamp(2.0, 512.0);
        let (side, size) = (unit(i, 151) - 0.5, -unit(i, 113).ln());
        let predicted = (largest + error * size * side.signum()).clamp(1.0, 512.0);
        let actual = largest * (0.55 + 0.45 * unit(i, 61));
        (actual.ceil() as u32, predicted.round() as u32)
    };
    (0..256).map(one).collect()
}

#[test]
fn a_first_group_planned_by_cost_takes_a_fifth_less_time_than_by_the_published_rules() {
    // Two cores of a CPU, 5 M and 110 M parameters; nothing is known of the predictions before.
    let models = [(6.9e-4, 8.3e-5, 1.1e-6, 1.3e-4), (2.5e-2, 2.5e-3, 3.5e-6, 1.6e-3)];
    for (step, row, cached_token, prompt_token) in models {
        let cost = CostModel {
            step,
            row,
            cached_token,
            prompt_token,
            ..CostModel::default()
        };
        let machine = Machine {
            clock: Some(cost),
            resumes: true,
            timeline: false,
        };
        let planning = Arc::new(Planning {
            cost,
            history: Vec::new(),
            distributions: HashMap::new(),
        });
        for (error, seed) in (0..5).flat_map(|seed| [(0.0, seed), (62.0, seed), (120.0, seed)]) {
            let requests = requests(&predicted_with_an_error_of(error, seed));
            let seconds = |config: &ScheduleConfig| {
                let ran = simulate(&requests, config, machine).expect("ids are distinct");
                ran.seconds
            };
            let config = config(Strategy::SeqSch, 16).with(true, true);
            let published = seconds(&config);
            let gain = published / seconds(&config.planned_by(Some(planning.clone())));
            assert!(
                gain > 1.25,
                "{gain} times at an error of {error}, seed {seed}, {cost:?}"
            );
        }
    }
}

proptest! {
    #[test]
    fn every_request_once_and_no_answer_cut(
        lengths in prop::collection::vec((0u32..2000, prop_oneof![Just(0), Just(u32::MAX), 0u32..800]), 0..400),
        strategy in prop::sample::select(Strategy::ALL.to_vec()),
        vbs: bool, fcr: bool, resumes: bool, by_cost: bool,
        batch_size in 1usize..40, group_size in 1usize..300, cap in 1u32..700,
    ) {
        let config = ScheduleConfig {
            group_size: NonZeroUsize::new(group_size).expect("not 0"),
            max_new_tokens: cap,
            ..config(strategy, batch_size)
        }.with(vbs, fcr);
        let cost = CostModel { step: 1e-3, row: 1e-4, cached_token: 1e-7, prompt_token: 1e-5, ..CostModel::default() };
        let planning = Planning { cost, history: Vec::new(), distributions: HashMap::new() };
        let config = config.planned_by(by_cost.then(|| Arc::new(planning)));
        let machine = Machine { clock: None, resumes, timeline: true };
        let Simulated { stats, timeline, .. } = simulate(&requests(&lengths), &config, machine).expect("ids are distinct");
        let timeline = timeline.expect("asked for");
        prop_assert_eq!(Timeline::area(&timeline.useful), stats.useful_tokens);
        let wasted = Timeline::area(&timeline.padding) + Timeline::area(&timeline.thrown_away);
        prop_assert_eq!(wasted, stats.wasted_tokens());
        prop_assert!(timeline.size().1 == stats.steps || lengths.is_empty());
        prop_assert!(!resumes || timeline.thrown_away.is_empty());
        prop_assert_eq!(stats.requests, lengths.len() as u64);
        let whole: u64 = lengths.iter().map(|(actual, _)| u64::from((*actual).clamp(1, cap))).sum();
        prop_assert_eq!(stats.useful_tokens, whole);
        prop_assert!(stats.slot_steps >= stats.useful_tokens);
        prop_assert!(config.fcr || stats.failures == 0);
    }
}
