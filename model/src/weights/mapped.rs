//! Safetensors files in mapped memory.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};
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

    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.tensors.keys()
    }

    pub fn place(&self, name: &str) -> Option<&Place> {
        self.tensors.get(name)
    }

    /// The tensor as it is stored, see [`read`].
    pub fn load(&self, place: &Place, wanted: DType, device: &Device) -> Result<Tensor> {
        let Some(dtype) = place.dtype else {
            candle_core::bail!("a dtype without a name")
        };
        let stored = Stored {
            file: &self.files[place.file],
            bytes: place.bytes.clone(),
            dtype,
            shape: &place.shape,
        };
        read(&stored, wanted, device)
    }
}

/// A tensor in a mapped file.
pub(super) struct Stored<'a> {
    pub file: &'a Mmap,
    pub bytes: Range<usize>,
    pub dtype: DType,
    pub shape: &'a [usize],
}

/// The tensor as it is stored; where f32 is wanted on the CPU, in f32 with no copy in between: 16 bits are widened on the
/// way, and values that do not lie on a multiple of their size, as in some zip files, are not copied to where they do.
pub(super) fn read(stored: &Stored, wanted: DType, device: &Device) -> Result<Tensor> {
    let bytes = &stored.file[stored.bytes.clone()];
    let here = wanted == DType::F32 && device.is_cpu();
    let values = match stored.dtype {
        DType::F32 if here => Some(floats(bytes, f32::from_le_bytes)),
        DType::BF16 if here => Some(floats(bytes, |b| bf16::from_le_bytes(b).to_f32())),
        DType::F16 if here => Some(floats(bytes, |b| f16::from_le_bytes(b).to_f32())),
        _ => None,
    };
    let tensor = match values {
        Some(values) => Tensor::from_vec(values, stored.shape, device)?,
        None => Tensor::from_raw_buffer(bytes, stored.dtype, stored.shape, device)?,
    };
    release(stored.file, &stored.bytes);
    Ok(tensor)
}

fn floats<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| read(*chunk)).collect()
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
