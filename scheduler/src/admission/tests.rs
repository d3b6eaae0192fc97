//! Orders, the budget, waiting no longer than it must, and cancelling.

use super::*;
use proptest::prelude::*;

fn waiting(item: usize, predicted: u32, cache_tokens: usize) -> Waiting<usize> {
    Waiting {
        item,
        predicted,
        cache_tokens,
    }
}

fn admitted(order: AdmissionOrder) -> Vec<usize> {
    let mut queue = AdmissionQueue::new(order, 1000);
    for (i, predicted) in [20, 30, 10, 30].into_iter().enumerate() {
        queue.push(waiting(i, predicted, 1)).expect("fits");
    }
    std::iter::from_fn(|| queue.admit()).map(|w| w.item).collect()
}

#[test]
fn each_order_admits_as_it_is_called() {
    assert_eq!(admitted(AdmissionOrder::FirstCome), [0, 1, 2, 3]);
    assert_eq!(admitted(AdmissionOrder::ShortestFirst), [2, 0, 1, 3]);
    assert_eq!(admitted(AdmissionOrder::LongestFirst), [1, 3, 0, 2]);
}

#[test]
fn a_request_that_never_fits_is_refused_at_once() {
    let mut queue = AdmissionQueue::new(AdmissionOrder::FirstCome, 10);
    let err = queue.push(waiting(7, 1, 11)).expect_err("too large");
    assert_eq!((err.needed, err.budget), (11, 10));
}

#[test]
fn what_becomes_known_of_a_waiting_request_changes_its_place_and_its_need() {
    let mut queue = AdmissionQueue::new(AdmissionOrder::ShortestFirst, 10);
    for (i, predicted) in [20, 30, 40].into_iter().enumerate() {
        queue.push(waiting(i, predicted, 10)).expect("fits");
    }
    assert!(queue.revise(2, 10, 4) && queue.revise(0, 35, 6));
    assert!(!queue.revise(1, 5, 11), "more than the budget");
    assert!(!queue.revise(3, 5, 1), "there is none");
    assert_eq!(queue.admit(), Some(waiting(2, 10, 4)));
    assert!(!queue.revise(2, 1, 1), "it was admitted");
    // Request 1 is next, and needs all of the budget.
    assert_eq!(queue.admit(), None);
    queue.release(4);
    assert_eq!(queue.admit(), Some(waiting(1, 30, 10)));
    queue.release(10);
    assert_eq!(queue.cancel(0), Some(waiting(0, 35, 6)));
    assert!(queue.is_empty() && queue.by_arrival.is_empty() && queue.waves.is_empty());
}

#[test]
fn no_request_is_passed_over_for_ever() {
    let mut queue = AdmissionQueue::new(AdmissionOrder::ShortestFirst, 1);
    queue.push(waiting(0, 500, 1)).expect("fits");
    let mut passed = 0;
    // Bounded, so that without the rule this fails and does not hang.
    while passed < 2 * MOST_OVERTAKEN {
        queue.push(waiting(1, 1, 1)).expect("fits");
        let next = queue.admit().expect("the budget is free");
        queue.release(next.cache_tokens);
        if next.item == 0 {
            break;
        }
        passed += 1;
    }
    // One came with it, before anything was admitted; the others came later.
    assert_eq!(passed, 1 + MOST_OVERTAKEN);
}

#[test]
fn requests_that_came_together_keep_their_order_however_many() {
    // 100,000 at once, admitted longest first to the very last: nobody is overtaken by a later arrival.
    let mut queue = AdmissionQueue::new(AdmissionOrder::LongestFirst, 1);
    for i in 0..100_000_u32 {
        queue.push(waiting(i as usize, i * 7919 % 100_000, 1)).expect("fits");
    }
    for expected in (0..100_000).rev() {
        let next = queue.admit().expect("the budget is free");
        assert_eq!(next.predicted, expected);
        queue.release(next.cache_tokens);
    }
    assert!(queue.is_empty() && queue.waves.is_empty());
}

#[test]
fn smaller_requests_do_not_slip_past_the_one_that_is_next() {
    let mut queue = AdmissionQueue::new(AdmissionOrder::FirstCome, 10);
    for (id, tokens) in [(0, 6), (1, 6), (2, 1)] {
        queue.push(waiting(id, 1, tokens)).expect("fits");
    }
    assert_eq!(queue.admit().expect("fits").item, 0);
    assert_eq!(queue.admit(), None);
    queue.release(6);
    assert_eq!(queue.admit().expect("fits").item, 1);
    assert_eq!(queue.admit().expect("fits").item, 2);
}

proptest! {
    #[test]
    fn later_arrivals_overtake_a_bounded_number_of_times(
        steps in prop::collection::vec((0usize..4, 0u32..50), 1..300),
        most_overtaken in 1u64..6,
        order in prop::sample::select(vec![AdmissionOrder::ShortestFirst, AdmissionOrder::LongestFirst]),
    ) {
        let mut queue = AdmissionQueue { most_overtaken, ..AdmissionQueue::new(order, 1) };
        // Arrivals up to the end of each request's wave; each step is a wave, then one admission.
        let mut come_by = Vec::new();
        let mut admitted = 0;
        for (count, predicted) in steps.into_iter().chain(std::iter::repeat_n((0, 0), 1000)) {
            let first = come_by.len();
            for id in first..first + count {
                queue.push(waiting(id, predicted + id as u32 % 3, 1)).expect("fits");
            }
            come_by.resize(first + count, (first + count) as u64);
            let Some(next) = queue.admit() else { continue };
            queue.release(next.cache_tokens);
            let others = come_by[next.item] - 1;
            // Overdue at `others + most_overtaken`; what came earlier and still waits is older and goes before.
            prop_assert!(admitted <= 2 * others + most_overtaken);
            admitted += 1;
        }
        prop_assert!(queue.is_empty());
    }

    #[test]
    fn the_budget_holds_and_everyone_gets_in(
        needs in prop::collection::vec((0u32..600, 1usize..100), 1..200),
        budget in 100usize..300,
        order in prop::sample::select(vec![
            AdmissionOrder::FirstCome, AdmissionOrder::ShortestFirst, AdmissionOrder::LongestFirst,
        ]),
    ) {
        let mut queue = AdmissionQueue::new(order, budget);
        for (i, &(predicted, tokens)) in needs.iter().enumerate() {
            queue.push(waiting(i, predicted, tokens)).expect("at most 99 of at least 100");
        }
        let (mut running, mut done) = (Vec::new(), std::collections::BTreeSet::new());
        while done.len() < needs.len() {
            while let Some(next) = queue.admit() {
                running.push(next);
            }
            let held: usize = running.iter().map(|w: &Waiting<usize>| w.cache_tokens).sum();
            prop_assert!(held <= budget && held == queue.held());
            let ended = running.remove(0);
            queue.release(ended.cache_tokens);
            prop_assert!(done.insert(ended.item), "admitted twice");
        }
        prop_assert!(queue.is_empty());
    }
}

thread_local! {
    /// Comparisons of places on this thread: what an operation costs, counted instead of timed.
    pub(super) static COMPARISONS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

#[test]
fn an_operation_looks_at_few_of_a_hundred_thousand_requests() {
    // A node of a B-tree has at most 11 keys, and of 100,000 there are at most 7 nodes above each other. An admission looks
    // a request up and takes it out. Whatever looked at all of them would compare 100,000 times.
    const MOST: u64 = 2 * 11 * 7;
    let mut queue = AdmissionQueue::new(AdmissionOrder::LongestFirst, 16);
    let mut most = 0;
    let mut count = |operation: &mut dyn FnMut(&mut AdmissionQueue<usize>), queue: &mut AdmissionQueue<usize>| {
        COMPARISONS.with(|c| c.set(0));
        operation(queue);
        most = most.max(COMPARISONS.with(std::cell::Cell::get));
    };
    let mut places = Vec::new();
    for i in 0..100_000_usize {
        let request = waiting(i, i as u32 * 7919 % 512, 1);
        count(&mut |q| places.push(q.push(request.clone()).expect("fits")), &mut queue);
    }
    for place in places.into_iter().step_by(2) {
        count(&mut |q| assert!(q.cancel(place).is_some()), &mut queue);
    }
    let mut admitted = 0;
    while !queue.is_empty() {
        let mut admit = |q: &mut AdmissionQueue<usize>| {
            let next = q.admit().expect("the budget is free");
            q.release(next.cache_tokens);
        };
        count(&mut admit, &mut queue);
        admitted += 1;
    }
    assert_eq!(admitted, 50_000);
    assert!((2..=MOST).contains(&most), "{most} comparisons");
}

#[test]
fn a_simulation_of_a_hundred_thousand_requests_compares_few_of_them() {
    let request = |i: u32| crate::SimulatedRequest {
        id: i.to_string().into(),
        actual: 1 + i * 7919 % 512,
        predicted: 1 + i * 104_729 % 512,
    };
    let requests: Vec<_> = (0..100_000).map(request).collect();
    let config = crate::ScheduleConfig::new(crate::Strategy::Continuous);
    COMPARISONS.with(|c| c.set(0));
    let ran = crate::simulate(&requests, &config, crate::Machine::default()).expect("ids are distinct");
    assert_eq!(ran.stats.requests, 100_000);
    // Each is put in and taken out, and looked at once before; see above for the rest.
    let compared = COMPARISONS.with(std::cell::Cell::get);
    assert!((100_000..100_000 * 3 * 2 * 11 * 7).contains(&compared), "{compared}");
}

#[test]
fn a_cancelled_request_is_not_admitted_and_holds_nothing() {
    let mut queue = AdmissionQueue::new(AdmissionOrder::FirstCome, 10);
    let places: Vec<u64> = [6, 6, 4]
        .into_iter()
        .enumerate()
        .map(|(i, tokens)| queue.push(waiting(i, 1, tokens)).expect("fits"))
        .collect();
    assert_eq!(queue.admit().expect("fits").item, 0);
    assert_eq!(queue.cancel(places[0]), None, "it no longer waits");
    assert_eq!(queue.cancel(places[1]).expect("it waits").item, 1);
    assert_eq!(queue.cancel(places[1]), None, "it was cancelled before");
    assert_eq!(queue.held(), 6);
    // What it stood in the way of goes on.
    assert_eq!(queue.admit().expect("fits").item, 2);
    assert_eq!((queue.held(), queue.len()), (10, 0));
}

#[derive(Debug, Clone)]
enum Event {
    Come { predicted: u32, tokens: usize },
    Admit,
    End { nth: usize },
    Cancel { nth: usize },
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        3 => (0u32..600, 1usize..100).prop_map(|(predicted, tokens)| Event::Come { predicted, tokens }),
        3 => Just(Event::Admit),
        1 => (0usize..1000).prop_map(|nth| Event::End { nth }),
        2 => (0usize..1000).prop_map(|nth| Event::Cancel { nth }),
    ];
    prop::collection::vec(event, 0..400)
}

proptest! {
    #[test]
    fn whoever_is_cancelled_the_budget_holds_and_is_whole_in_the_end(
        events in events(),
        most_overtaken in 1u64..6,
        order in prop::sample::select(vec![
            AdmissionOrder::FirstCome, AdmissionOrder::ShortestFirst, AdmissionOrder::LongestFirst,
        ]),
    ) {
        let mut queue = AdmissionQueue { most_overtaken, ..AdmissionQueue::new(order, 150) };
        let (mut places, mut running) = (Vec::<(usize, u64)>::new(), Vec::<Waiting<usize>>::new());
        let mut come = 0;
        // In the end all that still wait are let in.
        let rest = std::iter::repeat_n([Event::Admit, Event::End { nth: 0 }], 400).flatten();
        for event in events.into_iter().chain(rest) {
            match event {
                Event::Come { predicted, tokens } => {
                    let place = queue.push(waiting(come, predicted, tokens)).expect("at most 99 of 150");
                    places.push((come, place));
                    come += 1;
                }
                Event::Admit => {
                    if let Some(next) = queue.admit() {
                        let at = places.iter().position(|(item, _)| next.item == *item);
                        prop_assert!(at.is_some(), "{} was cancelled or admitted before", next.item);
                        places.swap_remove(at.unwrap_or(0));
                        running.push(next);
                    }
                }
                Event::End { .. } if running.is_empty() => {}
                // A cancelled request that runs gives back its share as one that ends does.
                Event::End { nth } => queue.release(running.swap_remove(nth % running.len()).cache_tokens),
                Event::Cancel { .. } if places.is_empty() => {}
                Event::Cancel { nth } => {
                    let (item, place) = places.swap_remove(nth % places.len());
                    let gone = queue.cancel(place);
                    prop_assert_eq!(gone.map(|w| w.item), Some(item));
                }
            }
            let held: usize = running.iter().map(|w| w.cache_tokens).sum();
            prop_assert!(held <= 150 && held == queue.held());
            prop_assert_eq!(queue.len(), places.len());
        }
        prop_assert!(queue.is_empty() && running.is_empty() && queue.held() == 0);
        prop_assert!(queue.waves.is_empty() && queue.by_arrival.is_empty());
    }
}
