//! A Llama on candle: network, KV cache, LoRA, checkpoints, tokenizer, chat templates and sampling.

mod config;
mod cpu;
mod error;
mod generation;
#[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
mod gpu;
mod hub;
mod kv_cache;
mod length_head;
mod lora;
mod network;
mod ops;
mod precision;
mod progress;
mod questions;
mod sampling;
mod saving;
mod source;
mod template;
mod tokenizer;
mod weights;

#[cfg(test)]
mod testing;

pub use config::{ModelConfig, RopeScaling};
pub use error::{ModelError, without_backtrace};
pub use hub::{Hub, HubConfig, HubError, HubId};
pub use kv_cache::{BLOCK_TOKENS, BlockTable, KvCache, kv_bytes_per_token, tokens_that_fit};
pub use length_head::{LengthBins, LengthDistribution, LengthHead, LengthHeadConfig, QUANTILES, largest_of};
pub use lora::{Adapter, Dropout, LinearKind, LoraConfig, TargetModules};
pub use network::{
    Flight, GradientSink, Landed, Llama, ProductTiming, Segment, TrainPass, TrainingMemory, Wanted, drawn_token,
};
pub use ops::cross_entropy;
pub use precision::{DTypeChoice, Precision, Quantization};
pub use progress::OpenProgress;
pub use questions::{LENGTH_QUESTION, PIA_QUESTION};
pub use sampling::Sampler;
pub use saving::save_tensors;
pub use source::{LoadedModel, TINY};
pub use template::PromptTemplate;
pub use tokenizer::ModelTokenizer;
pub use weights::Weights;
