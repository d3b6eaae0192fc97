//! What the planner makes of costs and expectations.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::{CostModel, Rise, Strategy};
use lengthwise_core::Quantile;

const COST: CostModel = CostModel {
    step: 1e-3,
    row: 1e-3,
    cached_token: 0.0,
    prompt_token: 0.0,
    many_rows: None,
    many_cached_tokens: None,
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
    let planning = Planning {
        cost,
        history,
        distributions: HashMap::new(),
    };
    Planner::new(&planning, &config, 0).plan(&jobs(predicted))
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

/// Sizes of the batches of `count` requests that have `done` tokens and end at `length`, as is known; they run to their
/// ends.
fn sizes(cost: CostModel, count: usize, done: u32, length: u32) -> Vec<usize> {
    let group = jobs(&vec![length; count]);
    let quantile = |probability, tokens| Quantile { probability, tokens };
    let known = || vec![quantile(0.0, length - 1), quantile(1.0, length)];
    let planning = Planning {
        cost,
        history: Vec::new(),
        distributions: group.iter().map(|job| (job.id.clone(), known())).collect(),
    };
    let config = ScheduleConfig::new(Strategy::SeqSch);
    let planner = Planner::new(&planning, &config, 1 << 20);
    let stopped: Vec<(RequestId, u32)> = group.iter().map(|job| (job.id.clone(), done)).collect();
    let batches = match done {
        0 => planner.plan(&group),
        _ => planner.plan_rest(&group, &stopped, ROUNDS),
    };
    batches.iter().map(|batch| batch.ids.len()).collect()
}

#[test]
fn where_the_price_of_a_row_rises_batches_end_there() {
    // A step is 1 s, rows cost nothing up to 16. A row of 16 has 1 / 16 of it, of 24 at 0.25 s a row more 3 / 24, of 12
    // 1 / 12, of 48 9 / 48.
    let flat = CostModel {
        step: 1.0,
        ..CostModel::default()
    };
    assert_eq!(sizes(flat, 48, 0, 80), [48]);
    let rising = CostModel {
        many_rows: Some(Rise {
            beyond: 16.0,
            more: 0.25,
        }),
        ..flat
    };
    assert_eq!(sizes(rising, 48, 0, 80), [16, 16, 16]);
}

#[test]
fn where_the_price_of_a_cached_token_rises_what_was_done_before_counts() {
    // A step is 1 s, and 1 s for each token beyond 2,000. Of 64 tokens of prompt and 48 of answer, 12 rows have 1,344;
    // with 256 from before, 4 rows have 4 × 368 = 1,472 at the end, but 6 have 2,000 after 14 of the 48 steps.
    let rising = CostModel {
        step: 1.0,
        many_cached_tokens: Some(Rise {
            beyond: 2000.0,
            more: 1.0,
        }),
        ..CostModel::default()
    };
    assert_eq!(sizes(rising, 12, 0, 48), [12]);
    assert_eq!(sizes(rising, 12, 256, 304), [4, 4, 4]);
}

#[test]
fn a_request_with_a_distribution_of_its_own_is_planned_by_it() {
    // All are predicted alike, but for some it is known that they are short. Rows cost all, so that none waits for another.
    let all = jobs(&[400; 24]);
    let quantile = |probability, tokens| Quantile { probability, tokens };
    let distribution = |i: usize| match i % 3 {
        0 => vec![quantile(0.05, 15), quantile(1.0, 16)],
        _ => vec![quantile(0.05, 390), quantile(1.0, 400)],
    };
    let distributions = all.iter().enumerate().map(|(i, job)| (job.id.clone(), distribution(i)));
    let planning = Planning {
        cost: CostModel { step: 1e-6, ..COST },
        history: Vec::new(),
        distributions: distributions.collect(),
    };
    let config = ScheduleConfig::new(Strategy::SeqSch).with(false, true);
    for batch in Planner::new(&planning, &config, 0).plan(&all) {
        let short = |id: &RequestId| id.as_str().parse::<usize>().is_ok_and(|i| i % 3 == 0);
        let count = batch.ids.iter().filter(|id| short(id)).count();
        assert!(count == 0 || count == batch.ids.len(), "{batch:?}");
        let stops = if count == 0 { 392..=408 } else { 16..=24 };
        assert!(stops.contains(&batch.stop_at), "{batch:?}");
    }
}

#[test]
fn stopped_requests_are_stopped_again_only_where_what_they_have_is_kept() {
    // Where rows cost all, the rest of a group is cut short again and again; without room for what it has, or from the
    // first token on, it runs to its end.
    let group = jobs(&[500; 32]);
    let stopped: Vec<(RequestId, u32)> = group.iter().map(|job| (job.id.clone(), 100)).collect();
    let planning = Planning {
        cost: COST,
        history: Vec::new(),
        distributions: HashMap::new(),
    };
    let config = ScheduleConfig::new(Strategy::SeqSch).with(false, true);
    for (kept, round, again) in [
        (1 << 20, 1, true),
        (1 << 20, ROUNDS, false),
        (3200, 1, false),
        (0, 1, false),
    ] {
        let batches = Planner::new(&planning, &config, kept).plan_rest(&group, &stopped, round);
        let stops = batches.iter().any(|batch| batch.stop_at < 412);
        assert_eq!(stops, again, "{kept} tokens, round {round}");
        assert_eq!(batches.iter().map(|batch| batch.ids.len()).sum::<usize>(), 32);
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
