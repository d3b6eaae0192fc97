//! The emulator of `model/kernels/emulator` behind the device's interface, and a plain matrix product.

use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, c_char, c_uint, c_void};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};

use candle_core::{DType, Error, Result};
use half::{bf16, f16};

use super::work::{Address, Gemm, Launch, Side};

unsafe extern "C" {
    fn emulator_launch(
        name: *const c_char,
        grid: *const c_uint,
        block: *const c_uint,
        shared: c_uint,
        arguments: *mut *mut c_void,
        argument_count: usize,
    ) -> *const c_char;
    fn emulator_backwards(backwards: bool);
    fn emulator_bank_conflicts() -> usize;
    fn emulator_write_late(to: *mut c_void, from: *const c_void, bytes: usize);
}

/// The emulator runs one kernel at a time.
static RUNNING: Mutex<()> = Mutex::new(());

/// Kernels on the CPU.
#[derive(Debug, Default)]
pub(crate) struct EmulatedGpu {
    /// Runs the threads of a block in the opposite order: what then differs lacks a barrier.
    pub backwards: bool,
    /// Loads of matrices, in all launches so far, from rows of shared memory that share banks.
    pub bank_conflicts: Cell<usize>,
    /// Bytes that the kernel ahead of the next launch writes as late as it may, and where to.
    pub late: RefCell<Option<(Address, Vec<u8>)>>,
    /// Counts what is timed, each of which takes a second then: else times say nothing here.
    pub timed: Option<Arc<AtomicUsize>>,
}

impl EmulatedGpu {
    /// # Safety
    /// As [`super::Gpu::upload`].
    pub unsafe fn upload(&self, to: Address, from: &[u32]) {
        // SAFETY: the caller's promise; an emulated address is one of this process.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u32, from.len()) };
    }

    /// # Safety
    /// As [`super::Gpu::download`].
    pub unsafe fn download(&self, from: Address, to: &mut [u32]) {
        // SAFETY: the caller's promise; an emulated address is one of this process.
        unsafe { std::ptr::copy_nonoverlapping(from as *const u32, to.as_mut_ptr(), to.len()) };
    }

    /// # Safety
    /// As [`super::Gpu::launch`].
    pub unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        let name = CString::new(launch.kernel).map_err(Error::wrap)?;
        let mut words: Vec<u64> = launch.args.iter().map(|arg| arg.bits()).collect();
        let mut arguments: Vec<*mut c_void> = words.iter_mut().map(|w| std::ptr::from_mut(w).cast()).collect();
        let block = [launch.threads, 1, 1];
        let _running = RUNNING.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let late = self.late.take();
        // SAFETY: the caller's promise for what the arguments say; the lock for the emulator's own state.
        let (error, conflicts) = unsafe {
            emulator_backwards(self.backwards);
            if let Some((to, bytes)) = &late {
                emulator_write_late(*to as *mut c_void, bytes.as_ptr().cast(), bytes.len());
            }
            let error = emulator_launch(
                name.as_ptr(),
                launch.grid.as_ptr(),
                block.as_ptr(),
                launch.shared,
                arguments.as_mut_ptr(),
                arguments.len(),
            );
            (error, emulator_bank_conflicts())
        };
        self.bank_conflicts.set(self.bank_conflicts.get() + conflicts);
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: a line of text that is valid until the next launch, which the lock keeps away.
        let message = unsafe { CStr::from_ptr(error) };
        Err(Error::Msg(message.to_string_lossy().into_owned()))
    }

    /// # Safety
    /// As [`super::Gpu::gemm`].
    pub unsafe fn gemm(&self, gemm: &Gemm) -> Result<()> {
        for row in 0..gemm.rows {
            for output in 0..gemm.outputs {
                let product = |i| {
                    let weight = match gemm.side {
                        Side::Transposed => output * gemm.inputs + i,
                        Side::Plain => i * gemm.outputs + output,
                    };
                    // SAFETY: the caller's promise.
                    unsafe { load(gemm.x, gemm.dtype, row * gemm.inputs + i) * load(gemm.w, gemm.dtype, weight) }
                };
                let mut sum: f32 = (0..gemm.inputs).map(product).sum();
                let at = row * gemm.outputs + output;
                // SAFETY: the caller's promise.
                unsafe {
                    if gemm.accumulate {
                        sum += load(gemm.out, gemm.out_dtype, at);
                    }
                    store(gemm.out, gemm.out_dtype, at, sum);
                }
            }
        }
        Ok(())
    }
}

/// # Safety
/// `address` holds more than `at` elements of `dtype`.
unsafe fn load(address: Address, dtype: DType, at: usize) -> f32 {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::BF16 => (*(address as *const bf16).add(at)).to_f32(),
            DType::F16 => (*(address as *const f16).add(at)).to_f32(),
            _ => *(address as *const f32).add(at),
        }
    }
}

/// # Safety
/// As [`load`].
unsafe fn store(address: Address, dtype: DType, at: usize, x: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            DType::BF16 => *(address as *mut bf16).add(at) = bf16::from_f32(x),
            DType::F16 => *(address as *mut f16).add(at) = f16::from_f32(x),
            _ => *(address as *mut f32).add(at) = x,
        }
    }
}
