//! The settings of a schedule.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;
use std::sync::Arc;

use lengthwise_core::{Quantile, RequestId};
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
#[derive(Debug, Clone, PartialEq)]
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
    /// Cap on every answer, in tokens; 0 counts as 1.
    pub max_new_tokens: u32,
    /// Width of the bins of predicted lengths that VBS makes, in tokens.
    pub bucket: u32,
    /// Order in which the continuous mode admits.
    pub order: crate::AdmissionOrder,
    /// Plan batches by what they cost on this device instead of by the published rules.
    pub planning: Option<Arc<Planning>>,
}

/// What the planner goes by.
#[derive(Debug, Clone, PartialEq)]
pub struct Planning {
    /// What a forward pass costs.
    pub cost: crate::CostModel,
    /// What came of earlier predictions, `(predicted, actual)` in tokens; what a run shows is added. Where there is
    /// little of either, lengths are expected to spread broadly.
    pub history: Vec<(u32, u32)>,
    /// The distribution of single requests' lengths, ascending, where the predictor gives one; such a request is planned
    /// by it and not by what came of other predictions.
    pub distributions: HashMap<RequestId, Vec<Quantile>>,
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
            bucket: 50,
            order: crate::AdmissionOrder::LongestFirst,
            planning: None,
        }
    }

    /// The cap on every answer: a sequence has one token at least.
    pub fn cap(&self) -> u32 {
        self.max_new_tokens.max(1)
    }

    /// The same with VBS and FCR on or off; only strategies that sort have them.
    #[must_use]
    pub fn with(mut self, vbs: bool, fcr: bool) -> Self {
        self.vbs = vbs && self.strategy.sorts();
        self.fcr = fcr && self.strategy.sorts();
        self
    }

    /// The same planned by a cost model where the strategy sorts: it chooses batch sizes and stopping lengths.
    #[must_use]
    pub fn planned_by(mut self, planning: Option<Arc<Planning>>) -> Self {
        self.planning = planning.filter(|_| self.strategy.sorts());
        match self.planning {
            Some(_) => self.with(false, true),
            None => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_back() {
        for strategy in Strategy::ALL {
            assert_eq!(strategy.to_string().parse(), Ok(strategy));
        }
        let err = "gt".parse::<Strategy>().expect_err("no such strategy");
        assert!(err.contains("\"gt\"") && err.contains("oracle"), "{err}");
    }

    #[test]
    fn strategies_that_do_not_sort_have_neither_vbs_nor_fcr() {
        for (strategy, has) in [
            (Strategy::Vanilla, false),
            (Strategy::Continuous, false),
            (Strategy::SeqSch, true),
        ] {
            let config = ScheduleConfig::new(strategy).with(true, true);
            assert_eq!((config.vbs, config.fcr), (has, has));
        }
    }
}
