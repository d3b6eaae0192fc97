//! The model folder in Hugging Face layout.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::{DType, Tensor};
use lengthwise_model::{ModelConfig, save_tensors};
use tokenizers::Tokenizer;

use super::PretrainError;
use crate::language_tokenizer::{BOS, CHAT_TEMPLATE, EOS, PAD};

/// Writes config.json, generation_config.json, tokenizer.json, tokenizer_config.json and model.safetensors (f16).
pub(super) fn write(
    folder: &Path,
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    parameters: &BTreeMap<String, Tensor>,
) -> Result<(), PretrainError> {
    let write = |name: &str, text: String| {
        let path = folder.join(name);
        fs::write(&path, text).map_err(|source| PretrainError::Io {
            path: path.display().to_string(),
            source,
        })
    };
    write("config.json", config.to_json())?;
    let generation = serde_json::json!({"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_ids});
    write("generation_config.json", format!("{generation:#}\n"))?;
    let tokenizer_config = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": true,
        "model_max_length": config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    });
    write("tokenizer_config.json", format!("{tokenizer_config:#}\n"))?;
    write(
        "tokenizer.json",
        tokenizer.to_string(true).map_err(PretrainError::Encode)? + "\n",
    )?;
    let half = |(name, tensor): (&String, &Tensor)| Ok((name.clone(), tensor.to_dtype(DType::F16)?.detach()));
    let tensors: HashMap<String, Tensor> = parameters.iter().map(half).collect::<candle_core::Result<_>>()?;
    Ok(save_tensors(&tensors, &folder.join("model.safetensors"))?)
}
