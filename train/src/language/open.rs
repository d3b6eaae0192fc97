//! The open-ended families: what is asked, about what, and how long.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::grammar::{Composition, Size, pick};
use super::question::{Reply, Task};
use super::words::{ANIMALS, DISHES, NAMES, NATURE, POEM_TOPICS, SKILLS, SUBJECTS};

/// An open-ended task; `{0}` is the size with a space behind it, `{1}` the topic, `{2}` a friend's name.
fn open(
    outline: &'static str,
    phrasings: &'static [&'static str],
    topic: &'static str,
    friend: Option<&'static str>,
    rng: &mut ChaCha8Rng,
) -> Task {
    let (size, word) = match rng.random_range(0..10) {
        0..3 => (Size::Short, "short "),
        3..5 => (Size::Plain, ""),
        _ => (Size::Long, "long "),
    };
    let friend_name = friend.unwrap_or_default();
    Task {
        key: format!("{topic} {word}{friend_name}"),
        phrasings,
        values: vec![word.to_owned(), topic.to_owned(), friend_name.to_owned()],
        reply: Reply::Open(Composition {
            outline,
            topic,
            size,
            friend,
        }),
    }
}

pub(super) fn story(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Write a {0}story about a(n) {1}.",
        "Tell me a {0}story about a(n) {1}.",
        "Please write a {0}story about a(n) {1}.",
        "I would like to hear a {0}story about a(n) {1}.",
        "Can you tell a {0}story about a(n) {1}?",
        "Give me a {0}story about a(n) {1}.",
        "Make up a {0}story about a(n) {1}.",
        "My son wants a {0}story about a(n) {1}.",
    ];
    open(
        include_str!("outlines/story.txt"),
        PHRASINGS,
        pick(ANIMALS, rng),
        None,
        rng,
    )
}

pub(super) fn poem(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Write a {0}poem about the {1}.",
        "Please write a {0}poem about the {1}.",
        "I need a {0}poem about the {1}.",
        "Can you write a {0}poem about the {1}?",
        "Compose a {0}poem about the {1}.",
        "Give me a {0}poem about the {1}.",
        "Read me a {0}poem about the {1}.",
    ];
    open(
        include_str!("outlines/poem.txt"),
        PHRASINGS,
        pick(POEM_TOPICS, rng),
        None,
        rng,
    )
}

pub(super) fn letter(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Write a {0}letter to my friend {2} about {1}.",
        "Write a {0}letter to {2} about {1}.",
        "Please write a {0}letter to {2} about {1}.",
        "I need a {0}letter to my friend {2} about {1}.",
        "Help me write a {0}letter to {2} about {1}.",
        "Can you write a {0}letter to {2} about {1}?",
    ];
    let friend = pick(NAMES, rng);
    open(
        include_str!("outlines/letter.txt"),
        PHRASINGS,
        pick(SUBJECTS, rng),
        Some(friend),
        rng,
    )
}

pub(super) fn recipe(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Give me a {0}recipe for {1}.",
        "Write a {0}recipe for {1}.",
        "I need a {0}recipe for {1}.",
        "Do you have a {0}recipe for {1}?",
        "Please write a {0}recipe for {1}.",
        "Can I have a {0}recipe for {1}?",
    ];
    open(
        include_str!("outlines/recipe.txt"),
        PHRASINGS,
        pick(DISHES, rng),
        None,
        rng,
    )
}

pub(super) fn tips(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Give me a {0}list of tips for {1}.",
        "Write a {0}list of tips for {1}.",
        "Make a {0}list of ideas for {1}.",
        "I need a {0}list of tips for {1}.",
        "Can you give me a {0}list of ideas for {1}?",
        "Please make a {0}list of tips for {1}.",
    ];
    open(
        include_str!("outlines/tips.txt"),
        PHRASINGS,
        pick(SKILLS, rng),
        None,
        rng,
    )
}

pub(super) fn explanation(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Give me a {0}text that explains {1}.",
        "Write a {0}text about {1} for school.",
        "I need a {0}lesson about {1}.",
        "Can you give a {0}talk about {1}?",
        "Please write a {0}report about {1}.",
        "Teach me about {1} in a {0}text.",
    ];
    open(
        include_str!("outlines/explanation.txt"),
        PHRASINGS,
        pick(NATURE, rng),
        None,
        rng,
    )
}

pub(super) fn dialogue(rng: &mut ChaCha8Rng) -> Task {
    const PHRASINGS: &[&str] = &[
        "Write a {0}dialogue about {1}.",
        "Write a {0}talk between two friends about {1}.",
        "Make up a {0}dialogue between two friends about {1}.",
        "I need a {0}dialogue about {1}.",
        "Please write a {0}dialogue about {1}.",
        "Can you write a {0}dialogue about {1}?",
    ];
    let topic = pick(if rng.random_bool(0.5) { SKILLS } else { SUBJECTS }, rng);
    open(include_str!("outlines/dialogue.txt"), PHRASINGS, topic, None, rng)
}
