//! Families about words and letters: spelling, repeating, listing.

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use super::grammar::pick;
use super::question::{Reply, Task};
use super::words::{self, NOUNS, SENTENCES, SHORT_WORDS};

fn letters(word: &str) -> String {
    let letters: Vec<_> = word.chars().map(String::from).collect();
    letters.join("-")
}

/// `1. x 2. y`.
pub(super) fn numbered<'a>(items: impl Iterator<Item = &'a str>) -> String {
    let items: Vec<_> = items
        .enumerate()
        .map(|(i, item)| format!("{}. {item}", i + 1))
        .collect();
    items.join(" ")
}

/// Few times or many: both ends are frequent.
fn times(most: u32, rng: &mut ChaCha8Rng) -> u32 {
    if rng.random_bool(0.2) {
        rng.random_range(2..=most / 3)
    } else {
        rng.random_range(most / 3..=most)
    }
}

/// Different words.
fn list(most: usize, rng: &mut ChaCha8Rng) -> Vec<&'static str> {
    let n = rng.random_range(2..=most);
    NOUNS.choose_multiple(rng, n).map(|(noun, _)| *noun).collect()
}

pub(super) fn spell(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Spell the word {0}.",
        "Spell {0}.",
        "How do you spell {0}?",
        "Please spell the word {0} for me.",
        "Can you spell {0}?",
        "Write the letters of {0}.",
        "Which letters are in the word {0}?",
    ];
    let word = words::noun(rng).0;
    Task {
        key: word.to_owned(),
        phrasings: PHRASINGS,
        values: vec![word.to_owned()],
        reply: Reply::Fixed(letters(word)),
    }
}

pub(super) fn spell_list(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Spell each of these words: {0}.",
        "Spell these words: {0}.",
        "How do you spell the words {0}?",
        "Please spell every word in this list: {0}.",
        "Write the letters of each word: {0}.",
        "Spell all of the following words: {0}.",
    ];
    let list = list(14, rng);
    let answer: Vec<_> = list.iter().map(|word| format!("{word}: {}", letters(word))).collect();
    Task {
        key: list.join(" "),
        phrasings: PHRASINGS,
        values: vec![list.join(", ")],
        reply: Reply::Fixed(answer.join(", ")),
    }
}

pub(super) fn number_list(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Number these words: {0}.",
        "Make a numbered list of {0}.",
        "Put numbers in front of these words: {0}.",
        "Write this as a list: {0}.",
        "List these words with numbers: {0}.",
        "Turn this into a numbered list: {0}.",
    ];
    let list = list(16, rng);
    Task {
        key: list.join(" "),
        phrasings: PHRASINGS,
        values: vec![list.join(", ")],
        reply: Reply::Fixed(numbered(list.iter().copied())),
    }
}

fn repeated(what: &'static str, n: u32, phrasings: &'static [&'static str]) -> Task {
    Task {
        key: format!("{what} {n}"),
        phrasings,
        values: vec![what.to_owned(), n.to_string()],
        reply: Reply::Fixed(numbered((0..n).map(|_| what))),
    }
}

pub(super) fn repeat(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Repeat the word {0} {1} times.",
        "Say {0} {1} times.",
        "Write the word {0} {1} times.",
        "Write {0} {1} times, with numbers.",
        "Please say the word {0} {1} times.",
        "Can you repeat {0} {1} times?",
    ];
    repeated(pick(SHORT_WORDS, rng), times(100, rng), PHRASINGS)
}

pub(super) fn repeat_line(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Write this sentence {1} times: {0}",
        "Repeat this sentence {1} times: {0}",
        "Write {1} times: {0}",
        "Please write this line {1} times: {0}",
        "Copy the following sentence {1} times: {0}",
        "Say this {1} times: {0}",
    ];
    repeated(pick(SENTENCES, rng), times(40, rng), PHRASINGS)
}

pub(super) fn alphabet(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Say the alphabet from {0} to {1}.",
        "Write the letters from {0} to {1}.",
        "List the letters of the alphabet from {0} to {1}.",
        "Which letters go from {0} to {1}?",
        "Give me the alphabet from {0} to {1}.",
        "Please write the alphabet from {0} to {1}.",
    ];
    let first = rng.random_range(b'a'..=b'x');
    let last = rng.random_range(first + 2..=b'z');
    let all: Vec<_> = (first..=last).map(|c| char::from(c).to_string()).collect();
    let (from, to) = (all[0].clone(), char::from(last).to_string());
    Task {
        key: format!("{from} {to}"),
        phrasings: PHRASINGS,
        values: vec![from, to],
        reply: Reply::Fixed(all.join(" ")),
    }
}
