//! The instruction language that the bundled model is trained on, all of it generated from a seed.
//!
//! *Closed* families have one right answer, fixed by the instruction's content; *open* ones (stories,
//! letters, recipes) have a random answer whose length varies within a range that the instruction tells.
//! Whatever must stop at n is numbered or ends at a value named in the instruction, because a model of a
//! few layers finds an end by comparing, not by counting.

mod facts;
mod family;
mod grammar;
mod numbers;
mod open;
mod question;
mod words;
mod writing;

pub use family::Family;
pub use question::{Example, Question, Split};

use std::collections::HashSet;

use rand::Rng;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Draws in a row without a new instruction after which [`instructions`] stops.
const MOST_REPEATS: usize = 100_000;

/// One example of a family, of either split.
pub fn example(family: Family, rng: &mut ChaCha8Rng) -> Example {
    Question::draw(family, rng).into_example(rng)
}

/// `n` examples for pre-training; instructions may repeat.
///
/// The families are weighted so that each is learnt and the long ones do not take all tokens.
pub fn examples(split: Split, seed: u64, n: usize) -> Vec<Example> {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    (0..n)
        .map(|_| {
            loop {
                let question = Question::draw(weighted(Family::examples_weight, rng), rng);
                if question.split == split {
                    break question.into_example(rng);
                }
            }
        })
        .collect()
}

/// `n` distinct instructions, to collect lengths from or to evaluate on.
///
/// Their lengths are spread widely, with many short and many long ones. Fewer than `n` come back only
/// when the split has no more.
pub fn instructions(split: Split, seed: u64, n: usize) -> Vec<Question> {
    let rng = &mut ChaCha8Rng::seed_from_u64(seed);
    let mut seen = HashSet::new();
    let mut out = Vec::with_capacity(n);
    let mut repeats = 0;
    while out.len() < n && repeats < MOST_REPEATS {
        let question = Question::draw(weighted(Family::instructions_weight, rng), rng);
        if question.split == split && seen.insert(question.instruction.clone()) {
            out.push(question);
            repeats = 0;
        } else {
            repeats += 1;
        }
    }
    out
}

/// A family, drawn by weight.
fn weighted(weight: fn(Family) -> u32, rng: &mut ChaCha8Rng) -> Family {
    let total: u32 = Family::ALL.iter().map(|&f| weight(f)).sum();
    let mut left = rng.random_range(0..total);
    for &family in Family::ALL {
        let w = weight(family);
        if left < w {
            return family;
        }
        left -= w;
    }
    Family::ALL[0]
}

#[cfg(test)]
mod tests;
