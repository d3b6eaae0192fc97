//! What an adapter is trained to say, and the examples of it.

use lengthwise_core::{Prompt, RequestId};
use lengthwise_model::LENGTH_QUESTION;

use crate::files::Pair;

/// How an adapter predicts a length.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum TrainObjective {
    /// It prints the label as a number, as published.
    #[default]
    Number,
    /// A head on the last hidden state gives the distribution of the length.
    Head(HeadObjective),
}

/// Settings of the head; the defaults were chosen on the bundled model.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadObjective {
    /// The cap that the samples were drawn under, in tokens: the last bin, which answers that were stopped there share.
    pub max_tokens: u32,
    /// Ask the length question after the instruction.
    pub asks_length: bool,
    /// Standard deviation by which a sample is spread over the bins, in the logarithm of the length.
    pub smoothing: f64,
    /// Share of the training examples that is held out to calibrate on, where there is no evaluation data.
    pub calibration_share: f64,
}

impl Default for HeadObjective {
    fn default() -> Self {
        Self {
            max_tokens: 512,
            asks_length: false,
            smoothing: 0.05,
            calibration_share: 0.1,
        }
    }
}

/// A prompt and what the model is to make of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainExample {
    /// The pair's id, for messages.
    pub id: RequestId,
    /// What is asked, the length question included where it is asked.
    pub prompt: Prompt,
    /// What is learnt.
    pub target: TrainTarget,
}

/// What is learnt of a prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrainTarget {
    /// An answer, without special tokens.
    Answer(String),
    /// The lengths of sampled responses, in tokens.
    Lengths(Vec<u32>),
}

impl TrainObjective {
    /// What is asked behind the instruction.
    pub fn question(&self) -> &'static str {
        let asks = match self {
            Self::Number => true,
            Self::Head(head) => head.asks_length,
        };
        if asks { LENGTH_QUESTION } else { "" }
    }

    /// A pair as an example of this objective.
    pub fn example(&self, pair: &Pair) -> TrainExample {
        TrainExample {
            id: pair.id.clone(),
            prompt: pair.prompt().with_suffix(self.question()),
            target: match self {
                Self::Number => TrainTarget::Answer(pair.label.to_string()),
                Self::Head(_) => TrainTarget::Lengths(pair.lengths.clone()),
            },
        }
    }
}
