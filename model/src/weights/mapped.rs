//! Safetensors files in mapped memory.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor};
use memmap2::Mmap;
use safetensors::SafeTensors;

use crate::ModelError;

/// The tensors of one or several files.
pub(super) struct Mapped {
    files: Vec<Mmap>,
    tensors: HashMap<String, Place>,
}

/// Where a tensor lies.
pub(super) struct Place {
    file: usize,
    bytes: Range<usize>,
    /// `None` where candle has none such.
    pub dtype: Option<DType>,
    pub shape: Vec<usize>,
}

impl Mapped {
    pub fn open(paths: &[PathBuf]) -> std::result::Result<Self, ModelError> {
        let mut mapped = Self {
            files: Vec::new(),
            tensors: HashMap::new(),
        };
        for path in paths {
            mapped.add(path).map_err(|reason| ModelError::BadFile {
                path: path.clone(),
                reason,
            })?;
        }
        Ok(mapped)
    }

    fn add(&mut self, path: &Path) -> std::result::Result<(), String> {
        let file = File::open(path).map_err(|err| err.to_string())?;
        // SAFETY: the file must not be changed while it is mapped; a model folder is read-only by convention, as for
        // every user of safetensors.
        let map = unsafe { Mmap::map(&file) }.map_err(|err| err.to_string())?;
        let header = SafeTensors::read_metadata(&map);
        let (length, header) = header.map_err(|err| format!("truncated or not a safetensors file ({err})"))?;
        // Eight bytes say how long the header behind them is.
        let data = 8 + length;
        for (name, info) in header.tensors() {
            let (start, end) = info.data_offsets;
            let place = Place {
                file: self.files.len(),
                bytes: data + start..data + end,
                dtype: DType::try_from(info.dtype).ok(),
                shape: info.shape.clone(),
            };
            self.tensors.insert(name, place);
        }
        self.files.push(map);
        Ok(())
    }

    pub fn place(&self, name: &str) -> Option<&Place> {
        self.tensors.get(name)
    }

    /// The tensor as it is stored.
    pub fn load(&self, place: &Place, device: &Device) -> Result<Tensor> {
        let file = &self.files[place.file];
        let Some(dtype) = place.dtype else {
            candle_core::bail!("a dtype without a name")
        };
        let tensor = Tensor::from_raw_buffer(&file[place.bytes.clone()], dtype, &place.shape, device)?;
        release(file, &place.bytes);
        Ok(tensor)
    }
}

/// Lets go of the pages that were read. They are the file's, so that the kernel can drop them when it needs room, but
/// until then they count as the process's memory, and a container's limit is held against that.
#[cfg(unix)]
fn release(file: &Mmap, bytes: &Range<usize>) {
    use memmap2::UncheckedAdvice;
    // SAFETY: a shared mapping of a file that nobody writes to; what is dropped is read from the file again.
    let advised = unsafe { file.unchecked_advise_range(UncheckedAdvice::DontNeed, bytes.start, bytes.len()) };
    if let Err(err) = advised {
        tracing::debug!("mapped pages are kept: {err}");
    }
}

#[cfg(not(unix))]
fn release(_file: &Mmap, _bytes: &Range<usize>) {}
