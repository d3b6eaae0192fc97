//! Families about numbers. Ranges end at a number that the instruction names.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::question::{Reply, Task};

/// Largest number in a range.
const LARGEST: u32 = 200;
/// Largest number of numbers in a range.
const LONGEST: u32 = 170;

/// First and last number of a range: short ones and long ones are both frequent.
fn range(longest: u32, rng: &mut ChaCha8Rng) -> (u32, u32) {
    let len = if rng.random_bool(0.3) {
        rng.random_range(3..=30)
    } else {
        rng.random_range(30..=longest)
    };
    let first = rng.random_range(1..=LARGEST + 1 - len);
    (first, first + len - 1)
}

fn joined(numbers: impl Iterator<Item = u32>) -> String {
    numbers.map(|n| n.to_string()).collect::<Vec<_>>().join(" ")
}

fn ranged(first: u32, last: u32, phrasings: &'static [&'static str], answer: String) -> Task {
    Task {
        key: format!("{first} {last}"),
        phrasings,
        values: vec![first.to_string(), last.to_string()],
        reply: Reply::Fixed(answer),
    }
}

pub(super) fn count_up(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Count from {0} to {1}.",
        "Count up from {0} to {1}.",
        "Please count from {0} to {1}.",
        "Can you count from {0} to {1}?",
        "Write all numbers from {0} to {1}.",
        "List the numbers from {0} to {1}.",
        "Say the numbers between {0} and {1}.",
        "Start at {0} and count to {1}.",
    ];
    let (first, last) = range(LONGEST, rng);
    ranged(first, last, PHRASINGS, joined(first..=last))
}

pub(super) fn count_down(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Count down from {0} to {1}.",
        "Count backwards from {0} to {1}.",
        "Please count down from {0} to {1}.",
        "Can you count backwards from {0} to {1}?",
        "Start at {0} and count down to {1}.",
        "Write the numbers down from {0} to {1}.",
    ];
    let (last, first) = range(LONGEST, rng);
    ranged(first, last, PHRASINGS, joined((last..=first).rev()))
}

pub(super) fn evens(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "List the even numbers from {0} to {1}.",
        "Write all even numbers from {0} to {1}.",
        "Which numbers from {0} to {1} are even?",
        "Give me the even numbers between {0} and {1}.",
        "Count in even numbers from {0} to {1}.",
        "Please list every even number from {0} to {1}.",
    ];
    let (first, last) = range(90, rng);
    let (first, last) = (first.div_ceil(2) * 2, (first.div_ceil(2) + (last - first)) * 2);
    let last = last.min(LARGEST);
    ranged(first, last, PHRASINGS, joined((first..=last).step_by(2)))
}

pub(super) fn odds(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "List the odd numbers from {0} to {1}.",
        "Write all odd numbers from {0} to {1}.",
        "Which numbers from {0} to {1} are odd?",
        "Give me the odd numbers between {0} and {1}.",
        "Count in odd numbers from {0} to {1}.",
        "Please list every odd number from {0} to {1}.",
    ];
    let (first, last) = range(90, rng);
    let (first, last) = (first / 2 * 2 + 1, (first / 2 + (last - first)) * 2 + 1);
    let last = last.min(LARGEST - 1);
    ranged(first, last, PHRASINGS, joined((first..=last).step_by(2)))
}

/// Largest of the tens: as far as the tokenizer's numbers go, so that every length can be named.
const LARGEST_TEN: u32 = 510;

pub(super) fn tens(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Count in tens from {0} to {1}.",
        "List the tens from {0} to {1}.",
        "Please count by ten from {0} to {1}.",
        "Write every tenth number from {0} to {1}.",
        "Can you count in tens from {0} to {1}?",
        "Give me the multiples of ten from {0} to {1}.",
    ];
    let len = rng.random_range(3..=40);
    let first = rng.random_range(1..=LARGEST_TEN / 10 + 1 - len) * 10;
    let last = first + (len - 1) * 10;
    ranged(first, last, PHRASINGS, joined((first..=last).step_by(10)))
}

/// `k` from 2 to 12 and `n` from 3 to 20: no product is above 240.
fn factors(rng: &mut ChaCha8Rng) -> (u32, u32) {
    (rng.random_range(2..=12), rng.random_range(3..=20))
}

pub(super) fn multiples(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "List the first {1} multiples of {0}.",
        "Write the first {1} multiples of {0}.",
        "What are the first {1} multiples of {0}?",
        "Give me {1} multiples of {0}.",
        "Show me the first {1} multiples of {0}, please.",
        "Name the first {1} multiples of {0}.",
    ];
    let (k, n) = factors(rng);
    let items: Vec<_> = (1..=n).map(|i| format!("{i}: {}", i * k)).collect();
    ranged(k, n, PHRASINGS, items.join(", "))
}

pub(super) fn table(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Write the multiplication table of {0} up to {1}.",
        "Show me the table of {0} up to {1}.",
        "Give me the times table of {0} up to {1}.",
        "Multiply {0} by every number up to {1}.",
        "What is the multiplication table of {0} up to {1}?",
        "Please write the times table of {0} up to {1}.",
    ];
    let (k, n) = factors(rng);
    let lines: Vec<_> = (1..=n).map(|i| format!("{k} times {i} is {}.", i * k)).collect();
    ranged(k, n, PHRASINGS, lines.join(" "))
}

pub(super) fn next_number(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "What number comes after {0}?",
        "Which number is next after {0}?",
        "What comes after {0}?",
        "Tell me the number after {0}.",
        "Add one to {0}.",
        "What is {0} and one more?",
    ];
    let n = rng.random_range(1..LARGEST);
    Task {
        key: n.to_string(),
        phrasings: PHRASINGS,
        values: vec![n.to_string()],
        reply: Reply::Fixed((n + 1).to_string()),
    }
}
