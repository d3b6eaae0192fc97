//! What can be wrong with a model, its files or what it is asked.

use std::path::PathBuf;

/// Every cause names what was found and what was wanted.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// `--model` names nothing that can be found.
    #[error("model \"{spec}\": {reason}")]
    NotFound {
        /// What was asked for.
        spec: String,
        /// Where it was looked for.
        reason: String,
    },
    /// `--model` names a model of the hub that cannot be had.
    #[error(transparent)]
    Hub(#[from] crate::HubError),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of the model is not what it should be.
    #[error("{}: {reason}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// config.json names an architecture that is not there.
    #[error("architecture {got} is not supported; supported are {supported}")]
    UnsupportedArchitecture {
        /// The name in config.json.
        got: String,
        /// Those that are.
        supported: String,
    },
    /// A value in config.json cannot be.
    #[error("config.json: {reason}")]
    BadConfig {
        /// Which and why.
        reason: String,
    },
    /// The weights lack a tensor.
    #[error("tensor {name} is missing from the weights")]
    MissingTensor {
        /// Its Hugging Face name.
        name: String,
    },
    /// A tensor's shape is not what config.json says.
    #[error("tensor {name} has shape {got:?}, config.json says {want:?}")]
    ShapeMismatch {
        /// Its Hugging Face name.
        name: String,
        /// The shape found.
        got: Vec<usize>,
        /// The shape that follows from config.json.
        want: Vec<usize>,
    },
    /// A tensor of a quantised checkpoint, say.
    #[error("tensor {name} has dtype {dtype}; supported are f32, f16, bf16 and f64")]
    UnsupportedDType {
        /// Its Hugging Face name.
        name: String,
        /// The dtype found.
        dtype: String,
    },
    /// Quantised weights on a device or in a dtype that has no kernel for them.
    #[error(
        "quantised weights run on the cpu in f32, not on {device} in {dtype}: leave --quantize, --device or --dtype out"
    )]
    QuantizationUnsupported {
        /// The device asked for.
        device: String,
        /// The dtype that everything else would have.
        dtype: String,
    },
    /// A tensor holds NaN or infinity.
    #[error("tensor {name} holds a value that is not finite: the file is damaged, or the dtype too narrow for it")]
    NonFiniteTensor {
        /// Its Hugging Face name.
        name: String,
    },
    /// An adapter does not fit the model or is of an unsupported kind.
    #[error("adapter {reason}")]
    AdapterMismatch {
        /// Which file and why.
        reason: String,
    },
    /// More tokens than the model has positions.
    #[error("prompt has {got} tokens, the model takes at most {max}")]
    PromptTooLong {
        /// Its tokens.
        got: usize,
        /// Positions of the model.
        max: usize,
    },
    /// A token id that the model has no embedding for.
    #[error("token {token} is outside the model's vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        token: u32,
        /// Ids are below this.
        vocab_size: usize,
    },
    /// A sequence's blocks do not hold its new tokens.
    #[error("a sequence of {needed} tokens has cache blocks for {capacity}")]
    BlockTableTooShort {
        /// Tokens it grows to.
        needed: usize,
        /// Tokens its blocks hold.
        capacity: usize,
    },
    /// The tokenizer failed.
    #[error("tokenizer: {reason}")]
    Tokenizer {
        /// What it said.
        reason: String,
    },
    /// The chat template failed.
    #[error("chat template: {reason}")]
    Template {
        /// What it said.
        reason: String,
    },
    /// A KV cache in a dtype that nothing here runs with such weights.
    #[error(
        "a KV cache in {cache} does not go with weights in {weights} on this device: leave --kv-cache-dtype out (f16 goes with \
         f32 weights on the cpu)"
    )]
    CacheDTypeUnsupported {
        /// The dtype asked for.
        cache: &'static str,
        /// That of the weights.
        weights: &'static str,
    },
    /// The device cannot hold the KV cache.
    #[error("the KV cache needs {needed} bytes, the device has {free} free: ask for fewer tokens (--kv-cache-tokens)")]
    NoMemory {
        /// Bytes of the cache.
        needed: usize,
        /// Bytes that are free.
        free: usize,
    },
    /// The device cannot hold the weights.
    #[error("the weights need {needed} bytes in {dtype}, the device has {free} free: {advice}")]
    NoMemoryForWeights {
        /// Bytes that loading them takes at least.
        needed: usize,
        /// Bytes that are free.
        free: usize,
        /// The dtype that they are to have.
        dtype: String,
        /// What may help.
        advice: &'static str,
    },
    /// Every logit is NaN or infinite.
    #[error("the model's logits are not finite: the weights are damaged, or the dtype is too narrow for them")]
    NonFiniteLogits,
    /// candle failed.
    #[error(transparent)]
    Candle(candle_core::Error),
}

impl From<candle_core::Error> for ModelError {
    fn from(err: candle_core::Error) -> Self {
        Self::Candle(without_backtrace(err))
    }
}

/// The error in one line: candle writes a backtrace behind it where RUST_BACKTRACE is set.
pub fn without_backtrace(err: candle_core::Error) -> candle_core::Error {
    use candle_core::Error;
    match err {
        Error::WithBacktrace { inner, .. } => without_backtrace(*inner),
        Error::WithPath { inner, path } => Error::WithPath {
            inner: Box::new(without_backtrace(*inner)),
            path,
        },
        err => err,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_of_candle_is_one_line() {
        let traced = |inner: candle_core::Error| candle_core::Error::WithBacktrace {
            inner: Box::new(inner),
            backtrace: Box::new(std::backtrace::Backtrace::force_capture()),
        };
        let err = traced(traced(candle_core::Error::Msg("no driver".to_owned())).with_path("a.bin"));
        assert!(err.to_string().lines().count() > 1);
        assert_eq!(ModelError::from(err).to_string(), "path: \"a.bin\" no driver");
    }
}
