//! In which order examples are seen.

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

/// The examples of optimiser step `step` (from 0), cut into forward passes: every epoch is one shuffle, seeded by the
/// run's seed and its number, so that a resumed run sees what it would have seen.
pub(super) struct Order {
    pub examples: usize,
    pub batch_size: usize,
    pub accumulation: usize,
    pub seed: u64,
}

impl Order {
    /// Optimiser steps in one epoch; the last may be smaller.
    pub fn steps_per_epoch(&self) -> usize {
        self.examples.div_ceil(self.per_step())
    }

    /// Examples of one step; more than there are stands for all.
    fn per_step(&self) -> usize {
        self.batch_size.saturating_mul(self.accumulation)
    }

    /// All examples in the order of an epoch, from 0.
    pub fn shuffled(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.examples).collect();
        let seed = self.seed ^ epoch.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
        order
    }

    pub fn step(&self, step: usize) -> Vec<Vec<usize>> {
        let (epoch, within) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let order = self.shuffled(epoch as u64);
        let begin = within * self.per_step();
        let end = begin.saturating_add(self.per_step()).min(self.examples);
        order[begin..end]
            .chunks(self.batch_size)
            .map(<[usize]>::to_vec)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_sees_every_example_once_in_its_own_order() {
        let order = Order {
            examples: 23,
            batch_size: 4,
            accumulation: 2,
            seed: 5,
        };
        assert_eq!(order.steps_per_epoch(), 3);
        let epoch = |e: usize| -> Vec<usize> { (3 * e..3 * e + 3).flat_map(|s| order.step(s)).flatten().collect() };
        let (first, second) = (epoch(0), epoch(1));
        assert_ne!(first, second);
        for mut seen in [first, second] {
            seen.sort_unstable();
            assert_eq!(seen, (0..23).collect::<Vec<_>>());
        }
        assert_eq!(order.step(2).iter().map(Vec::len).collect::<Vec<_>>(), [4, 3]);
    }

    #[test]
    fn a_batch_larger_than_any_memory_is_the_whole_data() {
        let order = Order {
            examples: 3,
            batch_size: usize::MAX / 2 + 1,
            accumulation: 2,
            seed: 5,
        };
        assert_eq!(order.steps_per_epoch(), 1);
        assert_eq!(order.step(0).iter().map(Vec::len).collect::<Vec<_>>(), [3]);
    }
}
