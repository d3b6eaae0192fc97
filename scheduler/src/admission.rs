//! Who gets the next free slot of the continuous mode.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use lengthwise_core::RequestId;

/// In which order waiting requests are admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdmissionOrder {
    /// First come, first served.
    FirstCome,
    /// The shortest predicted answer first: least waiting on average.
    ShortestFirst,
    /// The longest predicted answer first: least time until a whole offline batch is done.
    LongestFirst,
}

impl FromStr for AdmissionOrder {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "fcfs" => Ok(Self::FirstCome),
            "sjf" => Ok(Self::ShortestFirst),
            "ljf" => Ok(Self::LongestFirst),
            _ => Err(format!("no order is called \"{text}\"; there are fcfs, sjf, ljf")),
        }
    }
}

impl fmt::Display for AdmissionOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FirstCome => "fcfs",
            Self::ShortestFirst => "sjf",
            Self::LongestFirst => "ljf",
        })
    }
}

/// A request that waits for a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Whose answer.
    pub id: RequestId,
    /// The predicted length of its answer, in tokens.
    pub predicted: u32,
    /// KV cache that it will need: prompt and predicted answer, in tokens.
    pub cache_tokens: usize,
}

/// A request that can never be admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("request {id} needs {needed} tokens of KV cache, the budget is {budget}")]
pub struct AdmissionError {
    /// Whose answer.
    pub id: RequestId,
    /// Tokens it needs alone.
    pub needed: usize,
    /// The whole budget.
    pub budget: usize,
}

/// Later arrivals that may overtake a waiting request; then it goes first, whatever the order: no request waits for ever.
///
/// Only later arrivals count. Requests that came together cannot starve each other, since there are no more of them; were
/// they counted, a large offline batch would fall back to the order of arrival half-way.
const MOST_OVERTAKEN: u64 = 4096;

/// Waiting requests and the KV budget that the admitted ones hold a share of. Every operation is O(log n).
#[derive(Debug)]
pub struct AdmissionQueue {
    order: AdmissionOrder,
    budget: usize,
    held: usize,
    /// By the order's key, then by arrival.
    by_order: BTreeMap<(u32, u64), Waiting>,
    /// Arrival → key, and the wave it came in.
    by_arrival: BTreeMap<u64, (u32, u64)>,
    /// Wave → arrivals up to its end. A wave is what arrives between two admissions, named by the number of admissions
    /// before it. Waves older than the oldest waiting request are dropped.
    waves: BTreeMap<u64, u64>,
    most_overtaken: u64,
    arrivals: u64,
    admissions: u64,
}

impl AdmissionQueue {
    /// `budget`: tokens of KV cache that the admitted requests may hold together.
    pub fn new(order: AdmissionOrder, budget: usize) -> Self {
        Self {
            order,
            budget,
            held: 0,
            by_order: BTreeMap::new(),
            by_arrival: BTreeMap::new(),
            waves: BTreeMap::new(),
            most_overtaken: MOST_OVERTAKEN,
            arrivals: 0,
            admissions: 0,
        }
    }

    /// Adds a request.
    ///
    /// # Errors
    /// It needs more than the whole budget.
    pub fn push(&mut self, waiting: Waiting) -> Result<(), AdmissionError> {
        if waiting.cache_tokens > self.budget {
            let (needed, budget) = (waiting.cache_tokens, self.budget);
            return Err(AdmissionError {
                id: waiting.id,
                needed,
                budget,
            });
        }
        let key = match self.order {
            AdmissionOrder::FirstCome => 0,
            AdmissionOrder::ShortestFirst => waiting.predicted,
            AdmissionOrder::LongestFirst => u32::MAX - waiting.predicted,
        };
        self.by_arrival.insert(self.arrivals, (key, self.admissions));
        self.by_order.insert((key, self.arrivals), waiting);
        self.arrivals += 1;
        self.waves.insert(self.admissions, self.arrivals);
        Ok(())
    }

    /// The next request, if what it needs fits beside what is held; its share is held from now on. The first in order
    /// that does not fit is waited for, not passed over: smaller ones behind it would keep it out for ever.
    pub fn admit(&mut self) -> Option<Waiting> {
        let key = self.next_key()?;
        let waiting = self.by_order.get(&key)?;
        if waiting.cache_tokens > self.budget - self.held {
            return None;
        }
        self.by_arrival.remove(&key.1);
        let waiting = self.by_order.remove(&key)?;
        self.held += waiting.cache_tokens;
        self.admissions += 1;
        let oldest = self
            .by_arrival
            .first_key_value()
            .map_or(u64::MAX, |(_, &(_, wave))| wave);
        while self.waves.first_key_value().is_some_and(|(&wave, _)| wave < oldest) {
            self.waves.pop_first();
        }
        Some(waiting)
    }

    /// The oldest request if it is overdue, else the first in order. It is overdue once as many have been admitted as
    /// came before and with it, and `most_overtaken` more: so many at least came later.
    fn next_key(&self) -> Option<(u32, u64)> {
        let (&arrival, &(key, wave)) = self.by_arrival.first_key_value()?;
        let others = self.waves.get(&wave)?.saturating_sub(1);
        if self.admissions >= others + self.most_overtaken {
            return Some((key, arrival));
        }
        self.by_order.first_key_value().map(|(key, _)| *key)
    }

    /// An admitted request has ended: its share is free again.
    pub fn release(&mut self, cache_tokens: usize) {
        self.held = self.held.saturating_sub(cache_tokens);
    }

    /// Tokens that admitted requests hold.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Requests that wait.
    pub fn len(&self) -> usize {
        self.by_order.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.by_order.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn waiting(id: usize, predicted: u32, cache_tokens: usize) -> Waiting {
        Waiting {
            id: id.to_string().into(),
            predicted,
            cache_tokens,
        }
    }

    fn admitted(order: AdmissionOrder) -> Vec<String> {
        let mut queue = AdmissionQueue::new(order, 1000);
        for (i, predicted) in [20, 30, 10, 30].into_iter().enumerate() {
            queue.push(waiting(i, predicted, 1)).expect("fits");
        }
        std::iter::from_fn(|| queue.admit()).map(|w| w.id.to_string()).collect()
    }

    #[test]
    fn each_order_admits_as_it_is_called() {
        assert_eq!(admitted(AdmissionOrder::FirstCome), ["0", "1", "2", "3"]);
        assert_eq!(admitted(AdmissionOrder::ShortestFirst), ["2", "0", "1", "3"]);
        assert_eq!(admitted(AdmissionOrder::LongestFirst), ["1", "3", "0", "2"]);
    }

    #[test]
    fn a_request_that_never_fits_is_refused_at_once() {
        let mut queue = AdmissionQueue::new(AdmissionOrder::FirstCome, 10);
        let err = queue.push(waiting(7, 1, 11)).expect_err("too large");
        assert_eq!((err.needed, err.budget), (11, 10));
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
            if next.id.as_str() == "0" {
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
        assert_eq!(queue.admit().expect("fits").id.as_str(), "0");
        assert_eq!(queue.admit(), None);
        queue.release(6);
        assert_eq!(queue.admit().expect("fits").id.as_str(), "1");
        assert_eq!(queue.admit().expect("fits").id.as_str(), "2");
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
                let others = come_by[next.id.as_str().parse::<usize>().expect("a number")] - 1;
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
                let held: usize = running.iter().map(|w: &Waiting| w.cache_tokens).sum();
                prop_assert!(held <= budget && held == queue.held());
                let ended = running.remove(0);
                queue.release(ended.cache_tokens);
                prop_assert!(done.insert(ended.id), "admitted twice");
            }
            prop_assert!(queue.is_empty());
        }
    }
}
