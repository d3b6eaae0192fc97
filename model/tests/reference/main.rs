//! The network, its cache, adapters and gradients against what transformers and PEFT compute.
//!
//! The fixtures are by scripts/make_reference.py, which records its versions and seed in each of them.
//! Rows of reference files were run alone, without padding or cache.

mod adapters;
mod models;
mod peft;
mod support;
mod training;
