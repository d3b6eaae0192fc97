//! Open-ended texts from an outline: slots in a fixed order, each left out or filled at random.
//!
//! A text always ends, because the slots do, and no sentence can come twice, so that greedy decoding
//! does not loop. An outline's file holds `@` headers, each followed by its alternatives: `@brief` and
//! `@full` are the openings, which tell the mood; `@0`, `@1`, `@2` are slots of every text, of plain
//! and long ones, of long ones alone; `@end` ends. `[a|b]` is a choice, `{topic}` and its like are filled
//! in, and `@numbered` puts numbers before the slots.

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use super::question::articles;
use super::words;

/// How long a text is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    /// Slots of level 0 alone.
    Short,
    /// Slots up to level 1.
    Plain,
    /// All slots.
    Long,
}

/// Probability that a slot is filled after a brief opening; low enough that lengths vary widely.
const BRIEF: f64 = 0.5;
/// The same after a full one; high, so that the largest of a few samples is nearly the same each time.
const FULL: f64 = 0.9;

/// What an open-ended instruction asks for.
#[derive(Debug, Clone)]
pub(super) struct Composition {
    /// The outline's text, in the format above.
    pub outline: &'static str,
    /// The subject.
    pub topic: &'static str,
    /// How long it is to be.
    pub size: Size,
    /// The reader's name, where the instruction tells it.
    pub friend: Option<&'static str>,
}

/// An outline, parsed.
#[derive(Default)]
struct Outline<'a> {
    numbered: bool,
    brief: Vec<&'a str>,
    full: Vec<&'a str>,
    slots: Vec<(u8, Vec<&'a str>)>,
    end: Vec<&'a str>,
}

impl<'a> Outline<'a> {
    fn parse(text: &'a str) -> Self {
        let mut outline = Self::default();
        let mut header = "";
        for line in text.lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
            if let Some(name) = line.strip_prefix('@') {
                header = name;
                match name {
                    "numbered" => outline.numbered = true,
                    "0" => outline.slots.push((0, Vec::new())),
                    "1" => outline.slots.push((1, Vec::new())),
                    "2" => outline.slots.push((2, Vec::new())),
                    _ => {}
                }
                continue;
            }
            match header {
                "brief" => outline.brief.push(line),
                "full" => outline.full.push(line),
                "end" => outline.end.push(line),
                _ => {
                    if let Some((_, lines)) = outline.slots.last_mut() {
                        lines.push(line);
                    }
                }
            }
        }
        outline
    }
}

impl Composition {
    /// Writes one text.
    pub fn compose(&self, rng: &mut ChaCha8Rng) -> String {
        let outline = Outline::parse(self.outline);
        let name = pick(words::NAMES, rng);
        let friend = self.friend.unwrap_or_else(|| {
            loop {
                let friend = pick(words::NAMES, rng);
                if friend != name {
                    break friend;
                }
            }
        });
        let values = [
            ("{topic}", self.topic),
            ("{name}", name),
            ("{friend}", friend),
            ("{place}", pick(words::PLACES, rng)),
            ("{thing}", pick(words::THINGS, rng)),
            ("{food}", pick(words::FOODS, rng)),
        ];
        let (openings, share) = if rng.random_bool(0.5) {
            (&outline.full, FULL)
        } else {
            (&outline.brief, BRIEF)
        };
        let level = self.size as u8;
        let mut text = sentence(openings, &values, rng);
        let mut number = 0;
        for (slot, lines) in &outline.slots {
            if *slot > level || !rng.random_bool(share) {
                continue;
            }
            number += 1;
            if outline.numbered {
                text.push_str(&format!(" {number}."));
            }
            text.push(' ');
            text.push_str(&sentence(lines, &values, rng));
        }
        text.push(' ');
        text.push_str(&sentence(&outline.end, &values, rng));
        text
    }
}

/// One of the alternatives, with its choices made and its places filled.
fn sentence(lines: &[&str], values: &[(&str, &str)], rng: &mut ChaCha8Rng) -> String {
    let line = pick(lines, rng);
    let mut text = String::new();
    let mut rest = line;
    while let Some((before, after)) = rest.split_once('[') {
        let (choices, behind) = after.split_once(']').unwrap_or((after, ""));
        let choices: Vec<&str> = choices.split('|').collect();
        text.push_str(before);
        text.push_str(pick(&choices, rng));
        rest = behind;
    }
    text.push_str(rest);
    for (place, value) in values {
        text = text.replace(place, value);
    }
    text = articles(&text);
    if line.starts_with("{topic}") {
        let tail = text.split_off(1);
        text.make_ascii_uppercase();
        text.push_str(&tail);
    }
    text
}

/// One item of a list that is never empty.
pub(super) fn pick<'a>(items: &[&'a str], rng: &mut ChaCha8Rng) -> &'a str {
    items.choose(rng).copied().unwrap_or_default()
}
