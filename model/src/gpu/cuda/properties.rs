//! What a GPU has, and whether its kernels may begin early.

use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::CudaContext;
use candle_core::cuda_backend::cudarc::driver::sys::{self, CUdevice_attribute};
use candle_core::{Error, Result};

/// Set, it lets no kernel begin before the one ahead has ended.
const VARIABLE: &str = "LENGTHWISE_NO_EARLY_KERNELS";

/// Properties of a GPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Properties {
    pub multiprocessors: usize,
    /// Bytes of shared memory that a block may have where it asks for them.
    pub most_shared: usize,
}

impl Properties {
    /// # Errors
    /// The driver does not tell.
    pub fn of(context: &Arc<CudaContext>) -> Result<Self> {
        use CUdevice_attribute::*;
        Ok(Self {
            multiprocessors: attribute(context, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
            most_shared: attribute(context, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        })
    }
}

fn attribute(context: &Arc<CudaContext>, which: CUdevice_attribute) -> Result<i32> {
    context.attribute(which).map_err(Error::wrap)
}

/// Whether kernels may be launched before the one ahead has ended (programmatic dependent launch, from compute capability 9.0
/// on): each waits itself, `after_earlier` in common.cuh, if it was compiled for that.
///
/// # Errors
/// The driver does not tell.
pub(super) fn launches_early(context: &Arc<CudaContext>) -> Result<bool> {
    let major = attribute(
        context,
        CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
    )?;
    Ok(std::env::var_os(VARIABLE).is_none() && compiled_for() >= 90 && major >= 9)
}

/// The compute capability that the kernels were compiled for, times ten.
fn compiled_for() -> usize {
    env!("KERNELS_CAPABILITY").parse().unwrap_or(0)
}

/// The attribute of a launch that lets the kernel begin early.
pub(super) fn early_launch() -> sys::CUlaunchAttribute {
    let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
    value.programmaticStreamSerializationAllowed = 1;
    sys::CUlaunchAttribute {
        id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0; 4],
        value,
    }
}
