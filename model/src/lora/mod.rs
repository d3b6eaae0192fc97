//! LoRA adapters: data that a forward pass takes, in PEFT's file format.

mod adapter;
mod config;
mod file;
mod rows;
mod terms;

pub use adapter::{Adapter, Dropout};
pub(crate) use adapter::{LoraPair, Mask};
pub use config::{LinearKind, LoraConfig, TargetModules};
pub(crate) use rows::{AdaptedRows, RowMask};
pub(crate) use terms::{Term, Terms, flat_factors};
