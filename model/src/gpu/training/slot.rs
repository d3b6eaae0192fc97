//! Where a network keeps what trains it on the GPU path.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;

use super::Device;
use crate::gpu::Gpu;
use crate::gpu::kernels::Kernels;
use crate::network::Llama;

/// A network's training device, made at the first pass and kept until [`TrainingSlot::clear`].
#[derive(Default)]
pub(crate) struct TrainingSlot {
    made: Mutex<Option<Arc<Device>>>,
    /// The emulator takes the device's place.
    #[cfg(feature = "kernel-emulation")]
    pub emulated: bool,
}

impl Clone for TrainingSlot {
    /// Of another network, whose weights may become others: nothing is made yet.
    fn clone(&self) -> Self {
        Self {
            made: Mutex::default(),
            #[cfg(feature = "kernel-emulation")]
            emulated: self.emulated,
        }
    }
}

impl std::fmt::Debug for TrainingSlot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrainingSlot").finish_non_exhaustive()
    }
}

impl TrainingSlot {
    /// The device that trains `llama`, whose weights must be frozen; `None` where this build, its device or its sizes have
    /// no kernels.
    ///
    /// # Errors
    /// The driver refuses the kernels, or there is no memory.
    pub fn device(&self, llama: &Llama) -> Result<Option<Arc<Device>>> {
        if !Self::fits(llama) || !self.has_device(llama) {
            return Ok(None);
        }
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = &*made {
            return Ok(Some(device.clone()));
        }
        let device = Arc::new(Device::new(Gpu::new(llama.device())?, llama)?);
        Ok(Some(made.insert(device).clone()))
    }

    /// Whether the kernels take a network of these sizes.
    pub fn fits(llama: &Llama) -> bool {
        let (config, dtype) = (llama.config(), llama.dtype());
        let pack = 16 / dtype.size_in_bytes();
        let packs = |size: usize| size.is_multiple_of(pack);
        Kernels::has_packed(dtype, config.head_dim) && packs(config.hidden_size) && packs(config.intermediate_size)
    }

    /// Takes `device` from now on.
    #[cfg(all(test, feature = "kernel-emulation"))]
    pub fn set(&self, device: Device) {
        *self.made.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(device));
    }

    /// Whether a pass has made a device that is still there.
    #[cfg(test)]
    pub fn is_made(&self) -> bool {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    fn has_device(&self, llama: &Llama) -> bool {
        #[cfg(feature = "kernel-emulation")]
        if llama.device().is_cpu() {
            return self.emulated;
        }
        llama.device().is_cuda()
    }

    /// Gives all memory back.
    pub fn clear(&self) {
        *self.made.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
