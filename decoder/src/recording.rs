//! What every slot does while a strategy runs, for a figure.

use std::collections::{BTreeSet, HashMap};

use lengthwise_core::RequestId;
use lengthwise_scheduler::Timeline;

/// A timeline in the making. Steps are counted as the run's statistics count them.
#[derive(Debug, Default)]
pub(crate) struct Recording {
    timeline: Timeline,
    /// Steps of the batches so far.
    steps: u64,
    /// Slots of the continuous mode that nobody has, and since when.
    free: BTreeSet<usize>,
    idle_since: Vec<u64>,
    stays: HashMap<RequestId, Stay>,
}

/// A sequence's time in a slot of the continuous mode.
#[derive(Debug)]
struct Stay {
    slot: usize,
    begin: u64,
    /// Tokens that it had before.
    had: u32,
}

impl Recording {
    /// A static batch: what each row got in it, in tokens, and the steps that all of them waited.
    pub fn batch(&mut self, rows: impl Iterator<Item = u32>, steps: u32) {
        for (slot, tokens) in rows.enumerate() {
            self.timeline.answered(slot, self.steps, tokens, steps);
        }
        self.steps += u64::from(steps);
    }

    /// The continuous mode begins, with all its slots free.
    pub fn open_slots(&mut self, slots: usize) {
        self.free = (0..slots).collect();
        self.idle_since = vec![0; slots];
    }

    /// A sequence that has `had` tokens is given a slot before this step.
    pub fn enter(&mut self, id: &RequestId, step: u64, had: u32) {
        let Some(slot) = self.free.pop_first() else { return };
        self.idle(slot, step);
        self.stays.insert(id.clone(), Stay { slot, begin: step, had });
    }

    /// It leaves its slot before this step, with so many tokens. Where it was `preempted` they are computed again later.
    pub fn leave(&mut self, id: &RequestId, step: u64, tokens: u32, preempted: bool) {
        let Some(Stay { slot, begin, had }) = self.stays.remove(id) else {
            return;
        };
        // Steps without a token come first: parts of a long prompt.
        let tokens = u64::from(tokens.saturating_sub(had)).min(step - begin) as u32;
        let first = step - u64::from(tokens);
        self.timeline.answered(slot, begin, 0, (first - begin) as u32);
        match preempted {
            true => self.timeline.threw_away(slot, first, tokens),
            false => self.timeline.answered(slot, first, tokens, tokens),
        }
        self.free.insert(slot);
        self.idle_since[slot] = step;
    }

    /// Nobody had the slot until this step.
    fn idle(&mut self, slot: usize, step: u64) {
        let since = self.idle_since[slot];
        self.timeline.answered(slot, since, 0, (step - since) as u32);
    }

    /// The continuous mode ends: what is free was idle to the last step.
    pub fn close_slots(&mut self, steps: u64) {
        for slot in std::mem::take(&mut self.free) {
            self.idle(slot, steps);
        }
    }

    /// What was recorded.
    pub fn into_timeline(self) -> Timeline {
        self.timeline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_batch_wait_for_the_longest_and_batches_follow_each_other() {
        let mut recording = Recording::default();
        recording.batch([3, 5].into_iter(), 5);
        recording.batch([2].into_iter(), 2);
        let timeline = recording.into_timeline();
        assert_eq!(timeline.useful, [[0, 0, 3], [1, 0, 5], [0, 5, 7]]);
        assert_eq!(timeline.padding, [[0, 3, 5]]);
    }

    #[test]
    fn slots_are_refilled_and_every_step_of_every_slot_is_in_one_span() {
        let mut recording = Recording::default();
        let [a, b, c] = ["a", "b", "c"].map(RequestId::from);
        recording.open_slots(3);
        recording.enter(&a, 0, 0);
        recording.enter(&b, 0, 0);
        recording.leave(&a, 4, 4, false);
        // In the slot that a had; its prompt took one step more.
        recording.enter(&c, 5, 0);
        recording.leave(&b, 6, 6, true);
        recording.enter(&b, 7, 6);
        recording.leave(&c, 8, 2, false);
        recording.leave(&b, 9, 8, false);
        recording.close_slots(10);
        let timeline = recording.into_timeline();
        assert_eq!(timeline.useful, [[0, 0, 4], [0, 6, 8], [1, 7, 9]]);
        assert_eq!(timeline.thrown_away, [[1, 0, 6]]);
        assert_eq!(
            timeline.padding,
            [[0, 4, 5], [1, 6, 7], [0, 5, 6], [0, 8, 10], [1, 9, 10], [2, 0, 10]]
        );
        let area: u64 = [&timeline.useful, &timeline.padding, &timeline.thrown_away]
            .map(Timeline::area)
            .iter()
            .sum();
        assert_eq!(area, 3 * 10);
    }
}
