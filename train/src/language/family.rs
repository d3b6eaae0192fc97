//! The families of instructions and their shares in the mixtures.

/// A kind of instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Family {
    /// Spell one word: `c-a-t`.
    Spell,
    /// Spell each word of a list.
    SpellList,
    /// Count from a up to b.
    CountUp,
    /// Count from b down to a.
    CountDown,
    /// Even numbers from a to b.
    Evens,
    /// Odd numbers from a to b.
    Odds,
    /// Tens from a to b.
    Tens,
    /// The first n multiples of k, numbered.
    Multiples,
    /// The multiplication table of k up to n.
    Table,
    /// The number after n.
    NextNumber,
    /// A word n times, numbered.
    Repeat,
    /// A sentence n times, numbered.
    RepeatLine,
    /// The letters from x to y.
    Alphabet,
    /// The words of a list, numbered.
    NumberList,
    /// n days from a given one, numbered.
    Days,
    /// n months from a given one, numbered.
    Months,
    /// The capital of a country.
    Capital,
    /// The opposite of a word.
    Opposite,
    /// A greeting by name.
    Greeting,
    /// What a thing is: `A tiger is an animal.`
    Category,
    /// Whether a thing is of a kind: `Yes.`
    YesNo,
    /// A story; open-ended, as all that follow.
    Story,
    /// A poem.
    Poem,
    /// A letter to a friend.
    Letter,
    /// A recipe with numbered steps.
    Recipe,
    /// A numbered list of tips.
    Tips,
    /// An explanation of a thing in nature.
    Explanation,
    /// A dialogue of two friends.
    Dialogue,
}

impl Family {
    /// Every family.
    pub const ALL: &[Family] = &[
        Self::Spell,
        Self::SpellList,
        Self::CountUp,
        Self::CountDown,
        Self::Evens,
        Self::Odds,
        Self::Tens,
        Self::Multiples,
        Self::Table,
        Self::NextNumber,
        Self::Repeat,
        Self::RepeatLine,
        Self::Alphabet,
        Self::NumberList,
        Self::Days,
        Self::Months,
        Self::Capital,
        Self::Opposite,
        Self::Greeting,
        Self::Category,
        Self::YesNo,
        Self::Story,
        Self::Poem,
        Self::Letter,
        Self::Recipe,
        Self::Tips,
        Self::Explanation,
        Self::Dialogue,
    ];

    /// Name, share in [`super::examples`], share in [`super::instructions`].
    ///
    /// Shares are of examples, not tokens, in thousandths or so.
    fn row(self) -> (&'static str, u32, u32) {
        match self {
            Self::Spell => ("spell", 40, 20),
            Self::SpellList => ("spell_list", 40, 30),
            Self::CountUp => ("count_up", 80, 40),
            Self::CountDown => ("count_down", 65, 30),
            Self::Evens => ("evens", 35, 15),
            Self::Odds => ("odds", 35, 15),
            Self::Tens => ("tens", 40, 20),
            Self::Multiples => ("multiples", 40, 20),
            Self::Table => ("table", 40, 30),
            Self::NextNumber => ("next_number", 25, 40),
            Self::Repeat => ("repeat", 40, 90),
            Self::RepeatLine => ("repeat_line", 40, 180),
            Self::Alphabet => ("alphabet", 30, 15),
            Self::NumberList => ("number_list", 35, 15),
            Self::Days => ("days", 25, 15),
            Self::Months => ("months", 25, 20),
            Self::Capital => ("capital", 35, 40),
            Self::Opposite => ("opposite", 30, 50),
            Self::Greeting => ("greeting", 15, 50),
            Self::Category => ("category", 40, 40),
            Self::YesNo => ("yes_no", 40, 75),
            Self::Story => ("story", 45, 80),
            Self::Poem => ("poem", 40, 60),
            Self::Letter => ("letter", 40, 60),
            Self::Recipe => ("recipe", 40, 55),
            Self::Tips => ("tips", 40, 55),
            Self::Explanation => ("explanation", 40, 55),
            Self::Dialogue => ("dialogue", 40, 65),
        }
    }

    /// The family's name in reports.
    pub fn name(self) -> &'static str {
        self.row().0
    }

    /// Whether the answer is fixed by the instruction's content.
    pub fn closed(self) -> bool {
        self < Self::Story
    }

    /// Whether every content is trained and the held-out part is of (content, phrasing) pairs.
    ///
    /// A fact cannot be found by generalising: what is held out is a way to ask for it.
    pub(super) fn is_fact(self) -> bool {
        matches!(self, Self::Capital | Self::Opposite | Self::Category)
    }

    pub(super) fn examples_weight(self) -> u32 {
        self.row().1
    }

    pub(super) fn instructions_weight(self) -> u32 {
        self.row().2
    }
}
