//! train.

pub mod language;
pub mod language_tokenizer;

pub mod optim;
pub mod pretrain;
