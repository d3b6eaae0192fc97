//! The CPU path: f32 in plain slices, weights and cache in panels of sixteen, one inner loop for all products.
//!
//! It runs where the weights are frozen f32 in main memory. Other devices and dtypes, and weights that are trained
//! themselves, run candle's operations (`network/block.rs`); both give the same logits.

mod attention;
mod backward;
mod cache;
mod columns;
mod instructions;
mod matrix;
mod memory;
mod multiply;
mod packed_attention;
mod panel;
mod quantized;
mod reading;
mod registers;
mod scratch;
mod share;
mod team;
mod turned;
mod workspace;

pub(crate) use attention::{Attention, Span, attend};
pub(crate) use backward::{Turned, multiply_turned, outer};
pub(crate) use cache::HostCache;
pub(crate) use matrix::PackedMatrix;
pub(crate) use multiply::{Product, multiply, multiply_gated, multiply_into, product};
pub(crate) use packed_attention::{Attended, Sequences, attend_packed, attend_packed_backward};
pub(crate) use panel::{Output, Rows};
pub(crate) use reading::read_weights;
pub(crate) use scratch::Scratch;
pub(crate) use share::each;
pub(crate) use workspace::Workspace;
