//! What Lengthwise's crates speak about: requests, lengths, estimates, and the traits between them.

mod decoder;
mod estimate;
mod hash;
mod id;
mod prompt;
mod request;

pub use decoder::{DecodeError, Decoder, Refusal};
pub use estimate::{LengthEstimate, LengthPredictor, PredictError, PredictInput, Quantile};
pub use hash::fixed_hash;
pub use id::RequestId;
pub use prompt::{ChatError, ChatMessage, Prompt};
pub use request::{FinishReason, Request, Response, SamplingParams, bucket_up};
