//! `length_head.json` and `length_head.safetensors`, beside PEFT's files in an adapter's folder.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::{BIAS, LengthBins, LengthHead, LengthHeadConfig, WEIGHT};
use crate::{ModelError, save_tensors, without_backtrace};

const CONFIG_FILE: &str = "length_head.json";
const WEIGHTS_FILE: &str = "length_head.safetensors";
/// The version that this program writes, and the only one so far.
const VERSION: u32 = 1;
/// The only kind so far: a linear layer on the last hidden state.
const KIND: &str = "linear";

/// The keys of `length_head.json`.
#[derive(Debug, Serialize, Deserialize)]
struct HeadFile {
    version: u32,
    kind: String,
    hidden_size: usize,
    /// Largest length of each bin, in tokens; the last is the cap.
    bin_edges: LengthBins,
    asks_length: bool,
    smoothing: f64,
    samples: u32,
    temperature: f64,
    point_probability: f64,
}

impl HeadFile {
    fn check(&self, hidden_size: usize) -> Result<(), String> {
        if self.version != VERSION || self.kind != KIND {
            let (version, kind) = (self.version, &self.kind);
            return Err(format!(
                "version {version} of kind \"{kind}\"; this program reads version {VERSION} of kind \"{KIND}\""
            ));
        }
        if self.hidden_size != hidden_size {
            let got = self.hidden_size;
            return Err(format!(
                "hidden_size is {got}, this model's is {hidden_size}: it was made for another model"
            ));
        }
        let probable = self.point_probability > 0.0 && self.point_probability < 1.0;
        let positive = self.temperature > 0.0 && self.temperature.is_finite();
        match probable && positive && self.samples > 0 {
            true => Ok(()),
            false => Err("temperature and samples must be above 0, and point_probability between 0 and 1".to_owned()),
        }
    }
}

impl LengthHead {
    /// Whether an adapter's folder has a head.
    pub fn is_in(folder: &Path) -> bool {
        [CONFIG_FILE, WEIGHTS_FILE]
            .iter()
            .any(|name| folder.join(name).is_file())
    }

    /// Reads the head of an adapter's folder, made for a model with hidden states of `hidden_size`.
    ///
    /// # Errors
    /// A missing or damaged file, or a head made for another model.
    pub fn load(folder: &Path, hidden_size: usize, device: &Device) -> Result<Self, ModelError> {
        let path = folder.join(CONFIG_FILE);
        let text = fs::read_to_string(&path).map_err(io(&path))?;
        let file: HeadFile = serde_json::from_str(&text).map_err(|err| bad(&path, format!("malformed: {err}")))?;
        file.check(hidden_size).map_err(|reason| bad(&path, reason))?;
        let path = folder.join(WEIGHTS_FILE);
        let bytes = fs::read(&path).map_err(io(&path))?;
        let mut tensors =
            candle_core::safetensors::load_buffer(&bytes, device).map_err(|err| bad(&path, unread(err)))?;
        let bins = file.bin_edges.len();
        let mut take = |name, shape: &[usize]| take(&mut tensors, name, shape).map_err(|reason| bad(&path, reason));
        Ok(Self {
            weight: take(WEIGHT, &[bins, hidden_size])?,
            bias: take(BIAS, &[bins])?,
            config: LengthHeadConfig {
                bins: file.bin_edges,
                asks_length: file.asks_length,
                smoothing: file.smoothing,
                samples: file.samples,
                temperature: file.temperature,
                point_probability: file.point_probability,
            },
        })
    }

    /// Writes both files; each is written beside and renamed.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn save(&self, folder: &Path) -> Result<(), ModelError> {
        fs::create_dir_all(folder).map_err(io(folder))?;
        let config = &self.config;
        let file = HeadFile {
            version: VERSION,
            kind: KIND.to_owned(),
            hidden_size: self.weight.dim(1)?,
            bin_edges: config.bins.clone(),
            asks_length: config.asks_length,
            smoothing: config.smoothing,
            samples: config.samples,
            temperature: config.temperature,
            point_probability: config.point_probability,
        };
        let tensors: HashMap<String, Tensor> = self.tensors().into_iter().collect();
        let beside = folder.join("length_head.safetensors.tmp");
        save_tensors(&tensors, &beside)?;
        fs::rename(&beside, folder.join(WEIGHTS_FILE)).map_err(io(folder))?;
        let json = serde_json::to_string_pretty(&file).expect("plain data is serialisable");
        let beside = folder.join("length_head.json.tmp");
        fs::write(&beside, json + "\n").map_err(io(&beside))?;
        fs::rename(&beside, folder.join(CONFIG_FILE)).map_err(io(folder))
    }

    /// Takes the head out of a folder, where there is one: an adapter without a head is to be put there.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn remove(folder: &Path) -> Result<(), ModelError> {
        for path in [CONFIG_FILE, WEIGHTS_FILE].map(|name| folder.join(name)) {
            if path.is_file() {
                fs::remove_file(&path).map_err(io(&path))?;
            }
        }
        Ok(())
    }
}

fn take(tensors: &mut HashMap<String, Tensor>, name: &str, shape: &[usize]) -> Result<Tensor, String> {
    let tensor = tensors.remove(name).ok_or_else(|| format!("{name} is missing"))?;
    if tensor.dims() != shape {
        return Err(format!(
            "{name} is {:?}, length_head.json says {shape:?}",
            tensor.dims()
        ));
    }
    let tensor = tensor.to_dtype(DType::F32).map_err(unread)?;
    let sum = tensor
        .abs()
        .and_then(|t| t.sum_all())
        .and_then(|t| t.to_scalar::<f32>());
    match sum {
        Ok(sum) if sum.is_finite() => Ok(tensor),
        _ => Err(format!("{name} holds a value that is not finite")),
    }
}

fn unread(err: candle_core::Error) -> String {
    format!("cannot be read: {}", without_backtrace(err))
}

fn bad(path: &Path, reason: String) -> ModelError {
    ModelError::BadFile {
        path: PathBuf::from(path),
        reason,
    }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> ModelError {
    move |source| ModelError::Io {
        path: path.to_owned(),
        source,
    }
}
