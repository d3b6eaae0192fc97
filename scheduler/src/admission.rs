//! Who gets the next free slot of the continuous mode.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::str::FromStr;

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
pub struct Waiting<T> {
    /// What the caller knows it by; small, so that many can wait.
    pub item: T,
    /// The predicted length of its answer, in tokens.
    pub predicted: u32,
    /// KV cache that it will need: prompt and predicted answer, in tokens.
    pub cache_tokens: usize,
}

/// A request that can never be admitted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a request needs {needed} tokens of KV cache, the budget is {budget}")]
pub struct AdmissionError {
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

/// Where a waiting request stands: by the order's key, then by arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    key: u32,
    arrival: u64,
}

impl Ord for Place {
    fn cmp(&self, other: &Self) -> Ordering {
        #[cfg(test)]
        tests::COMPARISONS.with(|count| count.set(count.get() + 1));
        (self.key, self.arrival).cmp(&(other.key, other.arrival))
    }
}

impl PartialOrd for Place {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// What arrives between two departures.
#[derive(Debug)]
struct Wave {
    /// Departures before it.
    departures: u64,
    /// Arrivals up to its end.
    arrivals: u64,
}

/// Waiting requests and the KV budget that the admitted ones hold a share of. Every operation is O(log n).
#[derive(Debug)]
pub struct AdmissionQueue<T> {
    order: AdmissionOrder,
    budget: usize,
    held: usize,
    by_order: BTreeMap<Place, Waiting<T>>,
    /// The order's key of the oldest waiting request and of all that arrived later, `None` where they have departed. Not
    /// much longer than those that wait: the oldest does not wait for ever.
    by_arrival: VecDeque<Option<u32>>,
    /// From that of the oldest waiting request on.
    waves: VecDeque<Wave>,
    most_overtaken: u64,
    arrivals: u64,
    /// Requests that were admitted or cancelled.
    departures: u64,
}

impl<T> AdmissionQueue<T> {
    /// `budget`: tokens of KV cache that the admitted requests may hold together.
    pub fn new(order: AdmissionOrder, budget: usize) -> Self {
        Self {
            order,
            budget,
            held: 0,
            by_order: BTreeMap::new(),
            by_arrival: VecDeque::new(),
            waves: VecDeque::new(),
            most_overtaken: MOST_OVERTAKEN,
            arrivals: 0,
            departures: 0,
        }
    }

    /// Adds a request. Returns how many have arrived before it: its number, by which it can be cancelled.
    ///
    /// # Errors
    /// It needs more than the whole budget.
    pub fn push(&mut self, waiting: Waiting<T>) -> Result<u64, AdmissionError> {
        if waiting.cache_tokens > self.budget {
            let (needed, budget) = (waiting.cache_tokens, self.budget);
            return Err(AdmissionError { needed, budget });
        }
        let key = self.key(waiting.predicted);
        let arrival = self.arrivals;
        self.by_arrival.push_back(Some(key));
        self.by_order.insert(Place { key, arrival }, waiting);
        self.arrivals += 1;
        match self.waves.back_mut() {
            Some(wave) if wave.departures == self.departures => wave.arrivals = self.arrivals,
            _ => self.waves.push_back(Wave {
                departures: self.departures,
                arrivals: self.arrivals,
            }),
        }
        Ok(arrival)
    }

    /// Where the order puts a request of this predicted length.
    fn key(&self, predicted: u32) -> u32 {
        match self.order {
            AdmissionOrder::FirstCome => 0,
            AdmissionOrder::ShortestFirst => predicted,
            AdmissionOrder::LongestFirst => u32::MAX - predicted,
        }
    }

    /// Changes what is known of a waiting request. False, and nothing changed, where it no longer waits or would need more
    /// than the whole budget.
    pub fn revise(&mut self, arrival: u64, predicted: u32, cache_tokens: usize) -> bool {
        let key = self.key(predicted);
        let at = arrival.checked_sub(self.oldest()).map(|at| at as usize);
        let known = at.and_then(|at| self.by_arrival.get_mut(at)).and_then(Option::as_mut);
        let Some(known) = known.filter(|_| cache_tokens <= self.budget) else {
            return false;
        };
        let before = std::mem::replace(known, key);
        let Some(waiting) = self.by_order.remove(&Place { key: before, arrival }) else {
            return false;
        };
        let revised = Waiting {
            predicted,
            cache_tokens,
            ..waiting
        };
        self.by_order.insert(Place { key, arrival }, revised);
        true
    }

    /// The next request, whether or not it fits.
    pub fn first(&self) -> Option<&Waiting<T>> {
        self.by_order.get(&self.next_place()?)
    }

    /// The next request, if what it needs fits beside what is held; its share is held from now on. The first in order
    /// that does not fit is waited for, not passed over: smaller ones behind it would keep it out for ever.
    pub fn admit(&mut self) -> Option<Waiting<T>> {
        let place = self.next_place()?;
        let waiting = self.by_order.get(&place)?;
        if waiting.cache_tokens > self.budget - self.held {
            return None;
        }
        let waiting = self.depart(place)?;
        self.held += waiting.cache_tokens;
        Some(waiting)
    }

    /// Takes a waiting request out. `None` where it no longer waits: it was admitted or cancelled.
    pub fn cancel(&mut self, arrival: u64) -> Option<Waiting<T>> {
        let at = arrival.checked_sub(self.oldest())?;
        let key = (*self.by_arrival.get(at as usize)?)?;
        self.depart(Place { key, arrival })
    }

    /// The number of the oldest request that waits; where none does, of the next to come.
    fn oldest(&self) -> u64 {
        self.arrivals - self.by_arrival.len() as u64
    }

    fn depart(&mut self, place: Place) -> Option<Waiting<T>> {
        let waiting = self.by_order.remove(&place)?;
        let at = (place.arrival - self.oldest()) as usize;
        self.by_arrival[at] = None;
        self.departures += 1;
        while let Some(None) = self.by_arrival.front() {
            self.by_arrival.pop_front();
        }
        let oldest = self.oldest();
        while self.waves.front().is_some_and(|wave| wave.arrivals <= oldest) {
            self.waves.pop_front();
        }
        Some(waiting)
    }

    /// The oldest request if it is overdue, else the first in order. It is overdue once as many have departed as came
    /// before and with it, and `most_overtaken` more: so many at least came later.
    fn next_place(&self) -> Option<Place> {
        let key = (*self.by_arrival.front()?)?;
        let others = self.waves.front()?.arrivals - 1;
        if self.departures >= others + self.most_overtaken {
            let arrival = self.oldest();
            return Some(Place { key, arrival });
        }
        self.by_order.first_key_value().map(|(place, _)| *place)
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
mod tests;
