//! Predictions of a response's length, and the trait of whatever makes them.

use serde::{Deserialize, Serialize};

use crate::{ChatError, Prompt};

/// The length is at most `tokens` with this probability.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Quantile {
    /// Between 0 and 1.
    pub probability: f64,
    /// Length in tokens.
    pub tokens: u32,
}

/// A prediction of the length of a response.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LengthEstimate {
    /// The largest length to expect, in tokens: what the method was trained to say.
    pub max_tokens: u32,
    /// The distribution, ascending in probability; empty where the method gives one number only.
    pub quantiles: Vec<Quantile>,
    /// False where the model's answer was no number and the fallback stands in `max_tokens`.
    pub parsed: bool,
}

impl LengthEstimate {
    /// An estimate of one number.
    pub fn of(max_tokens: u32) -> Self {
        Self {
            max_tokens,
            quantiles: Vec::new(),
            parsed: true,
        }
    }

    /// What stands in where a model's answer was no number.
    pub fn fallback(max_tokens: u32) -> Self {
        Self {
            parsed: false,
            ..Self::of(max_tokens)
        }
    }

    /// No part of the estimate above `cap` tokens.
    #[must_use]
    pub fn capped(mut self, cap: u32) -> Self {
        self.max_tokens = self.max_tokens.min(cap);
        for quantile in &mut self.quantiles {
            quantile.tokens = quantile.tokens.min(cap);
        }
        self
    }

    /// The length that is not exceeded with `probability`: interpolated between the quantiles around it, the
    /// outermost beyond them, `max_tokens` where there are none.
    pub fn quantile(&self, probability: f64) -> u32 {
        let Some(last) = self.quantiles.last() else {
            return self.max_tokens;
        };
        let Some(above) = self.quantiles.iter().position(|q| q.probability >= probability) else {
            return last.tokens;
        };
        let high = self.quantiles[above];
        if above == 0 || high.probability == probability {
            return high.tokens;
        }
        let low = self.quantiles[above - 1];
        let part = (probability - low.probability) / (high.probability - low.probability);
        let tokens = f64::from(low.tokens) + part * (f64::from(high.tokens) - f64::from(low.tokens));
        tokens.round() as u32
    }
}

/// A prompt whose response's length is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PredictInput {
    /// What the model will be asked.
    pub prompt: Prompt,
    /// Cap on the estimate, in tokens.
    pub max_new_tokens: u32,
}

/// Predicts how long the response to each prompt will be.
pub trait LengthPredictor: Send {
    /// One result per input, in the order given. An input that cannot be predicted fails alone.
    ///
    /// # Errors
    /// The outer error is one of the whole batch: the model's forward pass failed.
    fn predict(&mut self, inputs: &[PredictInput]) -> Result<Vec<Result<LengthEstimate, PredictError>>, PredictError>;
}

/// Why a length could not be predicted.
#[derive(Debug, thiserror::Error)]
pub enum PredictError {
    /// The prompt has no text.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The conversation has a role that is not known, or nothing from the user.
    #[error(transparent)]
    BadChat(#[from] ChatError),
    /// The prompt leaves no room in the model's context.
    #[error("prompt has {got} tokens, the model takes at most {max}")]
    PromptTooLong {
        /// Its tokens.
        got: usize,
        /// Most tokens that a prompt may have.
        max: usize,
    },
    /// The cap asked for is above the server's.
    #[error("max_new_tokens is {got}, the server allows at most {max}")]
    CapOutOfRange {
        /// The cap asked for.
        got: u32,
        /// The server's.
        max: u32,
    },
    /// Too many requests wait already.
    #[error("queue is full: {capacity} requests are waiting")]
    Overloaded {
        /// Places in the queue.
        capacity: usize,
    },
    /// The caller's deadline passed before the work was begun.
    #[error("the deadline passed before the prediction was begun")]
    DeadlineExceeded,
    /// The service is stopping or its worker has died.
    #[error("the predictor is shutting down")]
    ShuttingDown,
    /// The predictor elsewhere could not be reached or refused.
    #[error("predictor {endpoint}: {reason}")]
    Remote {
        /// Its address.
        endpoint: String,
        /// What went wrong.
        reason: String,
    },
    /// The model's tokenizer or forward pass failed.
    #[error("the model's forward pass failed: {0}")]
    Model(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl PredictError {
    /// Wraps an error of the model.
    pub fn model(err: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Model(err.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_interpolated() {
        let estimate = LengthEstimate {
            quantiles: vec![
                Quantile {
                    probability: 0.1,
                    tokens: 10,
                },
                Quantile {
                    probability: 0.9,
                    tokens: 90,
                },
            ],
            ..LengthEstimate::of(100)
        };
        assert_eq!(estimate.quantile(0.5), 50);
        assert_eq!(estimate.quantile(0.05), 10);
        assert_eq!(estimate.quantile(0.99), 90);
        assert_eq!(LengthEstimate::of(100).quantile(0.5), 100);
    }

    #[test]
    fn a_cap_holds_for_every_part() {
        let estimate = LengthEstimate {
            quantiles: vec![Quantile {
                probability: 0.5,
                tokens: 80,
            }],
            ..LengthEstimate::of(100)
        };
        let capped = estimate.capped(64);
        assert_eq!((capped.max_tokens, capped.quantiles[0].tokens), (64, 64));
    }
}
