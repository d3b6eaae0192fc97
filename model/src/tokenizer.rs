//! Text to tokens and back, through Hugging Face's `tokenizers`.

mod protobuf;
mod sentencepiece;

use std::path::Path;

use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer};

use crate::{ModelConfig, ModelError};

/// A model's tokenizer and the tokens that end its answers.
#[derive(Debug, Clone)]
pub struct ModelTokenizer {
    inner: Tokenizer,
    eos: Vec<u32>,
}

impl ModelTokenizer {
    /// Reads `tokenizer.json` of a model folder, or SentencePiece's `tokenizer.model` where that is all there is.
    ///
    /// # Errors
    /// It is missing or malformed, or has tokens that the model has no embedding for.
    pub fn from_folder(folder: &Path, config: &ModelConfig) -> Result<Self, ModelError> {
        let settings = tokenizer_config(folder)?;
        let fast = folder.join("tokenizer.json");
        let slow = folder.join("tokenizer.model");
        let path = if fast.is_file() || !slow.is_file() {
            &fast
        } else {
            &slow
        };
        let bad = |reason: String| ModelError::BadFile {
            path: path.clone(),
            reason,
        };
        if !path.is_file() {
            return Err(bad(
                "the model folder has no tokenizer.json and no tokenizer.model".to_owned()
            ));
        }
        let bytes = std::fs::read(path).map_err(|err| bad(err.to_string()))?;
        let inner = if path == &fast {
            Tokenizer::from_bytes(&bytes).map_err(|err| bad(format!("not a tokenizer ({err})")))?
        } else {
            sentencepiece::tokenizer(&bytes, &sentencepiece_options(folder, &settings)?).map_err(bad)?
        };
        let mut tokenizer = Self::new(inner, config).map_err(|err| match err {
            ModelError::Tokenizer { reason } => bad(reason),
            other => other,
        })?;
        if config.eos_token_ids.is_empty() {
            // The config names no end; then the tokenizer's own ends an answer.
            let named = special_token(&settings, "eos_token").and_then(|text| tokenizer.inner.token_to_id(&text));
            tokenizer.eos = named.map_or(tokenizer.eos, |id| vec![id]);
        }
        Ok(tokenizer)
    }

    /// Reads the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// They are malformed, or name tokens that the model has no embedding for.
    pub fn from_bytes(bytes: &[u8], config: &ModelConfig) -> Result<Self, ModelError> {
        Self::new(Tokenizer::from_bytes(bytes).map_err(failed)?, config)
    }

    /// Wraps a tokenizer; the config says which tokens end an answer, else `</s>` does.
    ///
    /// # Errors
    /// It has tokens that the model has no embedding for.
    pub fn new(mut inner: Tokenizer, config: &ModelConfig) -> Result<Self, ModelError> {
        // A file may ask for padding or truncation; lengths are counted here, so neither may happen.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(failed)?;
        let highest = inner.get_vocab(true).into_values().max().unwrap_or(0);
        if highest as usize >= config.vocab_size {
            let reason = format!(
                "token {highest} is outside the model's vocabulary of {}",
                config.vocab_size
            );
            return Err(ModelError::Tokenizer { reason });
        }
        let mut eos = config.eos_token_ids.clone();
        if eos.is_empty() {
            eos.extend(inner.token_to_id("</s>"));
        }
        Ok(Self { inner, eos })
    }

    /// The tokens of a text. `add_special_tokens` puts the beginning-of-sequence token in front where the tokenizer
    /// has that rule.
    ///
    /// # Errors
    /// The tokenizer failed.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, ModelError> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(failed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, special ones left out.
    ///
    /// # Errors
    /// The tokenizer failed.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, ModelError> {
        self.inner.decode(tokens, true).map_err(failed)
    }

    /// Any of these ends an answer.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The text of a token.
    pub fn token_text(&self, token: u32) -> Option<String> {
        self.inner.id_to_token(token)
    }
}

/// `tokenizer_config.json` of a folder, null where there is none.
pub(crate) fn tokenizer_config(folder: &Path) -> Result<Value, ModelError> {
    let path = folder.join("tokenizer_config.json");
    match std::fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).map_err(|err| ModelError::BadFile {
            path,
            reason: format!("malformed ({err})"),
        }),
        Err(_) => Ok(Value::Null),
    }
}

/// The text of `bos_token` or `eos_token`; older files write `{"content": "<s>", ...}`.
pub(crate) fn special_token(settings: &Value, name: &str) -> Option<String> {
    let value = &settings[name];
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_owned)
}

/// What tokenizer_config.json and added_tokens.json say about a `tokenizer.model`.
fn sentencepiece_options(folder: &Path, settings: &Value) -> Result<sentencepiece::Options, ModelError> {
    let path = folder.join("added_tokens.json");
    let bad = |reason: String| ModelError::BadFile {
        path: path.clone(),
        reason,
    };
    let mut added = std::collections::BTreeMap::new();
    if let Ok(text) = std::fs::read_to_string(&path) {
        let ids: std::collections::HashMap<String, u32> =
            serde_json::from_str(&text).map_err(|err| bad(format!("malformed ({err})")))?;
        added.extend(ids.into_iter().map(|(text, id)| (id, AddedToken::from(text, true))));
    }
    for (id, token) in settings["added_tokens_decoder"].as_object().into_iter().flatten() {
        if let (Ok(id), Some(text)) = (id.parse(), token["content"].as_str()) {
            let special = token["special"].as_bool().unwrap_or(false);
            added.insert(id, AddedToken::from(text.to_owned(), special).normalized(false));
        }
    }
    Ok(sentencepiece::Options {
        legacy: settings["legacy"].as_bool().unwrap_or(true),
        add_bos_token: settings["add_bos_token"].as_bool().unwrap_or(true),
        added: added.into_iter().collect(),
    })
}

fn failed(err: tokenizers::Error) -> ModelError {
    ModelError::Tokenizer {
        reason: err.to_string(),
    }
}

#[cfg(test)]
mod tests;
