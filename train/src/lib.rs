//! train.

pub mod language;
pub mod language_tokenizer;

pub mod lora_training;
pub mod optim;
pub mod packed;
pub mod pretrain;
