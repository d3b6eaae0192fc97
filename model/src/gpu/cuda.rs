//! A real GPU behind the device's interface: cudarc's driver and cuBLAS in candle's stream.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::ffi::c_void;
use std::sync::{Arc, Mutex};

use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, result as blas, sys as blas_sys};
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaFunction, CudaGraph, CudaModule, CudaSlice, CudaStream, DevicePtr, PinnedHostSlice, result, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice};
use candle_core::{DType, Error, Result, bail};

use super::backend::{Address, Gemm, Launch, Side};

/// All kernels, compiled by the build script.
const KERNELS: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// cuBLAS' own memory: what it asks for on Hopper, twice what it needs elsewhere. Its default is taken at the first product,
/// which a recording does not allow.
const BLAS_WORKSPACE: usize = 32 << 20;

/// Graphs that are kept; a decoder's batch sizes are far fewer.
const MOST_GRAPHS: usize = 256;

/// A GPU's stream with our kernels.
pub(crate) struct CudaGpu {
    stream: Arc<CudaStream>,
    blas: CudaBlas,
    /// Held for as long as `blas`.
    _blas_workspace: CudaSlice<u8>,
    module: Arc<CudaModule>,
    functions: RefCell<HashMap<String, CudaFunction>>,
    /// Page-locked memory that no copy is on its way to.
    spare: Spare,
    graphs: RefCell<HashMap<u64, Graph>>,
    /// Keys that were launched once: the next time they are recorded.
    warm: RefCell<HashSet<u64>>,
    /// A recording failed.
    unrecordable: Cell<bool>,
}

/// Words on their way to page-locked memory: a copy to any other would wait for the stream.
pub(crate) struct CudaCopy {
    /// There until the copy is dropped.
    words: Option<PinnedHostSlice<u32>>,
    arrived: CudaEvent,
    count: usize,
    /// Where the memory is kept for the next copy.
    spare: Spare,
}

type Spare = Arc<Mutex<Vec<PinnedHostSlice<u32>>>>;

impl std::fmt::Debug for CudaCopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaCopy")
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

impl CudaCopy {
    pub fn wait(self) -> Result<Vec<u32>> {
        self.arrived.synchronize().map_err(Error::wrap)?;
        match &self.words {
            Some(words) => Ok(words.as_slice().map_err(Error::wrap)?[..self.count].to_vec()),
            None => bail!("the copy is gone"),
        }
    }
}

impl Drop for CudaCopy {
    /// The memory may be freed or used again only when the device has written it.
    fn drop(&mut self) {
        let arrived = self.arrived.synchronize().is_ok();
        if let (true, Some(words), Ok(mut spare)) = (arrived, self.words.take(), self.spare.lock()) {
            spare.push(words);
        }
    }
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
        let workspace = stream.alloc_zeros::<u8>(BLAS_WORKSPACE).map_err(Error::wrap)?;
        let address = workspace.device_ptr(&stream).0;
        // SAFETY: the memory lives as long as the handle, in the same struct.
        unsafe { blas_sys::cublasSetWorkspace_v2(*blas.handle(), address as *mut c_void, BLAS_WORKSPACE) }
            .result()
            .map_err(Error::wrap)?;
        let module = stream
            .context()
            .load_module(Ptx::from_src(KERNELS))
            .map_err(|err| Error::Msg(format!("the driver refuses the kernels: {err}; they need a newer driver, or a build with this GPU's CUDA_COMPUTE_CAP")))?;
        Ok(Self {
            stream,
            blas,
            _blas_workspace: workspace,
            module,
            functions: RefCell::default(),
            spare: Spare::default(),
            graphs: RefCell::default(),
            warm: RefCell::default(),
            unrecordable: Cell::new(false),
        })
    }

    pub fn alloc(&self, bytes: usize) -> Result<CudaBuffer> {
        let slice = self.stream.alloc_zeros::<u8>(bytes.max(1)).map_err(Error::wrap)?;
        let address = slice.device_ptr(&self.stream).0;
        Ok(CudaBuffer { slice, address })
    }

    /// # Safety
    /// As [`super::Gpu::upload`].
    pub unsafe fn upload(&self, to: Address, from: &[u32]) -> Result<()> {
        self.bind()?;
        // SAFETY: the caller's promise. Pageable memory has been read when the call returns.
        unsafe { result::memcpy_htod_async(to, from, self.stream.cu_stream()) }.map_err(Error::wrap)
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
        let spare = self.spare.lock().ok().and_then(|mut spare| spare.pop());
        let mut words = match spare.filter(|words| words.len() >= count) {
            Some(words) => words,
            // SAFETY: it is written before it is read.
            None => unsafe { self.stream.context().alloc_pinned(count.next_power_of_two()) }.map_err(Error::wrap)?,
        };
        let to = words.as_mut_ptr().map_err(Error::wrap)?;
        // SAFETY: the memory is at least as long, and lies in the result until the copy has arrived.
        let to = unsafe { std::slice::from_raw_parts_mut(to, count) };
        // SAFETY: the caller's promise.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) }.map_err(Error::wrap)?;
        let arrived = self.stream.record_event(None).map_err(Error::wrap)?;
        Ok(CudaCopy {
            words: Some(words),
            arrived,
            count,
            spare: self.spare.clone(),
        })
    }

    /// # Safety
    /// As [`super::Gpu::launch`].
    pub unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        let mut functions = self.functions.borrow_mut();
        let function = match functions.get(launch.kernel) {
            Some(function) => function,
            None => {
                let function = self.module.load_function(launch.kernel).map_err(Error::wrap)?;
                functions.entry(launch.kernel.to_owned()).or_insert(function)
            }
        };
        let mut words: Vec<u64> = launch.args.iter().map(|arg| arg.bits()).collect();
        let mut params: Vec<*mut c_void> = words.iter_mut().map(|w| std::ptr::from_mut(w).cast()).collect();
        let [x, y, z] = launch.grid;
        // SAFETY: the caller's promise; the driver copies the parameters before it returns.
        unsafe {
            result::launch_kernel(
                function.cu_function(),
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
        if first || self.unrecordable.get() || self.graphs.borrow().len() >= MOST_GRAPHS {
            return launches();
        }
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
