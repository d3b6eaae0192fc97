//! From a model's own responses to an adapter that predicts their length.

pub mod collect;
pub mod files;
mod label;
pub mod language;
pub mod language_tokenizer;
pub mod lora_training;
mod metrics;
pub mod optim;
pub mod packed;
pub mod pretrain;

pub use label::{LabelError, LabelTarget, label};
pub use metrics::{PredictorReport, PredictorRow, coverage_90, evaluate};
