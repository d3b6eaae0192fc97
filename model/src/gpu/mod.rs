//! The GPU path: own kernels (`model/kernels`) and cuBLAS on buffers that are kept from pass to pass.
//!
//! All of it but [`cuda`] also runs on the CPU, on an emulator of the kernels (feature `kernel-emulation`): so the tests
//! run the very kernels, launches and passes that a GPU gets.

mod backend;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "kernel-emulation")]
mod emulated;
mod hidden;
mod inputs;
mod kernels;
mod pass;
mod products;
#[cfg(test)]
mod tests;
mod training;
mod weights;
mod work;
mod workspace;

pub(crate) use backend::{CopyBack, Gpu};
#[cfg(feature = "cuda")]
pub(crate) use cuda::free_memory;
pub(crate) use hidden::HiddenCopy;
pub(crate) use pass::GpuCache;
#[cfg(feature = "cuda")]
pub(crate) use pass::pass_bytes;
pub(crate) use products::SharedProducts;
#[cfg(all(test, feature = "kernel-emulation"))]
pub(crate) use training::Device as TrainingDevice;
pub(crate) use training::{GpuTraining, TrainingSlot};
