//! Text to tokens and back, through Hugging Face's `tokenizers`.

use std::path::Path;

use tokenizers::Tokenizer;

use crate::{ModelConfig, ModelError};

/// A model's tokenizer and the tokens that end its answers.
#[derive(Debug, Clone)]
pub struct ModelTokenizer {
    inner: Tokenizer,
    eos: Vec<u32>,
}

impl ModelTokenizer {
    /// Reads `tokenizer.json` of a model folder.
    ///
    /// # Errors
    /// It is missing or malformed, or has tokens that the model has no embedding for.
    pub fn from_folder(folder: &Path, config: &ModelConfig) -> Result<Self, ModelError> {
        let path = folder.join("tokenizer.json");
        let bad = |reason: String| ModelError::BadFile { path: path.clone(), reason };
        if !path.is_file() {
            return Err(bad("the model folder has no tokenizer.json".to_owned()));
        }
        let inner = Tokenizer::from_file(&path).map_err(|err| bad(format!("not a tokenizer ({err})")))?;
        Self::new(inner, config).map_err(|err| bad(err.to_string()))
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
            let reason = format!("token {highest} is outside the model's vocabulary of {}", config.vocab_size);
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

    /// Whether encoding with special tokens puts one in front.
    pub(crate) fn adds_bos(&self) -> bool {
        self.encode("", true).is_ok_and(|ids| !ids.is_empty())
    }
}

fn failed(err: tokenizers::Error) -> ModelError {
    ModelError::Tokenizer { reason: err.to_string() }
}
