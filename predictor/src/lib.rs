//! Length predictors, the queue and the worker that run one, and the gRPC service in front.

mod client;
mod constant;
mod llm;
mod parse;
mod queue;
mod server;
mod service;

pub use client::{FallbackPredictor, RemotePredictor};
pub use constant::ConstantPredictor;
pub use llm::{LlmPredictor, Question};
pub use parse::parse_length;
pub use queue::{BatchingConfig, PredictQueue};
pub use server::{PredictorServer, ServeError};
pub use service::ServerInfo;
