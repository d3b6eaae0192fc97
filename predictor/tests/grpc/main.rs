//! The predictor service and its client over real sockets.
#![allow(clippy::unwrap_used)]

mod errors;
mod queue;
mod remote;
mod rpc;
mod shutdown;
mod support;
