//! An instruction with the means to answer it, and the split by content.

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::grammar::Composition;
use super::{Family, facts, numbers, open, writing};

/// An instruction and one right answer to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// The kind of instruction.
    pub family: Family,
    /// What is asked.
    pub instruction: String,
    /// The answer; the only right one where the family is closed.
    pub answer: String,
}

/// Which part of the language: a content is in one of them, whatever its phrasing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// Four fifths, for pre-training and tuning.
    Train,
    /// One fifth, for evaluation only.
    HeldOut,
}

/// An instruction that can be answered, again and again where it is open-ended.
#[derive(Debug, Clone)]
pub struct Question {
    /// The kind of instruction.
    pub family: Family,
    /// What is asked.
    pub instruction: String,
    /// The part of the language that it belongs to.
    pub split: Split,
    reply: Reply,
}

/// What the instruction is about, before it is phrased.
pub(super) struct Task {
    /// The arguments, without the phrasing; with the family they decide the split.
    pub key: String,
    /// Ways to ask, with `{0}`, `{1}` for the values and `a(n)` for the article that fits.
    pub phrasings: &'static [&'static str],
    /// The values of the phrasing's places.
    pub values: Vec<String>,
    /// The answer.
    pub reply: Reply,
}

/// How a task is answered.
#[derive(Debug, Clone)]
pub(super) enum Reply {
    /// The one right answer.
    Fixed(String),
    /// A text composed anew each time.
    Open(Composition),
}

impl Question {
    /// Draws an instruction of a family, of either split.
    pub fn draw(family: Family, rng: &mut ChaCha8Rng) -> Self {
        let task = task(family, rng);
        let phrasing = rng.random_range(0..task.phrasings.len());
        let key = if family.is_fact() {
            format!("{} {} {phrasing}", family.name(), task.key)
        } else {
            format!("{} {}", family.name(), task.key)
        };
        Self {
            family,
            instruction: fill(task.phrasings[phrasing], &task.values),
            split: split_of(&key),
            reply: task.reply,
        }
    }

    /// An answer: always the same one where the family is closed, else a new one.
    pub fn answer(&self, rng: &mut ChaCha8Rng) -> String {
        match &self.reply {
            Reply::Fixed(answer) => answer.clone(),
            Reply::Open(composition) => composition.compose(rng),
        }
    }

    /// The one right answer, where there is one.
    pub fn reference(&self) -> Option<&str> {
        match &self.reply {
            Reply::Fixed(answer) => Some(answer),
            Reply::Open(_) => None,
        }
    }

    pub(super) fn into_example(self, rng: &mut ChaCha8Rng) -> Example {
        let answer = self.answer(rng);
        Example {
            family: self.family,
            instruction: self.instruction,
            answer,
        }
    }
}

/// A task of the family with arguments drawn at random.
fn task(family: Family, rng: &mut ChaCha8Rng) -> Task {
    match family {
        Family::Spell => writing::spell(rng),
        Family::SpellList => writing::spell_list(rng),
        Family::CountUp => numbers::count_up(rng),
        Family::CountDown => numbers::count_down(rng),
        Family::Evens => numbers::evens(rng),
        Family::Odds => numbers::odds(rng),
        Family::Tens => numbers::tens(rng),
        Family::Multiples => numbers::multiples(rng),
        Family::Table => numbers::table(rng),
        Family::NextNumber => numbers::next_number(rng),
        Family::Repeat => writing::repeat(rng),
        Family::RepeatLine => writing::repeat_line(rng),
        Family::Alphabet => writing::alphabet(rng),
        Family::NumberList => writing::number_list(rng),
        Family::Days => facts::days(rng),
        Family::Months => facts::months(rng),
        Family::Capital => facts::capital(rng),
        Family::Opposite => facts::opposite(rng),
        Family::Greeting => facts::greeting(rng),
        Family::Category => facts::category(rng),
        Family::YesNo => facts::yes_no(rng),
        Family::Story => open::story(rng),
        Family::Poem => open::poem(rng),
        Family::Letter => open::letter(rng),
        Family::Recipe => open::recipe(rng),
        Family::Tips => open::tips(rng),
        Family::Explanation => open::explanation(rng),
        Family::Dialogue => open::dialogue(rng),
    }
}

/// FNV-1a with a final mix, so that the split never depends on a library's hasher.
fn split_of(key: &str) -> Split {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in key.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    if (hash >> 33).is_multiple_of(5) {
        Split::HeldOut
    } else {
        Split::Train
    }
}

/// Puts the values into `{0}`, `{1}` and chooses the articles.
fn fill(phrasing: &str, values: &[String]) -> String {
    let mut text = phrasing.to_owned();
    for (i, value) in values.iter().enumerate() {
        text = text.replace(&format!("{{{i}}}"), value);
    }
    articles(&text)
}

/// Replaces each `a(n)` by `a` or `an`, and `A(n)` likewise, after the word that follows.
pub(super) fn articles(text: &str) -> String {
    let mut parts = text.split("(n) ");
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let vowel = part.starts_with(['a', 'e', 'i', 'o', 'u']);
        out.push_str(if vowel { "n " } else { " " });
        out.push_str(part);
    }
    out
}
