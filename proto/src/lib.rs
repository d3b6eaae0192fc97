//! The gRPC contract of the length predictor: `lengthwise/v1/predictor.proto` and the code made from it.
#![allow(missing_docs, clippy::all)]

mod codec;

pub use codec::{WireCodec, WireDecoder};

/// Package `lengthwise.v1`.
pub mod v1 {
    tonic::include_proto!("lengthwise.v1");
}

/// The compiled descriptors, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/predictor_descriptor.bin"));
