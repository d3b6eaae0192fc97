//! Families about facts: days and months, capitals, opposites, names, kinds of things.

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use super::grammar::pick;
use super::question::{Reply, Task, articles};
use super::words::{self, CAPITALS, DAYS, KINDS, MONTHS, NAMES, OPPOSITES};
use super::writing::numbered;

fn cycle(names: &[&'static str], most: usize, phrasings: &'static [&'static str], rng: &mut ChaCha8Rng) -> Task {
    let start = rng.random_range(0..names.len());
    let n = rng.random_range(2..=most);
    Task {
        key: format!("{} {n}", names[start]),
        phrasings,
        values: vec![n.to_string(), names[start].to_owned()],
        reply: Reply::Fixed(numbered(names.iter().copied().cycle().skip(start).take(n))),
    }
}

pub(super) fn days(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "List {0} days starting from {1}.",
        "Name {0} days in a row, beginning with {1}.",
        "Write {0} days of the week starting with {1}.",
        "Give me {0} days from {1} on.",
        "Start with {1} and list {0} days.",
        "Which {0} days follow each other from {1}?",
    ];
    cycle(DAYS, 28, PHRASINGS, rng)
}

pub(super) fn months(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "List {0} months starting from {1}.",
        "Name {0} months in a row, beginning with {1}.",
        "Write {0} months of the year starting with {1}.",
        "Give me {0} months from {1} on.",
        "Start with {1} and list {0} months.",
        "Which {0} months follow each other from {1}?",
    ];
    cycle(MONTHS, 36, PHRASINGS, rng)
}

pub(super) fn capital(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "What is the capital of {0}?",
        "Name the capital of {0}.",
        "Which city is the capital of {0}?",
        "Tell me the capital of {0}.",
        "What is the capital city of {0}?",
        "Do you know the capital of {0}?",
        "Give me the capital of {0}.",
        "Please tell me what the capital of {0} is.",
    ];
    let (country, city) = CAPITALS.choose(rng).copied().unwrap_or_default();
    Task {
        key: country.to_owned(),
        phrasings: PHRASINGS,
        values: vec![country.to_owned()],
        reply: Reply::Fixed(format!("The capital of {country} is {city}.")),
    }
}

pub(super) fn opposite(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "What is the opposite of {0}?",
        "Name the opposite of {0}.",
        "Tell me the opposite of {0}.",
        "Which word is the opposite of {0}?",
        "Give me the opposite of {0}.",
        "What is not {0}?",
        "Do you know the opposite of {0}?",
        "Please give me the word that means the opposite of {0}.",
    ];
    let (one, other) = OPPOSITES.choose(rng).copied().unwrap_or_default();
    let (word, answer) = if rng.random_bool(0.5) {
        (one, other)
    } else {
        (other, one)
    };
    Task {
        key: word.to_owned(),
        phrasings: PHRASINGS,
        values: vec![word.to_owned()],
        reply: Reply::Fixed(answer.to_owned()),
    }
}

pub(super) fn greeting(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Say hello to {0}.",
        "Greet {0}.",
        "Please greet my friend {0}.",
        "This is {0}. Say hello!",
        "My name is {0}.",
        "Hello, I am {0}.",
        "Say hi to my friend {0}, please.",
    ];
    let name = pick(NAMES, rng);
    Task {
        key: name.to_owned(),
        phrasings: PHRASINGS,
        values: vec![name.to_owned()],
        reply: Reply::Fixed(format!("Hello, {name}!")),
    }
}

pub(super) fn category(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "What is a(n) {0}?",
        "Tell me what a(n) {0} is.",
        "What kind of thing is a(n) {0}?",
        "Do you know what a(n) {0} is?",
        "What do you call a(n) {0}?",
        "Please say what a(n) {0} is.",
        "I want to know what a(n) {0} is.",
        "In one sentence, what is a(n) {0}?",
    ];
    let (noun, kind) = words::noun(rng);
    Task {
        key: noun.to_owned(),
        phrasings: PHRASINGS,
        values: vec![noun.to_owned()],
        reply: Reply::Fixed(articles(&format!("A(n) {noun} is a(n) {kind}."))),
    }
}

pub(super) fn yes_no(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Is a(n) {0} a(n) {1}?",
        "Yes or no: is a(n) {0} a(n) {1}?",
        "Can you say if a(n) {0} is a(n) {1}?",
        "Would you call a(n) {0} a(n) {1}?",
        "Is it true that a(n) {0} is a(n) {1}?",
        "Tell me, is a(n) {0} a(n) {1}?",
    ];
    let (noun, kind) = words::noun(rng);
    // Half of the answers are yes, though there are several wrong kinds.
    let asked = if rng.random_bool(0.5) { kind } else { pick(KINDS, rng) };
    Task {
        key: format!("{noun} {asked}"),
        phrasings: PHRASINGS,
        values: vec![noun.to_owned(), asked.to_owned()],
        reply: Reply::Fixed(if asked == kind { "Yes." } else { "No." }.to_owned()),
    }
}
