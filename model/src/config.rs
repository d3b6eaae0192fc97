//! `config.json`: the settings of a model, under their Hugging Face names.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::ModelError;

/// `model_type`s of the networks that one code runs.
const SUPPORTED: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// How positions beyond the trained context are squeezed into it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// All frequencies divided by `factor`.
    Linear {
        /// How much longer the context becomes.
        factor: f64,
    },
    /// Low frequencies divided, high ones kept, those between blended (Llama 3.1).
    Llama3 {
        /// How much longer the context becomes.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The trained context, in tokens.
        original_max_position_embeddings: f64,
    },
}

/// A model's settings.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub struct ModelConfig {
    pub model_type: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub max_position_embeddings: usize,
    pub tie_word_embeddings: bool,
    /// Whether q, k and v projections have a bias (Qwen2).
    pub attention_bias: bool,
    /// Whether each head of queries and keys is normalised (Qwen3).
    pub qk_norm: bool,
    /// A token sees itself and at most this many less one before it (Mistral).
    pub sliding_window: Option<usize>,
    pub bos_token_id: Option<u32>,
    /// Any of these ends a response; from config.json and generation_config.json.
    pub eos_token_ids: Vec<u32>,
    /// The checkpoint's dtype: `float32`, `bfloat16` or `float16`.
    pub dtype: Option<String>,
}

/// config.json as it is written.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<Map<String, Value>>,
    /// Where newer transformers put theta and scaling.
    rope_parameters: Option<Map<String, Value>>,
    #[serde(default = "default_positions")]
    max_position_embeddings: usize,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    #[serde(default)]
    bos_token_id: Option<u32>,
    #[serde(default)]
    eos_token_id: Option<Eos>,
    hidden_act: Option<String>,
    dtype: Option<String>,
    /// The name before transformers 5; some files carry both.
    torch_dtype: Option<String>,
}

fn default_eps() -> f64 {
    1e-6
}

fn default_positions() -> usize {
    2048
}

#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum Eos {
    One(u32),
    Many(Vec<u32>),
}

impl Eos {
    fn ids(self) -> Vec<u32> {
        match self {
            Self::One(id) => vec![id],
            Self::Many(ids) => ids,
        }
    }
}

impl ModelConfig {
    /// Reads `config.json` and, where there is one, `generation_config.json` of a model folder.
    ///
    /// # Errors
    /// A missing or malformed file, an unsupported architecture, sizes that cannot be.
    pub fn from_folder(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let bad = |reason: String| ModelError::BadFile {
            path: path.clone(),
            reason,
        };
        let text = std::fs::read_to_string(&path).map_err(|err| bad(format!("not a model folder ({err})")))?;
        let mut config = Self::from_json(&text).map_err(|err| match err {
            ModelError::BadConfig { reason } => bad(reason),
            other => other,
        })?;
        let generation = crate::generation::read(folder)?;
        if let Some(Ok(eos)) = generation.get("eos_token_id").map(Eos::deserialize) {
            config.eos_token_ids.extend(eos.ids());
            config.eos_token_ids.sort_unstable();
            config.eos_token_ids.dedup();
        }
        Ok(config)
    }

    /// Reads the text of a config.json.
    ///
    /// # Errors
    /// Malformed JSON, an unsupported architecture, sizes that cannot be.
    pub fn from_json(text: &str) -> Result<Self, ModelError> {
        let bad = |reason: String| ModelError::BadConfig { reason };
        let value: Value = serde_json::from_str(text).map_err(|err| bad(format!("malformed: {err}")))?;
        // The architecture first: another one may lack the sizes too, and its name is the better message.
        let model_type = match (value.get("model_type"), value.pointer("/architectures/0")) {
            (Some(Value::String(name)), _) | (None, Some(Value::String(name))) => name.clone(),
            _ => return Err(bad("it has no model_type".to_owned())),
        };
        let family = model_type.trim_end_matches("ForCausalLM").to_lowercase();
        if !SUPPORTED.contains(&family.as_str()) {
            let supported = SUPPORTED.join(", ");
            return Err(ModelError::UnsupportedArchitecture {
                got: model_type,
                supported,
            });
        }
        let raw: Raw = serde_json::from_value(value).map_err(|err| bad(err.to_string()))?;
        Self::from_raw(raw, &family)
    }

    fn from_raw(raw: Raw, family: &str) -> Result<Self, ModelError> {
        let rope = raw.rope_parameters.as_ref();
        let theta = rope.and_then(|p| p.get("rope_theta")).and_then(Value::as_f64);
        let scaling = raw.rope_scaling.as_ref().or(rope);
        let windowed = is_windowed(&raw, family)?;
        let config = Self {
            model_type: raw.model_type.unwrap_or_else(|| family.to_owned()),
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: raw.num_attention_heads,
            num_key_value_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            head_dim: raw.head_dim.unwrap_or(raw.hidden_size / raw.num_attention_heads.max(1)),
            rms_norm_eps: raw.rms_norm_eps,
            rope_theta: theta.or(raw.rope_theta).unwrap_or(10_000.0),
            rope_scaling: scaling.map_or(Ok(RopeScaling::None), parse_scaling)?,
            max_position_embeddings: raw.max_position_embeddings,
            tie_word_embeddings: raw.tie_word_embeddings,
            attention_bias: family == "qwen2" || raw.attention_bias,
            qk_norm: family == "qwen3",
            sliding_window: raw.sliding_window.filter(|_| windowed),
            bos_token_id: raw.bos_token_id,
            eos_token_ids: raw.eos_token_id.map(Eos::ids).unwrap_or_default(),
            dtype: raw.dtype.or(raw.torch_dtype),
        };
        if let Some(act) = raw.hidden_act.filter(|act| act != "silu") {
            let reason = format!("hidden_act {act} is not supported; supported is silu");
            return Err(ModelError::BadConfig { reason });
        }
        if raw.mlp_bias || (raw.attention_bias && family != "qwen2") {
            let reason = "attention_bias and mlp_bias are supported for qwen2's q, k and v only".to_owned();
            return Err(ModelError::BadConfig { reason });
        }
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ModelError> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ];
        if let Some((name, _)) = sizes.iter().find(|(_, size)| *size == 0) {
            return Err(ModelError::BadConfig {
                reason: format!("{name} is 0"),
            });
        }
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv) {
            let reason = format!("{heads} attention heads cannot share {kv} key/value heads");
            return Err(ModelError::BadConfig { reason });
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::BadConfig {
                reason: format!("head_dim is {}, it must be even", self.head_dim),
            });
        }
        Ok(())
    }

    /// The config.json that reads back as this config.
    pub fn to_json(&self) -> String {
        let architecture = match self.model_type.as_str() {
            "mistral" => "MistralForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            _ => "LlamaForCausalLM",
        };
        let value = serde_json::json!({
            "architectures": [architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling_json(&self.rope_scaling),
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "sliding_window": self.sliding_window,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_ids,
            "torch_dtype": self.dtype,
        });
        serde_json::to_string_pretty(&value).expect("plain data is serialisable") + "\n"
    }
}

/// Whether the window of the config is in force. Qwen configs carry one that only `use_sliding_window` switches on,
/// and only for the layers from `max_window_layers` on; the others have always used theirs on every layer.
fn is_windowed(raw: &Raw, family: &str) -> Result<bool, ModelError> {
    if !family.starts_with("qwen") {
        return Ok(family == "mistral");
    }
    let full_layers = raw.max_window_layers.unwrap_or(0);
    match raw.use_sliding_window.unwrap_or(false) {
        true if full_layers == 0 => Ok(true),
        true if full_layers < raw.num_hidden_layers => Err(ModelError::BadConfig {
            reason: format!("a sliding window on layers from {full_layers} on only is not supported"),
        }),
        _ => Ok(false),
    }
}

fn parse_scaling(map: &Map<String, Value>) -> Result<RopeScaling, ModelError> {
    let kind = map
        .get("rope_type")
        .or_else(|| map.get("type"))
        .and_then(Value::as_str)
        .unwrap_or("default");
    let number = |name: &str| {
        let value = map.get(name).and_then(Value::as_f64).filter(|v| *v > 0.0);
        value.ok_or_else(|| ModelError::BadConfig {
            reason: format!("rope_scaling of type {kind} needs {name}"),
        })
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear {
            factor: number("factor")?,
        }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position_embeddings: number("original_max_position_embeddings")?,
        }),
        other => Err(ModelError::BadConfig {
            reason: format!("rope_scaling of type {other} is not supported; supported are default, linear, llama3"),
        }),
    }
}

fn scaling_json(scaling: &RopeScaling) -> Value {
    match *scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => serde_json::json!({"rope_type": "linear", "factor": factor}),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            serde_json::json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            })
        }
    }
}

#[cfg(test)]
mod tests;
