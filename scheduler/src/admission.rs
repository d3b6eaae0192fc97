//! Who gets the next free slot of the continuous mode.

use std::cmp::Ordering;
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

/// Where a waiting request stands: by the order's key, then by arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    key: u32,
    arrival: u64,
}

impl Place {
    /// The same among places of all the same key.
    fn of_arrival(self) -> Self {
        Self { key: 0, ..self }
    }
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

/// Waiting requests and the KV budget that the admitted ones hold a share of. Every operation is O(log n).
#[derive(Debug)]
pub struct AdmissionQueue {
    order: AdmissionOrder,
    budget: usize,
    held: usize,
    by_order: BTreeMap<Place, Waiting>,
    /// All places with a key of 0 → the order's key, and the wave it came in.
    by_arrival: BTreeMap<Place, (u32, u64)>,
    /// Wave → arrivals up to its end. A wave is what arrives between two departures, named by the number of departures
    /// before it. Waves older than the oldest waiting request are dropped.
    waves: BTreeMap<u64, u64>,
    most_overtaken: u64,
    arrivals: u64,
    /// Requests that were admitted or cancelled.
    departures: u64,
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
            departures: 0,
        }
    }

    /// Adds a request. Returns its place, by which it can be cancelled.
    ///
    /// # Errors
    /// It needs more than the whole budget.
    pub fn push(&mut self, waiting: Waiting) -> Result<Place, AdmissionError> {
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
        let place = Place {
            key,
            arrival: self.arrivals,
        };
        self.by_arrival.insert(place.of_arrival(), (key, self.departures));
        self.by_order.insert(place, waiting);
        self.arrivals += 1;
        self.waves.insert(self.departures, self.arrivals);
        Ok(place)
    }

    /// The next request, if what it needs fits beside what is held; its share is held from now on. The first in order
    /// that does not fit is waited for, not passed over: smaller ones behind it would keep it out for ever.
    pub fn admit(&mut self) -> Option<Waiting> {
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
    pub fn cancel(&mut self, place: Place) -> Option<Waiting> {
        self.depart(place)
    }

    fn depart(&mut self, place: Place) -> Option<Waiting> {
        let waiting = self.by_order.remove(&place)?;
        self.by_arrival.remove(&place.of_arrival());
        self.departures += 1;
        let oldest = self
            .by_arrival
            .first_key_value()
            .map_or(u64::MAX, |(_, &(_, wave))| wave);
        while self.waves.first_key_value().is_some_and(|(&wave, _)| wave < oldest) {
            self.waves.pop_first();
        }
        Some(waiting)
    }

    /// The oldest request if it is overdue, else the first in order. It is overdue once as many have departed as came
    /// before and with it, and `most_overtaken` more: so many at least came later.
    fn next_place(&self) -> Option<Place> {
        let (&Place { arrival, .. }, &(key, wave)) = self.by_arrival.first_key_value()?;
        let others = self.waves.get(&wave)?.saturating_sub(1);
        if self.departures >= others + self.most_overtaken {
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
