//! A checkpoint's tensors by their Hugging Face names.

mod mapped;
mod pickled;
mod room;
mod surplus;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use candle_core::safetensors::BufferedSafetensors;
use candle_core::{D, DType, Device, Tensor};
use serde::Deserialize;

use crate::{ModelError, Quantization};
use mapped::Mapped;
use pickled::Pickled;

/// Tensors that are read, converted and moved to the device when they are asked for.
pub struct Weights {
    source: Source,
    dtype: DType,
    device: Device,
    quantization: Option<Quantization>,
    /// Names that were asked for.
    taken: RefCell<HashSet<String>>,
}

enum Source {
    Memory(HashMap<String, Tensor>),
    Buffer(BufferedSafetensors),
    Safetensors(Mapped),
    /// PyTorch's `.bin`.
    Pickle(Vec<Pickled>),
}

#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Weights {
    /// Opens a model folder's `model.safetensors` or `pytorch_model.bin`, or the shards that its index names.
    ///
    /// # Errors
    /// No such file, or one that is damaged.
    pub fn open(folder: &Path, dtype: DType, device: &Device) -> Result<Self, ModelError> {
        let source = match (files(folder, "model.safetensors")?, files(folder, "pytorch_model.bin")?) {
            (Some(files), _) => Source::Safetensors(Mapped::open(&files)?),
            (None, Some(files)) => Source::Pickle(files.iter().map(|f| Pickled::open(f)).collect::<Result<_, _>>()?),
            (None, None) => {
                let reason = "no model.safetensors, pytorch_model.bin or an index of either".to_owned();
                return Err(ModelError::BadFile {
                    path: folder.to_owned(),
                    reason,
                });
            }
        };
        Ok(Self {
            source,
            dtype,
            device: device.clone(),
            quantization: None,
            taken: RefCell::default(),
        })
    }

    /// Tensors that are in memory already, taken as they are: variables stay variables.
    pub fn from_tensors(tensors: HashMap<String, Tensor>, dtype: DType, device: &Device) -> Self {
        Self {
            source: Source::Memory(tensors),
            dtype,
            device: device.clone(),
            quantization: None,
            taken: RefCell::default(),
        }
    }

    /// The bytes of a safetensors file.
    ///
    /// # Errors
    /// They are cut short or no such file.
    pub fn from_bytes(bytes: Vec<u8>, dtype: DType, device: &Device) -> Result<Self, ModelError> {
        let buffer = BufferedSafetensors::new(bytes).map_err(|err| ModelError::BadFile {
            path: "model.safetensors".into(),
            reason: format!("truncated or not a safetensors file ({err})"),
        })?;
        Ok(Self {
            source: Source::Buffer(buffer),
            dtype,
            device: device.clone(),
            quantization: None,
            taken: RefCell::default(),
        })
    }

    /// The same weights, those of the linear layers and of the head to be stored in fewer bits.
    ///
    /// # Errors
    /// They are to run on a device or in a dtype that has no kernel for it.
    pub fn quantized(self, quantization: Option<Quantization>) -> Result<Self, ModelError> {
        if quantization.is_some() && !(self.device.is_cpu() && self.dtype == DType::F32) {
            let device = if self.device.is_cpu() { "cpu" } else { "a GPU" };
            return Err(ModelError::QuantizationUnsupported {
                device: device.to_owned(),
                dtype: self.dtype.as_str().to_owned(),
            });
        }
        Ok(Self { quantization, ..self })
    }

    /// How the weights of linear layers are to be stored.
    pub fn quantization(&self) -> Option<Quantization> {
        self.quantization
    }

    /// Whether there is a tensor `name`.
    pub fn contains(&self, name: &str) -> bool {
        match &self.source {
            Source::Memory(tensors) => tensors.contains_key(name),
            Source::Buffer(file) => file.get(name).is_ok(),
            Source::Safetensors(files) => files.place(name).is_some(),
            Source::Pickle(files) => files.iter().any(|f| f.info(name).is_some()),
        }
    }

    /// The tensor `name`, which must have `shape`, in the dtype and on the device of the model.
    ///
    /// # Errors
    /// It is missing, of another shape, quantised, or holds NaN or infinity.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let tensor = self.load(name, shape)?;
        self.taken.borrow_mut().insert(name.to_owned());
        if tensor.is_variable() {
            return Ok(tensor);
        }
        let tensor = tensor.to_device(&self.device)?.to_dtype(self.dtype)?;
        // A sum of finite values in f32 is finite far beyond what weights hold; NaN and infinity survive it.
        // Row by row: a GPU sums each in a block of its own, and all at once in a single one.
        let sums = tensor.to_dtype(DType::F32)?.sum(D::Minus1)?;
        // A sum over no dimension, of a scalar, is none that candle has on a GPU.
        let sum = sums.flatten_all()?.sum(0)?.to_scalar::<f32>()?;
        if !sum.is_finite() {
            return Err(ModelError::NonFiniteTensor { name: name.to_owned() });
        }
        Ok(tensor)
    }

    /// Several matrices of the same input, as [`Weights::get`] gives them. On a GPU they lie one behind the other, so that
    /// one product can take them all.
    ///
    /// # Errors
    /// As there.
    pub fn get_adjacent(&self, parts: &[(String, [usize; 2])]) -> Result<Vec<Tensor>, ModelError> {
        let get = |(name, shape): &(String, [usize; 2])| self.get(name, shape);
        let tensors: Vec<Tensor> = parts.iter().map(get).collect::<Result<_, _>>()?;
        if self.device.is_cpu() || tensors.iter().any(|t| t.is_variable()) {
            return Ok(tensors);
        }
        let all = Tensor::cat(&tensors, 0)?;
        let mut start = 0;
        let part = |(_, [rows, _]): &(String, [usize; 2])| {
            start += rows;
            all.narrow(0, start - rows, *rows)
        };
        Ok(parts.iter().map(part).collect::<candle_core::Result<_>>()?)
    }

    /// The tensor as it is stored. Its shape is checked before memory is taken for it.
    fn load(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let missing = || ModelError::MissingTensor { name: name.to_owned() };
        match &self.source {
            Source::Memory(tensors) => {
                let tensor = tensors.get(name).ok_or_else(missing)?;
                check(name, tensor.dims(), shape, Some(tensor.dtype()))?;
                Ok(tensor.clone())
            }
            Source::Buffer(file) => {
                let view = file.get(name).map_err(|_| missing())?;
                check(name, view.shape(), shape, DType::try_from(view.dtype()).ok())?;
                Ok(file.load(name, &self.device)?)
            }
            Source::Safetensors(files) => {
                let place = files.place(name).ok_or_else(missing)?;
                check(name, &place.shape, shape, place.dtype)?;
                Ok(files.load(place, self.dtype, &self.device)?)
            }
            Source::Pickle(files) => {
                let found = files.iter().find_map(|f| Some((f, f.info(name)?)));
                let (file, info) = found.ok_or_else(missing)?;
                check(name, info.layout.dims(), shape, Some(info.dtype))?;
                Ok(file.load(name, info, self.dtype, &self.device)?)
            }
        }
    }
}

fn check(name: &str, got: &[usize], want: &[usize], dtype: Option<DType>) -> Result<(), ModelError> {
    if got != want {
        let (got, want) = (got.to_vec(), want.to_vec());
        return Err(ModelError::ShapeMismatch {
            name: name.to_owned(),
            got,
            want,
        });
    }
    match dtype {
        Some(DType::F32 | DType::F16 | DType::BF16 | DType::F64) => Ok(()),
        other => Err(ModelError::UnsupportedDType {
            name: name.to_owned(),
            dtype: other.map_or("unknown", |d| d.as_str()).to_owned(),
        }),
    }
}

/// Whether a folder has weights in one of the forms that [`Weights::open`] knows, all shards included.
pub(crate) fn are_in(folder: &Path) -> bool {
    ["model.safetensors", "pytorch_model.bin"]
        .into_iter()
        .any(|name| matches!(files(folder, name), Ok(Some(_))))
}

/// The file `name` of a folder, or the shards of `name`'s index; `None` where there is neither.
fn files(folder: &Path, name: &str) -> Result<Option<Vec<PathBuf>>, ModelError> {
    let single = folder.join(name);
    if single.is_file() {
        return Ok(Some(vec![single]));
    }
    let index = folder.join(format!("{name}.index.json"));
    let Ok(text) = std::fs::read_to_string(&index) else {
        return Ok(None);
    };
    let bad = |reason: String| ModelError::BadFile {
        path: index.clone(),
        reason,
    };
    let parsed: Index = serde_json::from_str(&text).map_err(|err| bad(err.to_string()))?;
    let shards: BTreeSet<String> = parsed.weight_map.into_values().collect();
    if let Some(shard) = shards.iter().find(|s| s.contains(['/', '\\']) || s.contains("..")) {
        return Err(bad(format!("it names a shard outside the folder: {shard}")));
    }
    let shards: Vec<PathBuf> = shards.iter().map(|s| folder.join(s)).collect();
    match shards.iter().find(|s| !s.is_file()) {
        Some(shard) => Err(bad(format!("it names a shard that is missing: {}", shard.display()))),
        None => Ok(Some(shards)),
    }
}

#[cfg(test)]
mod tests;
