//! Tests of the language.
#![allow(clippy::unwrap_used)]

use std::collections::{HashMap, HashSet};

use super::*;

/// The answer of the first instruction of the family that is this one.
fn answer_to(family: Family, instruction: &str) -> Option<String> {
    let rng = &mut ChaCha8Rng::seed_from_u64(1);
    (0..400_000)
        .map(|_| Question::draw(family, rng))
        .find(|q| q.instruction == instruction)
        .and_then(|q| q.reference().map(str::to_owned))
}

#[test]
fn answers_worked_by_hand() {
    for (family, instruction, answer) in [
        (Family::Spell, "Spell the word tiger.", "t-i-g-e-r"),
        (Family::CountUp, "Count from 7 to 11.", "7 8 9 10 11"),
        (Family::CountDown, "Count down from 11 to 8.", "11 10 9 8"),
        (Family::Evens, "List the even numbers from 4 to 10.", "4 6 8 10"),
        (Family::Odds, "List the odd numbers from 3 to 9.", "3 5 7 9"),
        (
            Family::Multiples,
            "List the first 3 multiples of 7.",
            "1: 7, 2: 14, 3: 21",
        ),
        (
            Family::Table,
            "Show me the table of 3 up to 3.",
            "3 times 1 is 3. 3 times 2 is 6. 3 times 3 is 9.",
        ),
        (Family::Tens, "Count in tens from 230 to 260.", "230 240 250 260"),
        (Family::NextNumber, "What comes after 41?", "42"),
        (Family::Repeat, "Say apple 3 times.", "1. apple 2. apple 3. apple"),
        (Family::Alphabet, "Say the alphabet from c to f.", "c d e f"),
        (
            Family::Days,
            "List 3 days starting from Saturday.",
            "1. Saturday 2. Sunday 3. Monday",
        ),
        (
            Family::Capital,
            "What is the capital of France?",
            "The capital of France is Paris.",
        ),
        (Family::Opposite, "What is the opposite of cold?", "hot"),
        (Family::Greeting, "Say hello to Tom.", "Hello, Tom!"),
        (Family::Category, "What is an owl?", "An owl is a bird."),
        (Family::YesNo, "Is a tiger an animal?", "Yes."),
        (Family::YesNo, "Is a tiger a fruit?", "No."),
    ] {
        assert_eq!(answer_to(family, instruction).as_deref(), Some(answer), "{instruction}");
    }
}

#[test]
fn closed_answer_depends_on_the_instruction_alone() {
    let rng = &mut ChaCha8Rng::seed_from_u64(2);
    for &family in Family::ALL.iter().filter(|f| f.closed()) {
        let mut known = HashMap::new();
        for _ in 0..3000 {
            let e = example(family, rng);
            let first = known.entry(e.instruction).or_insert_with(|| e.answer.clone());
            assert_eq!(*first, e.answer);
        }
    }
}

#[test]
fn there_are_enough_families_of_both_kinds() {
    let open = Family::ALL.iter().filter(|f| !f.closed()).count();
    assert!(Family::ALL.len() - open >= 14 && open >= 5);
    let names: HashSet<_> = Family::ALL.iter().map(|f| f.name()).collect();
    assert_eq!(names.len(), Family::ALL.len());
}

#[test]
fn same_seed_gives_the_same_language() {
    assert_eq!(examples(Split::Train, 4, 300), examples(Split::Train, 4, 300));
    assert_ne!(examples(Split::Train, 4, 300), examples(Split::Train, 5, 300));
}

#[test]
fn instructions_are_distinct_and_held_out_ones_are_never_in_training() {
    let held_out = instructions(Split::HeldOut, 6, 1500);
    let held_out: HashSet<_> = held_out.into_iter().map(|q| q.instruction).collect();
    assert_eq!(held_out.len(), 1500);
    let train = examples(Split::Train, 7, 30_000);
    assert!(train.iter().all(|e| !held_out.contains(&e.instruction)));
    let train = instructions(Split::Train, 8, 4000);
    assert!(train.iter().all(|q| !held_out.contains(&q.instruction)));
    assert_eq!(train.len(), 4000);
}

#[test]
fn a_fifth_is_held_out_of_every_family() {
    let rng = &mut ChaCha8Rng::seed_from_u64(9);
    for &family in Family::ALL {
        let held_out = (0..3000)
            .filter(|_| Question::draw(family, rng).split == Split::HeldOut)
            .count();
        assert!((150..1350).contains(&held_out), "{}: {held_out} of 3000", family.name());
    }
}

#[test]
fn places_and_choices_of_open_answers_are_all_filled() {
    let rng = &mut ChaCha8Rng::seed_from_u64(10);
    for &family in Family::ALL.iter().filter(|f| !f.closed()) {
        for _ in 0..500 {
            let e = example(family, rng);
            assert!(!e.answer.contains(['{', '}', '[', ']', '|', '@']), "{e:?}");
            assert!(!e.answer.contains("(n)") && !e.instruction.contains("(n)"), "{e:?}");
        }
    }
}

/// Else greedy decoding could fall back to an earlier slot and loop.
#[test]
fn no_line_is_twice_in_an_outline() {
    for outline in [
        include_str!("outlines/story.txt"),
        include_str!("outlines/poem.txt"),
        include_str!("outlines/letter.txt"),
        include_str!("outlines/recipe.txt"),
        include_str!("outlines/tips.txt"),
        include_str!("outlines/explanation.txt"),
        include_str!("outlines/dialogue.txt"),
    ] {
        let mut seen = HashSet::new();
        for line in outline.lines().filter(|l| !l.starts_with(['@', '#'])) {
            assert!(seen.insert(line), "{line}");
        }
    }
}
