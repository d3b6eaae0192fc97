//! The kernels on a GPU: loaded once per device, whatever number of caches runs them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute_enum::{
    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaFunction, CudaModule};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{Error, Result};

/// All kernels, compiled by the build script: machine code for the GPU that the build is for, and PTX, which the driver
/// compiles for newer ones.
const KERNELS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin"));

/// Bytes of shared memory that a block may have without being asked for.
const SHARED_GIVEN: u32 = 48 << 10;

/// The modules of the devices, by their numbers.
static LOADED: Mutex<BTreeMap<usize, Arc<CudaModule>>> = Mutex::new(BTreeMap::new());

/// The kernels on this context's device.
///
/// # Errors
/// The driver refuses them.
pub(super) fn load(context: &Arc<CudaContext>) -> Result<Arc<CudaModule>> {
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(module) = loaded.get(&context.ordinal()) {
        return Ok(module.clone());
    }
    let module = context.load_module(Ptx::from_binary(KERNELS.to_vec())).map_err(|err| {
        Error::Msg(format!(
            "the driver refuses the kernels: {err}; they need a newer driver, or a build with this GPU's \
             CUDA_COMPUTE_CAP"
        ))
    })?;
    loaded.insert(context.ordinal(), module.clone());
    Ok(module)
}

/// A kernel.
pub(super) struct Function {
    pub function: CudaFunction,
    /// Whether its blocks may have all shared memory that there is.
    has_all_shared: bool,
}

impl Function {
    /// # Errors
    /// There is no kernel of that name.
    pub fn load(module: &Arc<CudaModule>, name: &str) -> Result<Self> {
        let function = module
            .load_function(name)
            .map_err(|err| Error::Msg(format!("kernel {name}: {err}")))?;
        Ok(Self {
            function,
            has_all_shared: false,
        })
    }

    /// Lets blocks have `bytes` of dynamic shared memory; `most`: those that a block may have at all. A kernel is the
    /// device's, not a cache's: all ask for the same, so that none takes from another.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn allow_shared(&mut self, bytes: u32, most: usize) -> Result<()> {
        if bytes > SHARED_GIVEN && !self.has_all_shared {
            let refused = |err| Error::Msg(format!("{bytes} bytes of shared memory: {err}"));
            let own = self
                .function
                .get_attribute(CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)
                .map_err(refused)?;
            self.function
                .set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, most as i32 - own)
                .map_err(refused)?;
            self.has_all_shared = true;
        }
        Ok(())
    }
}
