//! The settings of a schedule.

use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How requests are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Batches in the order of arrival, each run until its last sequence ends.
    Vanilla,
    /// As `seqsch`, with lengths that the untuned model is asked for (perception only).
    Po,
    /// Grouped by predicted length.
    SeqSch,
    /// As `seqsch`, with the true largest lengths (published as gt).
    Oracle,
    /// A slot is refilled as soon as its sequence ends.
    Continuous,
}

impl Strategy {
    /// Every strategy.
    pub const ALL: [Self; 5] = [Self::Vanilla, Self::Po, Self::SeqSch, Self::Oracle, Self::Continuous];

    /// Its name on the command line and in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vanilla => "vanilla",
            Self::Po => "po",
            Self::SeqSch => "seqsch",
            Self::Oracle => "oracle",
            Self::Continuous => "continuous",
        }
    }

    /// Whether requests are sorted by predicted length.
    pub fn sorts(self) -> bool {
        matches!(self, Self::Po | Self::SeqSch | Self::Oracle)
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Strategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|s| s.name() == text).ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            format!("no strategy is called \"{text}\"; there are {known}")
        })
    }
}

/// How requests are scheduled; the defaults are the published ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScheduleConfig {
    /// The strategy.
    pub strategy: Strategy,
    /// Variable batch size: the shorter the predicted length, the larger the batch.
    pub vbs: bool,
    /// Failure collection and recomputation: a batch stops at its largest predicted length.
    pub fcr: bool,
    /// Sequences in a batch, or slots of the continuous mode.
    pub batch_size: NonZeroUsize,
    /// Requests that are planned together.
    pub group_size: NonZeroUsize,
    /// Cap on every answer, in tokens.
    pub max_new_tokens: u32,
    /// Order in which the continuous mode admits.
    pub order: crate::AdmissionOrder,
}

impl ScheduleConfig {
    /// The published settings: groups of 256, batches of 16, answers of at most 512 tokens.
    pub fn new(strategy: Strategy) -> Self {
        Self {
            strategy,
            vbs: false,
            fcr: false,
            batch_size: NonZeroUsize::new(16).expect("16 is not 0"),
            group_size: NonZeroUsize::new(256).expect("256 is not 0"),
            max_new_tokens: 512,
            order: crate::AdmissionOrder::LongestFirst,
        }
    }

    /// The same with VBS and FCR on or off; only strategies that sort have them.
    #[must_use]
    pub fn with(mut self, vbs: bool, fcr: bool) -> Self {
        self.vbs = vbs && self.strategy.sorts();
        self.fcr = fcr && self.strategy.sorts();
        self
    }
}
