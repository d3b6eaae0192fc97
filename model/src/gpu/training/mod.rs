//! Training passes on the GPU: the layers' forward and backward passes on own kernels.
//!
//! The same as the CPU path's layer (`network/layer.rs`), with the same of it kept: what the linear layers and attention
//! give. Activations and their gradients are in the model's dtype, sums and the adapter in f32.

mod backward;
mod changed;
mod inputs;
mod layer;
mod operation;
mod pool;
mod slot;
mod terms;

use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::{DType, Result};

use super::Gpu;
use super::kernels::Kernels;
use super::weights::GpuWeights;
use super::work::Address;
use crate::ModelConfig;
use crate::network::Llama;
use pool::{Pool, Rows};

#[cfg(test)]
pub(crate) use inputs::PassInputs;
pub(crate) use operation::GpuTraining;
pub(crate) use slot::TrainingSlot;

/// A row of `place_rows` that adds nothing.
pub(crate) const NO_ROW: u32 = u32::MAX;

/// Where rows or factors lie.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub address: Address,
}

/// A network's weights on the device with the memory of its training passes.
pub(crate) struct Device {
    gpu: Mutex<(Gpu, Pool)>,
    weights: GpuWeights,
    config: ModelConfig,
    dtype: DType,
}

impl Device {
    /// # Errors
    /// The model's sizes are none that the kernels take, or there is no memory for what has to be copied.
    pub fn new(gpu: Gpu, llama: &Llama) -> Result<Self> {
        Ok(Self {
            weights: GpuWeights::new(&gpu, llama)?,
            gpu: Mutex::new((gpu, Pool::default())),
            config: llama.config().clone(),
            dtype: llama.dtype(),
        })
    }

    /// The device for the launches of one pass through a layer: those of several threads do not mix.
    fn lock(&self) -> Locked<'_> {
        Locked {
            // The pool's list is whole whatever a thread that held it did.
            guard: self.gpu.lock().unwrap_or_else(PoisonError::into_inner),
            dtype: self.dtype,
        }
    }
}

/// The device in one thread's hands.
struct Locked<'a> {
    guard: MutexGuard<'a, (Gpu, Pool)>,
    dtype: DType,
}

impl Locked<'_> {
    fn gpu(&self) -> &Gpu {
        &self.guard.0
    }

    fn kernels(&self) -> Kernels<'_> {
        Kernels {
            gpu: &self.guard.0,
            dtype: self.dtype,
        }
    }

    /// Memory for elements of the model's dtype, of any value.
    fn take(&mut self, elements: usize) -> Result<Rows> {
        let (gpu, pool) = &mut *self.guard;
        pool.take(gpu, elements * self.dtype.size_in_bytes())
    }

    /// Memory for f32 elements, of any value.
    fn take_floats(&mut self, elements: usize) -> Result<Rows> {
        let (gpu, pool) = &mut *self.guard;
        pool.take(gpu, elements * size_of::<f32>())
    }

    /// Takes memory back; what was launched may still use it, what is launched later comes behind.
    fn give(&mut self, rows: impl IntoIterator<Item = Rows>) {
        self.guard.1.give(rows);
    }

    /// Frees all memory that nobody holds.
    fn clear(&mut self) {
        self.guard.1.clear();
    }
}
