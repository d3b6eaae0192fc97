//! A real GPU behind the device's interface: cudarc's driver and cuBLAS in candle's stream.

mod copies;
mod module;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, result as blas, sys as blas_sys};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaModule, CudaSlice, CudaStream, DevicePtr, result, sys};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice};
use candle_core::{DType, Error, Result, bail};

use super::backend::{Address, Gemm, Launch, Side};
use copies::Copies;
pub(crate) use copies::CudaCopy;
use module::Function;

/// cuBLAS' own memory: what it asks for on Hopper, twice what it needs elsewhere. Its default is taken at the first product,
/// which a recording does not allow.
pub(crate) const BLAS_WORKSPACE: usize = 32 << 20;

/// Graphs that are kept; most passes have one of a few batch sizes.
const MOST_GRAPHS: usize = 256;

/// A GPU's stream with our kernels.
pub(crate) struct CudaGpu {
    stream: Arc<CudaStream>,
    blas: CudaBlas,
    /// Held for as long as `blas`.
    _blas_workspace: CudaSlice<u8>,
    module: Arc<CudaModule>,
    functions: RefCell<HashMap<String, Function>>,
    copies: RefCell<Copies>,
    graphs: RefCell<HashMap<u64, Graph>>,
    /// Keys that were launched once: the next time they are recorded.
    warm: RefCell<HashSet<u64>>,
    /// A recording failed.
    unrecordable: Cell<bool>,
}

/// A recorded pass.
struct Graph(CudaGraph);

// SAFETY: a graph may be used from any thread, one at a time; it lies in a `RefCell`, which is not `Sync`.
unsafe impl Send for Graph {}

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
        let blas = CudaBlas::new(stream.clone()).map_err(Error::wrap)?;
        let workspace = zeroed(&stream, BLAS_WORKSPACE)?;
        let address = workspace.device_ptr(&stream).0;
        // SAFETY: the memory lives as long as the handle, in the same struct.
        unsafe { blas_sys::cublasSetWorkspace_v2(*blas.handle(), address as *mut c_void, BLAS_WORKSPACE) }
            .result()
            .map_err(Error::wrap)?;
        let module = module::load(stream.context())?;
        Ok(Self {
            copies: RefCell::new(Copies::new(stream.clone())),
            stream,
            blas,
            _blas_workspace: workspace,
            module,
            functions: RefCell::default(),
            graphs: RefCell::default(),
            warm: RefCell::default(),
            unrecordable: Cell::new(false),
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
        function.allow_shared(launch.shared)?;
        let mut words: Vec<u64> = launch.args.iter().map(|arg| arg.bits()).collect();
        let mut params: Vec<*mut c_void> = words.iter_mut().map(|w| std::ptr::from_mut(w).cast()).collect();
        let [x, y, z] = launch.grid;
        // SAFETY: the caller's promise; the driver copies the parameters before it returns.
        unsafe {
            result::launch_kernel(
                function.function.cu_function(),
                (x, y, z),
                (launch.threads, 1, 1),
                launch.shared,
                self.stream.cu_stream(),
                &mut params,
            )
        }
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

    pub fn replay(&self, key: u64, launches: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.bind()?;
        if let Some(Graph(graph)) = self.graphs.borrow().get(&key) {
            return graph.launch().map_err(Error::wrap);
        }
        // The first time runs as it is: it loads the kernels and lets cuBLAS choose its own.
        let first = self.warm.borrow_mut().insert(key);
        if first || self.unrecordable.get() {
            return launches();
        }
        self.make_room();
        match self.record(launches) {
            Ok(graph) => {
                graph.0.launch().map_err(Error::wrap)?;
                self.graphs.borrow_mut().insert(key, graph);
                Ok(())
            }
            Err(err) => {
                tracing::warn!("passes cannot be recorded on this GPU, so each is launched kernel by kernel: {err}");
                self.unrecordable.set(true);
                launches()
            }
        }
    }

    /// Drops all graphs where there are too many: of buffers or adapters that are gone, mostly.
    fn make_room(&self) {
        if self.graphs.borrow().len() >= MOST_GRAPHS {
            // One may be running.
            let _ = self.stream.synchronize();
            self.graphs.borrow_mut().clear();
        }
    }

    fn record(&self, launches: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(Error::wrap)?;
        let launched = launches();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = self.stream.end_capture(flags).map_err(Error::wrap);
        launched?;
        match graph? {
            Some(graph) => Ok(Graph(graph)),
            None => bail!("the recorded pass is empty"),
        }
    }

    /// Makes the GPU's context this thread's: calls of the driver that bypass cudarc need it.
    pub fn bind(&self) -> Result<()> {
        self.stream.context().bind_to_thread().map_err(Error::wrap)
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
