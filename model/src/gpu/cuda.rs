//! A real GPU behind the device's interface: cudarc's driver and cuBLAS in candle's stream.

mod copies;
mod graphs;
mod module;
mod properties;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, result as blas, sys as blas_sys};
use candle_core::cuda_backend::cudarc::driver::{CudaModule, CudaSlice, CudaStream, DevicePtr, result, sys};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice};
use candle_core::{DType, Error, Result, bail};

use super::work::{Address, Gemm, Launch, Side};
use copies::Copies;
pub(crate) use copies::CudaCopy;
use graphs::Graphs;
use module::Function;
use properties::Properties;

/// cuBLAS' own memory: what it asks for on Hopper, twice what it needs elsewhere. Its default is taken at the first product,
/// which a recording does not allow.
pub(crate) const BLAS_WORKSPACE: usize = 32 << 20;

/// A GPU's stream with our kernels.
pub(crate) struct CudaGpu {
    stream: Arc<CudaStream>,
    pub properties: Properties,
    blas: ManuallyDrop<CudaBlas>,
    /// Held for as long as `blas`.
    _blas_workspace: CudaSlice<u8>,
    module: Arc<CudaModule>,
    functions: RefCell<HashMap<String, Function>>,
    copies: RefCell<Copies>,
    graphs: RefCell<Graphs>,
    /// Kernels may be launched before the one ahead has ended.
    launches_early: Cell<bool>,
}

/// Memory of the GPU.
pub(crate) struct CudaBuffer {
    slice: CudaSlice<u8>,
    address: Address,
}

impl CudaBuffer {
    pub fn address(&self) -> Address {
        let _held = &self.slice;
        self.address
    }
}

impl CudaGpu {
    pub fn new(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        // SAFETY: all work is in this one stream, so nothing has to be ordered between two. A recording that waits for an
        // event from before it fails.
        unsafe { stream.context().disable_event_tracking() };
        let blas = ManuallyDrop::new(CudaBlas::new(stream.clone()).map_err(Error::wrap)?);
        // Parts of a sum in 16 bits would make it depend on how many rows there are.
        let exact = blas_sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
        // SAFETY: the handle is alive.
        unsafe { blas_sys::cublasSetMathMode(*blas.handle(), exact) }
            .result()
            .map_err(Error::wrap)?;
        let workspace = zeroed(&stream, BLAS_WORKSPACE)?;
        let address = workspace.device_ptr(&stream).0;
        // SAFETY: the memory lives as long as the handle, in the same struct.
        unsafe { blas_sys::cublasSetWorkspace_v2(*blas.handle(), address as *mut c_void, BLAS_WORKSPACE) }
            .result()
            .map_err(Error::wrap)?;
        let module = module::load(stream.context())?;
        Ok(Self {
            copies: RefCell::new(Copies::new(stream.clone())),
            properties: Properties::of(stream.context())?,
            launches_early: Cell::new(properties::launches_early(stream.context())?),
            stream,
            blas,
            _blas_workspace: workspace,
            module,
            functions: RefCell::default(),
            graphs: RefCell::new(Graphs::new()),
        })
    }

    pub fn alloc(&self, bytes: usize) -> Result<CudaBuffer> {
        let slice = zeroed(&self.stream, bytes.max(1))?;
        let address = slice.device_ptr(&self.stream).0;
        Ok(CudaBuffer { slice, address })
    }

    /// # Safety
    /// As [`super::Gpu::upload`].
    pub unsafe fn upload(&self, to: Address, from: &[u32]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { self.copies.borrow_mut().upload(to, from) }
    }

    /// # Safety
    /// As [`super::Gpu::download`].
    pub unsafe fn download(&self, from: Address, to: &mut [u32]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise, and the stream is waited for before `to` is given back.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) }.map_err(Error::wrap)?;
        self.stream.synchronize().map_err(Error::wrap)
    }

    /// # Safety
    /// As [`super::Gpu::copy_back`].
    pub unsafe fn copy_back(&self, from: Address, count: usize) -> Result<CudaCopy> {
        self.bind()?;
        // SAFETY: the caller's promise.
        unsafe { self.copies.borrow().copy_back(from, count) }
    }

    /// # Safety
    /// As [`super::Gpu::launch`].
    pub unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        let mut functions = self.functions.borrow_mut();
        let function = match functions.get_mut(launch.kernel) {
            Some(function) => function,
            None => {
                let function = Function::load(&self.module, launch.kernel)?;
                functions.entry(launch.kernel.to_owned()).or_insert(function)
            }
        };
        function.allow_shared(launch.shared, self.properties.most_shared)?;
        let mut words: Vec<u64> = launch.args.iter().map(|arg| arg.bits()).collect();
        let mut params: Vec<*mut c_void> = words.iter_mut().map(|w| std::ptr::from_mut(w).cast()).collect();
        let mut early = properties::early_launch();
        let config = sys::CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: self.launches_early.get().into(),
        };
        let function = function.function.cu_function();
        // SAFETY: the caller's promise; the driver copies configuration and parameters before it returns.
        unsafe { sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(|err| Error::Msg(format!("kernel {}: {err}", launch.kernel)))
    }

    /// # Safety
    /// As [`super::Gpu::gemm`].
    pub unsafe fn gemm(&self, gemm: &Gemm) -> Result<()> {
        let (one, beta) = (1f32, if gemm.accumulate { 1f32 } else { 0f32 });
        let (m, n, k) = (gemm.outputs as i32, gemm.rows as i32, gemm.inputs as i32);
        let dtype = data_type(gemm.dtype)?;
        // cuBLAS counts in columns: out is its outᵀ = w xᵀ, or wᵀ xᵀ, and a w in rows is a wᵀ to it.
        let (w_op, w_stride) = match gemm.side {
            Side::Transposed => (blas_sys::cublasOperation_t::CUBLAS_OP_T, k),
            Side::Plain => (blas_sys::cublasOperation_t::CUBLAS_OP_N, m),
        };
        // SAFETY: the caller's promise; the scalars are read before the call returns.
        unsafe {
            blas::gemm_ex(
                *self.blas.handle(),
                w_op,
                blas_sys::cublasOperation_t::CUBLAS_OP_N,
                m,
                n,
                k,
                std::ptr::from_ref(&one).cast(),
                gemm.w as *const c_void,
                dtype,
                w_stride,
                gemm.x as *const c_void,
                dtype,
                k,
                std::ptr::from_ref(&beta).cast(),
                gemm.out as *mut c_void,
                data_type(gemm.out_dtype)?,
                m,
                blas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                blas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        }
        .map_err(Error::wrap)
    }

    /// Makes the GPU's context this thread's: calls of the driver that bypass cudarc need it.
    pub fn bind(&self) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(Error::wrap)
    }
}

impl Drop for CudaGpu {
    fn drop(&mut self) {
        // After a fault of the GPU cuBLAS cannot be closed. cudarc panics then, and the fault's own message would be lost.
        if self.stream.synchronize().is_ok() {
            // SAFETY: this is the last that is done with it.
            unsafe { ManuallyDrop::drop(&mut self.blas) };
        }
    }
}

/// Memory of the GPU, zero; where it has none left, the error says how much.
fn zeroed(stream: &Arc<CudaStream>, bytes: usize) -> Result<CudaSlice<u8>> {
    stream.alloc_zeros::<u8>(bytes).map_err(|err| {
        let free = stream.context().mem_get_info().map_or(0, |(free, _)| free);
        Error::Msg(format!(
            "{bytes} bytes of the GPU's memory are needed, {free} are free: {err}"
        ))
    })
}

fn data_type(dtype: DType) -> Result<blas_sys::cudaDataType> {
    match dtype {
        DType::F32 => Ok(blas_sys::cudaDataType::CUDA_R_32F),
        DType::BF16 => Ok(blas_sys::cudaDataType::CUDA_R_16BF),
        DType::F16 => Ok(blas_sys::cudaDataType::CUDA_R_16F),
        other => bail!("cuBLAS: no product for {}", other.as_str()),
    }
}

/// Bytes that are free on the device once what was launched is done.
pub(crate) fn free_memory(device: &CudaDevice) -> Result<usize> {
    let stream = device.cuda_stream();
    stream.synchronize().map_err(Error::wrap)?;
    let (free, _) = stream.context().mem_get_info().map_err(Error::wrap)?;
    Ok(free)
}

/// Where a tensor's storage begins.
pub(crate) fn address(storage: &CudaStorage) -> Result<Address> {
    let stream = storage.device.cuda_stream();
    match &storage.slice {
        CudaStorageSlice::F32(slice) => Ok(slice.device_ptr(&stream).0),
        CudaStorageSlice::BF16(slice) => Ok(slice.device_ptr(&stream).0),
        CudaStorageSlice::F16(slice) => Ok(slice.device_ptr(&stream).0),
        CudaStorageSlice::U32(slice) => Ok(slice.device_ptr(&stream).0),
        _ => bail!("the GPU path runs f32, bf16 and f16"),
    }
}
