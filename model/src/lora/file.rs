//! PEFT's files: `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::adapter::peft_name;
use super::{Adapter, LinearKind, LoraConfig, LoraPair};
use crate::{ModelConfig, ModelError, save_tensors};

/// The keys of `adapter_config.json` that matter; PEFT fills in the rest.
#[derive(Debug, Serialize, Deserialize)]
struct AdapterFile {
    /// Older versions of PEFT do not know it: it is written where it says something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    alora_invocation_tokens: Option<Vec<u32>>,
    base_model_name_or_path: Option<String>,
    #[serde(default = "none")]
    bias: String,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default = "yes")]
    inference_mode: bool,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    peft_type: String,
    r: usize,
    target_modules: Targets,
    #[serde(default)]
    task_type: Option<String>,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    use_rslora: bool,
    #[serde(flatten, skip_serializing)]
    other: Map<String, Value>,
}

/// Settings beyond those above that change what the adapter computes, and are not supported.
const UNSUPPORTED: [&str; 7] = [
    "alpha_pattern",
    "rank_pattern",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
];

fn none() -> String {
    "none".to_owned()
}

fn yes() -> bool {
    true
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
enum Targets {
    List(Vec<String>),
    Name(String),
}

impl Adapter {
    /// Reads a folder that PEFT or [`Adapter::save`] wrote; the factors become f32.
    ///
    /// # Errors
    /// A missing or malformed file, a kind of adapter that is not supported, or one made for another model.
    pub fn load(folder: &Path, model: &ModelConfig, device: &Device) -> Result<Self, ModelError> {
        let mismatch = |reason: String| ModelError::AdapterMismatch {
            reason: format!("{}: {reason}", folder.display()),
        };
        let path = folder.join("adapter_config.json");
        let text = fs::read_to_string(&path).map_err(|err| {
            mismatch(format!(
                "not a PEFT adapter folder, {} cannot be read ({err})",
                path.display()
            ))
        })?;
        let file: AdapterFile =
            serde_json::from_str(&text).map_err(|err| mismatch(format!("adapter_config.json is malformed: {err}")))?;
        let config = file.into_config().map_err(mismatch)?;
        let path = folder.join("adapter_model.safetensors");
        if !path.is_file() {
            return Err(mismatch("adapter_model.safetensors is missing".to_owned()));
        }
        let tensors = candle_core::safetensors::load(&path, device)
            .map_err(|err| mismatch(format!("adapter_model.safetensors cannot be read: {err}")))?;
        let pairs = pairs(tensors, &config, model).map_err(mismatch)?;
        Ok(Self::from_parts(config, pairs))
    }

    /// Writes the folder in PEFT's format; each file is written beside and renamed.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn save(&self, folder: &Path, base_model: &str) -> Result<(), ModelError> {
        let io = |err: std::io::Error| ModelError::Io {
            path: folder.to_owned(),
            source: err,
        };
        fs::create_dir_all(folder).map_err(io)?;
        let config = self.config();
        let names = config
            .target_modules
            .kinds()
            .iter()
            .map(|k| k.name().to_owned())
            .collect();
        let invocation = &config.invocation_tokens;
        let file = AdapterFile {
            alora_invocation_tokens: (!invocation.is_empty()).then(|| invocation.clone()),
            base_model_name_or_path: Some(base_model.to_owned()),
            bias: none(),
            fan_in_fan_out: false,
            inference_mode: true,
            lora_alpha: config.lora_alpha,
            lora_dropout: config.lora_dropout,
            peft_type: "LORA".to_owned(),
            r: config.r,
            target_modules: Targets::List(names),
            task_type: Some("CAUSAL_LM".to_owned()),
            use_dora: false,
            use_rslora: config.use_rslora,
            other: Map::new(),
        };
        let json = serde_json::to_string_pretty(&file).expect("plain data is serialisable");
        // The config goes last: a folder that has it is whole.
        let tensors: HashMap<String, Tensor> = self.tensors().into_iter().collect();
        let beside = folder.join("adapter_model.safetensors.tmp");
        save_tensors(&tensors, &beside)?;
        fs::rename(&beside, folder.join("adapter_model.safetensors")).map_err(io)?;
        let beside = folder.join("adapter_config.json.tmp");
        fs::write(&beside, json + "\n").map_err(io)?;
        fs::rename(&beside, folder.join("adapter_config.json")).map_err(io)
    }
}

impl AdapterFile {
    fn into_config(self) -> Result<LoraConfig, String> {
        if self.peft_type != "LORA" {
            return Err(format!("peft_type is {}, only LORA is supported", self.peft_type));
        }
        if self.use_dora || self.fan_in_fan_out || self.bias != "none" {
            return Err("use_dora, fan_in_fan_out and a bias other than \"none\" are not supported".to_owned());
        }
        let is_set = |value: &Value| match value {
            Value::Null | Value::Bool(false) => false,
            Value::Object(map) => !map.is_empty(),
            _ => true,
        };
        if let Some(key) = UNSUPPORTED.iter().find(|key| self.other.get(**key).is_some_and(is_set)) {
            return Err(format!("{key} is not supported, adapter_config.json sets it"));
        }
        if self.r == 0 {
            return Err("r is 0, it must be at least 1".to_owned());
        }
        let target_modules = match self.target_modules {
            Targets::Name(name) => name.parse()?,
            // Made with `all-linear` they are full paths, `model.layers.0.self_attn.q_proj`. That every layer has each
            // of them is seen when the tensors are read.
            Targets::List(names) => {
                let last: Vec<_> = names.iter().filter_map(|name| name.rsplit('.').next()).collect();
                last.join(",").parse()?
            }
        };
        Ok(LoraConfig {
            r: self.r,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            use_rslora: self.use_rslora,
            target_modules,
            invocation_tokens: self.alora_invocation_tokens.unwrap_or_default(),
        })
    }
}

type Pairs = BTreeMap<(usize, LinearKind), LoraPair>;

/// Sorts the tensors of a file into pairs; every one must be there, of the right shape, finite, and none left over.
fn pairs(mut tensors: HashMap<String, Tensor>, config: &LoraConfig, model: &ModelConfig) -> Result<Pairs, String> {
    let mut take = |name: String, shape: (usize, usize)| {
        let tensor = tensors.remove(&name).ok_or_else(|| {
            format!("{name} is missing: it was made for another model, or for some layers only, which is not supported")
        })?;
        if tensor.dims() != [shape.0, shape.1] {
            let got = tensor.dims();
            return Err(format!(
                "{name} is {got:?}, this model takes {shape:?}: it was made for another model"
            ));
        }
        let tensor = tensor.to_dtype(DType::F32).map_err(|err| format!("{name}: {err}"))?;
        let sum = tensor
            .abs()
            .and_then(|t| t.sum_all())
            .and_then(|t| t.to_scalar::<f32>());
        match sum {
            Ok(sum) if sum.is_finite() => Ok(tensor),
            _ => Err(format!("{name} holds a value that is not finite")),
        }
    };
    let mut pairs = BTreeMap::new();
    for layer in 0..model.num_hidden_layers {
        for &kind in config.target_modules.kinds() {
            let (out, input) = kind.shape(model);
            let a = take(peft_name(layer, kind, 'A'), (config.r, input))?;
            let b = take(peft_name(layer, kind, 'B'), (out, config.r))?;
            pairs.insert((layer, kind), LoraPair::new(a, b));
        }
    }
    match tensors.keys().min() {
        Some(name) => Err(format!(
            "{name} has no place in this model: it was made for another model"
        )),
        None => Ok(pairs),
    }
}
