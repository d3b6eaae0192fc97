//! The kernels against plain references, and whole passes against the CPU path.
//!
//! They run on the emulator (`--features kernel-emulation`), in both orders of a block's threads, and on a GPU where
//! the build has one (`--features cuda`).

mod attention;
mod few_rows;
mod network;
mod packed;
mod rows;
mod sampling;
mod tensor_cores;
mod training;

use candle_core::{DType, Device, Result, Tensor};

use super::Gpu;
use super::kernels::Kernels;
use super::work::Address;
use crate::ops::testing::{assert_close, random};

/// Runs a test on every device of this build. A build with CUDA needs a GPU, unless LENGTHWISE_NO_GPU is set.
fn on_each_device(test: impl Fn(&Gpu, &Device) -> Result<()>) -> Result<()> {
    #[cfg(feature = "kernel-emulation")]
    for backwards in [false, true] {
        let emulated = super::emulated::EmulatedGpu {
            backwards,
            ..Default::default()
        };
        test(&Gpu::Emulated(emulated), &Device::Cpu)?;
    }
    #[cfg(feature = "cuda")]
    match Device::new_cuda_with_stream(0) {
        Ok(device) => test(&Gpu::new(&device)?, &device)?,
        Err(err) if std::env::var_os("LENGTHWISE_NO_GPU").is_some() => eprintln!("not run on a GPU: {err}"),
        Err(err) => return Err(err),
    }
    Ok(())
}

/// The dtypes that the kernels are compiled for, each with what its rounding allows values of about 1.
const DTYPES: [(DType, f32); 3] = [(DType::F32, 2e-6), (DType::BF16, 2e-2), (DType::F16, 3e-3)];

/// Seeded values on a device, rounded to its dtype.
fn values(shape: &[usize], seed: u64, dtype: DType, device: &Device) -> Result<Tensor> {
    random(shape, seed)?.to_dtype(dtype)?.to_device(device)
}

fn zeros(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::zeros(shape, dtype, device)
}

fn words(words: &[u32], device: &Device) -> Result<Tensor> {
    Tensor::new(words, device)
}

/// A tensor as f32 in main memory, all launches done.
fn read(tensor: &Tensor) -> Result<Tensor> {
    tensor.device().synchronize()?;
    tensor.to_dtype(DType::F32)?.to_device(&Device::Cpu)
}

fn kernels(gpu: &Gpu, dtype: DType) -> Kernels<'_> {
    Kernels { gpu, dtype }
}
