//! The device: memory, copies, and a stream that takes matrix products and launches of kernels.

#[cfg(feature = "kernel-emulation")]
use std::sync::atomic::Ordering;

use candle_core::{CpuStorage, Device, Result, Storage, Tensor, bail};

#[cfg(feature = "cuda")]
use super::cuda::{CudaBuffer, CudaGpu};
#[cfg(feature = "kernel-emulation")]
use super::emulated::EmulatedGpu;
use super::work::{Address, Gemm, Launch};

/// A GPU, or the emulator in its place.
pub(crate) enum Gpu {
    #[cfg(feature = "cuda")]
    Cuda(Box<CudaGpu>),
    #[cfg(feature = "kernel-emulation")]
    Emulated(EmulatedGpu),
}

/// Memory of the device, zero at first.
pub(crate) enum Buffer {
    #[cfg(feature = "cuda")]
    Cuda(CudaBuffer),
    /// In words of 16 bytes, for the alignment.
    #[cfg(feature = "kernel-emulation")]
    Emulated(Vec<u128>),
}

/// Words on their way from the device.
#[derive(Debug)]
pub(crate) enum CopyBack {
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::CudaCopy),
    #[cfg(feature = "kernel-emulation")]
    Emulated(Vec<u32>),
}

impl CopyBack {
    /// Waits for the copy, not for what was launched behind it.
    pub fn wait(self) -> Result<Vec<u32>> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(copy) => copy.wait(),
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(words) => Ok(words),
        }
    }
}

impl Gpu {
    /// The device that candle's tensors on `device` are on.
    ///
    /// # Errors
    /// The driver refuses the kernels.
    pub fn new(device: &Device) -> Result<Self> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => Ok(Self::Cuda(Box::new(CudaGpu::new(device)?))),
            #[cfg(feature = "kernel-emulation")]
            Device::Cpu => Ok(Self::Emulated(EmulatedGpu::default())),
            other => bail!("{:?} has no kernels in this build", other.location()),
        }
    }

    /// Zeroed memory.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => Ok(Buffer::Cuda(gpu.alloc(bytes)?)),
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(_) => Ok(Buffer::Emulated(vec![0; bytes.div_ceil(16)])),
        }
    }

    /// Copies words to the device; `from` may change as soon as this has returned.
    ///
    /// # Safety
    /// `to` is the address of as many words that belong to the caller.
    pub unsafe fn upload(&self, to: Address, from: &[u32]) -> Result<()> {
        match self {
            // SAFETY: the caller's promise.
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => unsafe { gpu.upload(to, from) },
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(gpu) => {
                // SAFETY: the caller's promise.
                unsafe { gpu.upload(to, from) };
                Ok(())
            }
        }
    }

    /// Puts a copy of words from the device into the stream, and does not wait for it.
    ///
    /// # Safety
    /// `from` is the address of `count` words until the copy has been taken.
    pub unsafe fn copy_back(&self, from: Address, count: usize) -> Result<CopyBack> {
        match self {
            // SAFETY: the caller's promise.
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => Ok(CopyBack::Cuda(unsafe { gpu.copy_back(from, count)? })),
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(gpu) => {
                let mut words = vec![0; count];
                // SAFETY: the caller's promise.
                unsafe { gpu.download(from, &mut words) };
                Ok(CopyBack::Emulated(words))
            }
        }
    }

    /// Waits for all that was launched and copies words from the device.
    ///
    /// # Safety
    /// `from` is the address of as many words.
    pub unsafe fn download(&self, from: Address, to: &mut [u32]) -> Result<()> {
        match self {
            // SAFETY: the caller's promise.
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => unsafe { gpu.download(from, to) },
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(gpu) => {
                // SAFETY: the caller's promise.
                unsafe { gpu.download(from, to) };
                Ok(())
            }
        }
    }

    /// Multiprocessors of the device.
    pub fn multiprocessors(&self) -> usize {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => gpu.properties.multiprocessors,
            // Few, so that a block gets several tiles.
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(_) => 3,
        }
    }

    /// Bytes of shared memory that a block may have.
    pub fn most_shared(&self) -> usize {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => gpu.properties.most_shared,
            // A Hopper GPU's.
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(_) => 227 << 10,
        }
    }

    /// Seconds that the device takes at least for what `launches` puts into the stream, of so many times; `None` where times
    /// say nothing, as on the emulator.
    pub fn time(&self, times: usize, launches: &mut dyn FnMut() -> Result<()>) -> Result<Option<f64>> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => gpu.time(times, launches).map(Some),
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(gpu) => {
                let _ = (times, launches);
                Ok(gpu.timed.as_ref().map(|timed| {
                    timed.fetch_add(1, Ordering::Relaxed);
                    1.0
                }))
            }
        }
    }

    /// Puts a kernel into the stream.
    ///
    /// # Safety
    /// The arguments are what the kernel takes, and its pointers hold what it reads and writes until it has run.
    pub unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        match self {
            // SAFETY: the caller's promise.
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => unsafe { gpu.launch(launch) },
            // SAFETY: the caller's promise.
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(gpu) => unsafe { gpu.launch(launch) },
        }
    }

    /// Puts a matrix product into the stream.
    ///
    /// # Safety
    /// The addresses hold what the shapes say until it has run.
    pub unsafe fn gemm(&self, gemm: &Gemm) -> Result<()> {
        match self {
            // SAFETY: the caller's promise.
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => unsafe { gpu.gemm(gemm) },
            // SAFETY: the caller's promise.
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(gpu) => unsafe { gpu.gemm(gemm) },
        }
    }

    /// Does what `launches` puts into the stream. The second time with the same `key` it is recorded as a CUDA graph, and
    /// later times replay that in one launch: `key` must name everything that the launches depend on.
    pub fn replay(&self, key: u64, launches: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => gpu.replay(key, launches),
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(_) => {
                let _ = key;
                launches()
            }
        }
    }

    /// Makes the device the thread's own: what another thread begins may be launched from this one then.
    pub fn bind(&self) -> Result<()> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => gpu.bind(),
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(_) => Ok(()),
        }
    }

    /// Where a contiguous tensor lies on this device.
    pub fn address(&self, tensor: &Tensor) -> Result<Address> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, _)) = layout.contiguous_offsets() else {
            bail!("the GPU path expects contiguous tensors");
        };
        let base = match &*storage {
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => super::cuda::address(storage)?,
            Storage::Cpu(storage) => host_address(storage)?,
            _ => bail!("the GPU path cannot read this tensor's memory"),
        };
        Ok(base + (start * tensor.dtype().size_in_bytes()) as u64)
    }
}

fn host_address(storage: &CpuStorage) -> Result<Address> {
    match storage {
        CpuStorage::F32(data) => Ok(data.as_ptr() as Address),
        CpuStorage::BF16(data) => Ok(data.as_ptr() as Address),
        CpuStorage::F16(data) => Ok(data.as_ptr() as Address),
        CpuStorage::U32(data) => Ok(data.as_ptr() as Address),
        _ => bail!("the GPU path runs f32, bf16 and f16"),
    }
}

impl Buffer {
    /// Where it begins, aligned to 16 bytes.
    pub fn address(&self) -> Address {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(buffer) => buffer.address(),
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(words) => words.as_ptr() as Address,
        }
    }

    /// Makes what it holds no number, so that tests see who reads what nobody wrote; on a real device nothing is done.
    pub fn spoil(&mut self) {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(_) => {}
            #[cfg(feature = "kernel-emulation")]
            Self::Emulated(words) => words.fill(u128::MAX),
        }
    }
}
