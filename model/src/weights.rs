//! A checkpoint's tensors by their Hugging Face names.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Tensor, pickle};
use serde::Deserialize;

use crate::ModelError;

/// Tensors that are read, converted and moved to the device when they are asked for.
pub struct Weights {
    source: Source,
    dtype: DType,
    device: Device,
}

enum Source {
    Memory(HashMap<String, Tensor>),
    Safetensors(MmapedSafetensors),
    /// PyTorch's `.bin`: a zip file with a pickle that is interpreted, never executed.
    Pickle(Vec<pickle::PthTensors>),
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
            (Some(files), _) => Source::Safetensors(map_safetensors(&files)?),
            (None, Some(files)) => Source::Pickle(files.iter().map(|f| open_pickle(f)).collect::<Result<_, _>>()?),
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
        })
    }

    /// Tensors that are in memory already, taken as they are: variables stay variables.
    pub fn from_tensors(tensors: HashMap<String, Tensor>, dtype: DType, device: &Device) -> Self {
        Self {
            source: Source::Memory(tensors),
            dtype,
            device: device.clone(),
        }
    }

    /// The tensor `name`, which must have `shape`, in the dtype and on the device of the model.
    ///
    /// # Errors
    /// It is missing, of another shape, or holds NaN or infinity.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor, ModelError> {
        let missing = || ModelError::MissingTensor { name: name.to_owned() };
        let tensor = match &self.source {
            Source::Memory(tensors) => tensors.get(name).cloned().ok_or_else(missing)?,
            Source::Safetensors(files) => {
                files.get(name).map_err(|_| missing())?;
                files.load(name, &self.device)?
            }
            Source::Pickle(files) => {
                let file = files
                    .iter()
                    .find(|f| f.tensor_infos().contains_key(name))
                    .ok_or_else(missing)?;
                file.get(name)?.ok_or_else(missing)?
            }
        };
        if tensor.dims() != shape {
            let (got, want) = (tensor.dims().to_vec(), shape.to_vec());
            return Err(ModelError::ShapeMismatch {
                name: name.to_owned(),
                got,
                want,
            });
        }
        if tensor.is_variable() {
            return Ok(tensor);
        }
        let tensor = tensor.to_device(&self.device)?.to_dtype(self.dtype)?;
        // A sum of finite values in f32 is finite far beyond what weights hold; NaN and infinity survive it.
        let sum = tensor.to_dtype(DType::F32)?.abs()?.sum_all()?.to_scalar::<f32>()?;
        if !sum.is_finite() {
            return Err(ModelError::NonFiniteTensor { name: name.to_owned() });
        }
        Ok(tensor)
    }
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

fn map_safetensors(files: &[PathBuf]) -> Result<MmapedSafetensors, ModelError> {
    // Each alone first, so that the error can name the damaged one.
    for path in files {
        // SAFETY: the file must not be changed while it is mapped; a model folder is read-only by convention, as
        // for every user of safetensors.
        unsafe { MmapedSafetensors::new(path) }.map_err(|err| ModelError::BadFile {
            path: path.clone(),
            reason: format!("truncated or not a safetensors file ({err})"),
        })?;
    }
    // SAFETY: as above.
    Ok(unsafe { MmapedSafetensors::multi(files) }?)
}

fn open_pickle(path: &Path) -> Result<pickle::PthTensors, ModelError> {
    pickle::PthTensors::new(path, None).map_err(|err| ModelError::BadFile {
        path: path.to_owned(),
        reason: format!("truncated or not a PyTorch checkpoint ({err})"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder_with(tensor: &Tensor) -> anyhow::Result<tempfile::TempDir> {
        let dir = tempfile::tempdir()?;
        let tensors = HashMap::from([("w".to_owned(), tensor.clone())]);
        candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors"))?;
        Ok(dir)
    }

    fn error(dir: &Path, shape: &[usize]) -> String {
        let got = Weights::open(dir, DType::F32, &Device::Cpu).and_then(|w| w.get("w", shape));
        got.expect_err("damaged").to_string()
    }

    #[test]
    fn a_tensor_of_another_shape_is_refused_by_name() -> anyhow::Result<()> {
        let dir = folder_with(&Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?)?;
        let err = error(dir.path(), &[3, 2]);
        assert!(err.contains("w has shape [2, 3], config.json says [3, 2]"), "{err}");
        Ok(())
    }

    #[test]
    fn nan_is_refused() -> anyhow::Result<()> {
        let dir = folder_with(&Tensor::new(&[1f32, f32::NAN], &Device::Cpu)?)?;
        assert!(error(dir.path(), &[2]).contains("not finite"));
        Ok(())
    }

    #[test]
    fn a_truncated_file_is_named() -> anyhow::Result<()> {
        let dir = folder_with(&Tensor::zeros((20, 30), DType::F32, &Device::Cpu)?)?;
        let path = dir.path().join("model.safetensors");
        let bytes = std::fs::read(&path)?;
        for keep in [0, 4, 20, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..keep])?;
            let err = error(dir.path(), &[20, 30]);
            assert!(err.contains("model.safetensors: truncated"), "{keep} bytes: {err}");
        }
        Ok(())
    }

    #[test]
    fn an_index_that_names_a_missing_shard_says_which() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let index = dir.path().join("model.safetensors.index.json");
        std::fs::write(&index, r#"{"weight_map": {"w": "model-00001-of-00002.safetensors"}}"#)?;
        assert!(error(dir.path(), &[1]).contains("model-00001-of-00002.safetensors"));
        std::fs::write(&index, r#"{"weight_map": {"w": "../../etc/passwd"}}"#)?;
        assert!(error(dir.path(), &[1]).contains("outside the folder"));
        Ok(())
    }
}
