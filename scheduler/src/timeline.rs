//! Which slot did what in which step, for a figure.

use serde::{Deserialize, Serialize};

/// Stretches of a slot: `[slot, first step, step after the last]`.
pub type Spans = Vec<[u64; 3]>;

/// What the slots of a run did, step by step. Its area is the run's slots × steps.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// Tokens of answers.
    pub useful: Spans,
    /// Steps of a slot whose answer had ended, or that had none.
    pub padding: Spans,
    /// Tokens that were thrown away: their request was stopped and begun anew.
    pub thrown_away: Spans,
}

impl Timeline {
    /// A slot that had `tokens` of `steps` steps in an answer and stood idle for the rest.
    pub fn answered(&mut self, slot: usize, begin: u64, tokens: u32, steps: u32) {
        push(&mut self.useful, slot, begin, begin + u64::from(tokens));
        push(
            &mut self.padding,
            slot,
            begin + u64::from(tokens),
            begin + u64::from(steps),
        );
    }

    /// A slot whose tokens of all the steps were thrown away.
    pub fn threw_away(&mut self, slot: usize, begin: u64, steps: u32) {
        push(&mut self.thrown_away, slot, begin, begin + u64::from(steps));
    }

    /// Slots × steps of spans.
    pub fn area(spans: &Spans) -> u64 {
        spans.iter().map(|[_, begin, end]| end - begin).sum()
    }

    /// One more than the last slot and the last step.
    pub fn size(&self) -> (u64, u64) {
        let all = [&self.useful, &self.padding, &self.thrown_away].into_iter().flatten();
        all.fold((0, 0), |(slots, steps), [slot, _, end]| {
            (slots.max(slot + 1), steps.max(*end))
        })
    }
}

fn push(spans: &mut Spans, slot: usize, begin: u64, end: u64) {
    if begin < end {
        spans.push([slot as u64, begin, end]);
    }
}
