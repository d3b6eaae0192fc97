//! Length predictors, the queue and the worker that run one, and the gRPC service in front.
//!
//! Metrics, through the `metrics` crate: `lengthwise_predict_requests_total{code}`, `lengthwise_predict_duration_seconds`,
//! `lengthwise_predict_batch_size`, `lengthwise_queue_depth` and `lengthwise_predict_fallback_total`.

mod client;
mod constant;
mod count;
mod fallback;
mod head;
mod llm;
mod measure;
mod parse;
mod queue;
mod reason;
mod refused;
mod server;
mod service;
mod stream;
mod table;
mod wire;
mod worker;

pub use client::RemotePredictor;
pub use constant::ConstantPredictor;
pub use fallback::FallbackPredictor;
pub use head::HeadPredictor;
pub use llm::{LlmPredictor, Question};
pub use parse::parse_length;
pub use queue::{BatchingConfig, Pending, PredictQueue};
pub use server::{PredictorServer, SHUTDOWN_GRACE, ServeError};
pub use service::{MAX_BATCH_REQUESTS, ServerInfo};
pub use table::TablePredictor;
