//! The trait of whatever answers requests: a model on this machine or an engine elsewhere.

use crate::{Request, RequestId, Response};

/// Answers requests. Synchronous: whoever needs concurrency owns the thread.
pub trait Decoder {
    /// Answers every request, in an order of the decoder's choosing, and hands each response over as soon as it
    /// has ended. An error that `on_response` returns stops the work and is returned.
    ///
    /// # Errors
    /// A request that cannot be run at all (too long a prompt, say) is an error before anything is decoded.
    fn decode(
        &mut self,
        requests: Vec<Request>,
        on_response: &mut dyn FnMut(Response) -> Result<(), DecodeError>,
    ) -> Result<(), DecodeError>;
}

/// Why requests could not be answered.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The prompt leaves no room in the model's context.
    #[error("request {id}: the prompt has {got} tokens, the model takes at most {max}")]
    PromptTooLong {
        /// Whose prompt.
        id: RequestId,
        /// Its tokens.
        got: usize,
        /// Most tokens that a prompt may have.
        max: usize,
    },
    /// The prompt has no text.
    #[error("request {id}: the prompt is empty")]
    EmptyPrompt {
        /// Whose prompt.
        id: RequestId,
    },
    /// Two requests have the same id, so that their answers could not be told apart.
    #[error("request {id} occurs twice: ids must be unique")]
    DuplicateId {
        /// The id.
        id: RequestId,
    },
    /// A cap of zero tokens.
    #[error("request {id}: max_new_tokens is 0, it must be at least 1")]
    NothingToGenerate {
        /// Whose request.
        id: RequestId,
    },
    /// A sequence does not fit the KV cache even alone.
    #[error(
        "request {id} needs {needed} tokens of KV cache, there are {capacity}: raise the KV budget or lower max_new_tokens"
    )]
    CacheTooSmall {
        /// Whose request.
        id: RequestId,
        /// Tokens it may grow to.
        needed: usize,
        /// Tokens that the cache holds.
        capacity: usize,
    },
    /// The model's tokenizer or forward pass failed.
    #[error("the model failed: {0}")]
    Model(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An engine elsewhere did not answer as it should.
    #[error("request {id}: {endpoint}: {reason}")]
    Endpoint {
        /// Whose answer.
        id: RequestId,
        /// The engine's address.
        endpoint: String,
        /// What went wrong.
        reason: String,
    },
    /// An engine elsewhere will not run these requests; others were answered, or may be.
    #[error("{endpoint}: {} requests were refused", refusals.len())]
    Refused {
        /// The engine's address.
        endpoint: String,
        /// Which and why.
        refusals: Vec<Refusal>,
    },
    /// The receiver of the responses gave up.
    #[error("a response could not be stored: {0}")]
    Sink(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A request that an engine will not run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Which.
    pub id: RequestId,
    /// What the engine said.
    pub reason: String,
}

impl DecodeError {
    /// Wraps an error of the model.
    pub fn model(err: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Model(err.into())
    }

    /// Wraps an error of whoever receives responses.
    pub fn sink(err: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Sink(err.into())
    }
}
