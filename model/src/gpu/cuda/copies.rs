//! Copies between main memory and the GPU through page-locked memory: the driver may wait for the whole stream before it
//! copies from or to any other.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, PinnedHostSlice, result};
use candle_core::{Error, Result, bail};

use super::super::work::Address;

/// Page-locked memory that no copy is using.
type Spare = Arc<Mutex<Vec<PinnedHostSlice<u32>>>>;

/// The copies of one stream.
pub(super) struct Copies {
    stream: Arc<CudaStream>,
    spare: Spare,
    /// On their way to the device, the oldest first.
    uploads: VecDeque<Copy>,
}

/// Page-locked memory that a copy reads or writes until `done`; then it is spare again.
struct Copy {
    /// There until this is dropped.
    words: Option<PinnedHostSlice<u32>>,
    done: CudaEvent,
    spare: Spare,
}

impl Drop for Copy {
    /// The memory may be freed or used again only when the device has done with it.
    fn drop(&mut self) {
        let done = self.done.synchronize().is_ok();
        if let (true, Some(words), Ok(mut spare)) = (done, self.words.take(), self.spare.lock()) {
            spare.push(words);
        }
    }
}

/// Words on their way from the device.
pub(crate) struct CudaCopy {
    copy: Copy,
    count: usize,
}

impl std::fmt::Debug for CudaCopy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CudaCopy")
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

impl CudaCopy {
    /// Waits for the copy, not for what was launched behind it.
    pub fn wait(self) -> Result<Vec<u32>> {
        self.copy.done.synchronize().map_err(Error::wrap)?;
        match &self.copy.words {
            Some(words) => Ok(words.as_slice().map_err(Error::wrap)?[..self.count].to_vec()),
            None => bail!("the copy is gone"),
        }
    }
}

impl Copies {
    pub fn new(stream: Arc<CudaStream>) -> Self {
        Self {
            stream,
            spare: Spare::default(),
            uploads: VecDeque::new(),
        }
    }

    /// Puts a copy to the device into the stream; `from` may change as soon as this has returned.
    ///
    /// # Safety
    /// `to` is the address of as many words, until the copy has been made.
    pub unsafe fn upload(&mut self, to: Address, from: &[u32]) -> Result<()> {
        while self.uploads.front().is_some_and(|copy| copy.done.is_complete()) {
            self.uploads.pop_front();
        }
        let mut words = self.page_locked(from.len())?;
        let staged = &mut words.as_mut_slice().map_err(Error::wrap)?[..from.len()];
        staged.copy_from_slice(from);
        // SAFETY: the caller's promise; the staged words are held until the copy is done.
        unsafe { result::memcpy_htod_async(to, staged, self.stream.cu_stream()) }.map_err(Error::wrap)?;
        let copy = self.copy(words)?;
        self.uploads.push_back(copy);
        Ok(())
    }

    /// Puts a copy from the device into the stream, and does not wait for it.
    ///
    /// # Safety
    /// `from` is the address of `count` words until the copy has been taken.
    pub unsafe fn copy_back(&self, from: Address, count: usize) -> Result<CudaCopy> {
        let mut words = self.page_locked(count)?;
        let to = &mut words.as_mut_slice().map_err(Error::wrap)?[..count];
        // SAFETY: the caller's promise; the memory lies in the result until the copy has arrived.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) }.map_err(Error::wrap)?;
        Ok(CudaCopy {
            copy: self.copy(words)?,
            count,
        })
    }

    /// What keeps the memory of a copy that is in the stream.
    fn copy(&self, words: PinnedHostSlice<u32>) -> Result<Copy> {
        let done = self.stream.record_event(None).map_err(|err| {
            // Without an event nobody knows when the memory is free.
            let _ = self.stream.synchronize();
            Error::wrap(err)
        })?;
        Ok(Copy {
            words: Some(words),
            done,
            spare: self.spare.clone(),
        })
    }

    /// Memory of at least `count` words.
    fn page_locked(&self, count: usize) -> Result<PinnedHostSlice<u32>> {
        if let Ok(mut spare) = self.spare.lock()
            && let Some(at) = spare.iter().position(|words| words.len() >= count)
        {
            return Ok(spare.swap_remove(at));
        }
        let context = self.stream.context();
        let words = count.next_power_of_two();
        // SAFETY: it is written before it is read. No flags: memory that combines writes is slow to read.
        unsafe { context.alloc_pinned_with_flags(words, 0) }.map_err(Error::wrap)
    }
}
