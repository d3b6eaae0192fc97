//! How long the memory of training passes is kept.

use super::Llama;

/// Gives the memory that training passes of a network keep from step to step back when it goes; a pass after that takes
/// its own anew.
#[derive(Debug)]
pub struct TrainingMemory<'a>(&'a Llama);

impl Llama {
    /// Keeps the memory of training passes until the guard goes. Whoever trains holds one for as long.
    pub fn training_memory(&self) -> TrainingMemory<'_> {
        TrainingMemory(self)
    }
}

#[cfg(feature = "kernel-emulation")]
impl Llama {
    /// The same network, in main memory, whose training passes run on the emulator of the GPU's kernels.
    ///
    /// # Errors
    /// The kernels do not take its sizes.
    pub fn trained_on_emulator(mut self) -> Result<Self, crate::ModelError> {
        if !crate::gpu::TrainingSlot::fits(&self) {
            let config = self.config();
            let sizes = (config.hidden_size, config.intermediate_size, config.head_dim);
            let reason = format!("hidden_size, intermediate_size and head_dim of {sizes:?} have no kernels");
            return Err(candle_core::Error::Msg(reason).into());
        }
        self.gpu_training.emulated = true;
        Ok(self)
    }
}

#[cfg(all(test, any(feature = "cuda", feature = "kernel-emulation")))]
impl Llama {
    pub(crate) fn training_slot(&self) -> &crate::gpu::TrainingSlot {
        &self.gpu_training
    }
}

impl Drop for TrainingMemory<'_> {
    fn drop(&mut self) {
        self.0.scratch.clear();
        #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
        self.0.gpu_training.clear();
    }
}
