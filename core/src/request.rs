//! Requests for text and the responses to them.

use serde::{Deserialize, Serialize};

use crate::{Prompt, RequestId};

/// How the next token is drawn from the model's distribution.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Only the `top_k` most likely tokens are drawn from; 0: all.
    pub top_k: u32,
    /// Only the most likely tokens that together have this probability are drawn from; 1: all.
    pub top_p: f32,
    /// Seed of this request's own random stream, so that its sample does not depend on its batch.
    pub seed: u64,
}

impl SamplingParams {
    /// The most likely token at every step.
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_k: 0,
        top_p: 1.0,
        seed: 0,
    };

    /// What [`SamplingParams::allows_top_p`] allows, for messages.
    pub const TOP_P_RANGE: &str = "above 0 and at most 1";

    /// Whether `top_p` can be: OpenAI's API and vLLM refuse 0 too, under which no token would be left.
    pub fn allows_top_p(top_p: f32) -> bool {
        top_p > 0.0 && top_p <= 1.0
    }
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self::GREEDY
    }
}

/// Why a response ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model ended it.
    Stop,
    /// It reached its cap.
    Length,
    /// Whoever asked no longer wants it; what it has so far is all there is.
    Cancelled,
}

/// A request for text.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Returned with the response.
    pub id: RequestId,
    /// What is asked.
    pub prompt: Prompt,
    /// Cap on the response, in tokens, the end-of-sequence token counted.
    pub max_new_tokens: u32,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
}

/// The text that a model answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The id of its request.
    pub id: RequestId,
    /// The answer, special tokens left out.
    pub text: String,
    /// Its length in generated tokens, the end-of-sequence token counted.
    pub tokens: u32,
    /// Why it ended.
    pub finish: FinishReason,
}

/// `tokens` rounded up to a multiple of `bucket`; a bucket of 0 or 1 changes nothing.
///
/// Source: `buckit` of the published code, arXiv 2305.13144, bucket 50.
pub fn bucket_up(tokens: u32, bucket: u32) -> u32 {
    if bucket <= 1 {
        return tokens;
    }
    tokens.div_ceil(bucket).saturating_mul(bucket)
}

#[cfg(test)]
mod tests {
    use super::{SamplingParams, bucket_up};

    #[test]
    fn a_multiple_of_the_bucket_stays() {
        assert_eq!(bucket_up(0, 50), 0);
        assert_eq!(bucket_up(1, 50), 50);
        assert_eq!(bucket_up(50, 50), 50);
        assert_eq!(bucket_up(51, 50), 100);
        assert_eq!(bucket_up(7, 0), 7);
        assert_eq!(bucket_up(u32::MAX, 50), u32::MAX);
    }

    #[test]
    fn a_top_p_leaves_a_token() {
        assert!(
            [f32::MIN_POSITIVE, 0.5, 1.0]
                .into_iter()
                .all(SamplingParams::allows_top_p)
        );
        assert!(![0.0, -0.5, 1.5, f32::NAN].into_iter().any(SamplingParams::allows_top_p));
    }
}
