//! PyTorch's `.bin`: a zip file, never compressed, of values and a pickle that says where they lie. The pickle is
//! interpreted by candle, never executed; the values are mapped as those of safetensors are.

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use candle_core::pickle::{PthTensors, TensorInfo};
use candle_core::{DType, Device, Result, Tensor};
use memmap2::Mmap;
use zip::{CompressionMethod, ZipArchive};

use super::mapped::{self, Stored};
use crate::ModelError;

pub(super) struct Pickled {
    tensors: PthTensors,
    map: Mmap,
    /// Where each entry of the zip file lies.
    entries: HashMap<String, Range<usize>>,
}

impl Pickled {
    pub fn open(path: &Path) -> std::result::Result<Self, ModelError> {
        let bad = |reason: String| ModelError::BadFile {
            path: path.to_owned(),
            reason,
        };
        let opened = caught(|| PthTensors::new(path, None));
        let tensors = opened.map_err(|err| bad(format!("truncated or not a PyTorch checkpoint ({err})")))?;
        if tensors.tensor_infos().is_empty() {
            return Err(bad("it holds no tensors by name: not a state dict".to_owned()));
        }
        let file = File::open(path).map_err(|err| bad(err.to_string()))?;
        // SAFETY: as for safetensors, a model folder is read-only by convention.
        let map = unsafe { Mmap::map(&file) }.map_err(|err| bad(err.to_string()))?;
        let entries = entries(file).map_err(|err| bad(format!("truncated or not a PyTorch checkpoint ({err})")))?;
        Ok(Self { tensors, map, entries })
    }

    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.tensors.tensor_infos().keys()
    }

    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.tensor_infos().get(name)
    }

    /// The tensor as it is stored, see [`mapped::read`]; a transposed one is left to candle.
    pub fn load(&self, name: &str, info: &TensorInfo, wanted: DType, device: &Device) -> Result<Tensor> {
        if !info.layout.is_contiguous() {
            let tensor = caught(|| self.tensors.get(name))?;
            return tensor.ok_or_else(|| candle_core::Error::Msg(format!("{name} has no values")));
        }
        let bytes = info.layout.shape().elem_count() * info.dtype.size_in_bytes();
        let entry = self.entries.get(&info.path);
        let range = entry.and_then(|entry| {
            let start = entry.start.checked_add(info.layout.start_offset())?;
            let end = start.checked_add(bytes)?;
            (end <= entry.end).then_some(start..end)
        });
        let Some(bytes) = range else {
            candle_core::bail!("{name} reaches beyond the values that are stored for it")
        };
        let stored = Stored {
            file: &self.map,
            bytes,
            dtype: info.dtype,
            shape: info.layout.dims(),
        };
        mapped::read(&stored, wanted, device)
    }
}

/// Every entry that lies in the file as it is.
fn entries(file: File) -> zip::result::ZipResult<HashMap<String, Range<usize>>> {
    let length = file.metadata()?.len();
    let mut archive = ZipArchive::new(BufReader::new(file))?;
    let mut entries = HashMap::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index)?;
        let end = entry.data_start().and_then(|start| start.checked_add(entry.size()));
        if let (Some(start), Some(end), CompressionMethod::Stored) = (entry.data_start(), end, entry.compression())
            && end <= length
        {
            entries.insert(entry.name()?.into_owned(), start as usize..end as usize);
        }
    }
    Ok(entries)
}

/// Runs candle's pickle reader, which never executes what it reads but indexes into it unchecked: a damaged file may
/// panic it, and is an error here.
fn caught<T>(read: impl FnOnce() -> Result<T>) -> Result<T> {
    let panicked = |_| Err(candle_core::Error::Msg("malformed pickle".to_owned()));
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(panicked)
}
