//! Whether a GPU has room for a model's weights: asked before the first is read.

use candle_core::{DType, Device};

use super::{Source, Weights};
use crate::{LinearKind, ModelConfig, ModelError};

impl Weights {
    /// That the device has memory for the weights of `config`. A device whose memory is not known, the CPU, is taken to
    /// have it, and so is that of tensors which lie somewhere already.
    ///
    /// # Errors
    /// It has less than they take at least, or it failed.
    pub(crate) fn check_room(&self, config: &ModelConfig) -> Result<(), ModelError> {
        match (free_memory(&self.device)?, &self.source) {
            (None, _) | (_, Source::Memory(_)) => Ok(()),
            (Some(free), _) => check(bytes_to_load(config, self.dtype), free, self.dtype),
        }
    }

    /// What is said of a failure to load the weights of `config`: a device may run out of memory all the same, since others
    /// take of it too.
    pub(crate) fn explain(&self, err: ModelError, config: &ModelConfig) -> ModelError {
        match (&err, free_memory(&self.device)) {
            (ModelError::Candle(inner), Ok(Some(free))) if says_out_of_memory(inner) => {
                no_room(bytes_to_load(config, self.dtype), free, self.dtype)
            }
            _ => err,
        }
    }
}

/// Bytes that the weights of `config` take in `dtype`, and what is added to them while the last layer is loaded: a matrix of
/// its feed-forward half once more, or widened to f32 to be looked through. Loading takes no less.
fn bytes_to_load(config: &ModelConfig, dtype: DType) -> usize {
    elements(config) * dtype.size_in_bytes()
        + config.intermediate_size * config.hidden_size * DType::F32.size_in_bytes()
}

/// Elements of all weights of the network.
fn elements(config: &ModelConfig) -> usize {
    let matrices = LinearKind::ALL.map(|kind| kind.shape(config));
    let product = |(out, input): (usize, usize)| out * input;
    let biases: usize = match config.attention_bias {
        // Of queries, keys and values, which come first.
        true => matrices[..3].iter().map(|(out, _)| out).sum(),
        false => 0,
    };
    let head_norms = if config.qk_norm { 2 * config.head_dim } else { 0 };
    let layer = matrices.map(product).iter().sum::<usize>() + biases + head_norms + 2 * config.hidden_size;
    let ends = if config.tie_word_embeddings { 1 } else { 2 };
    config.num_hidden_layers * layer + (ends * config.vocab_size + 1) * config.hidden_size
}

fn check(needed: usize, free: usize, dtype: DType) -> Result<(), ModelError> {
    match needed > free {
        true => Err(no_room(needed, free, dtype)),
        false => Ok(()),
    }
}

fn no_room(needed: usize, free: usize, dtype: DType) -> ModelError {
    let advice = match dtype {
        DType::F32 => "ask for --dtype bf16, another GPU (--device cuda:N) or --device cpu",
        _ => "ask for another GPU (--device cuda:N) or --device cpu, which takes fewest bytes with --quantize q8_0",
    };
    ModelError::NoMemoryForWeights {
        needed,
        free,
        dtype: dtype.as_str().to_owned(),
        advice,
    }
}

/// Whether the driver had no memory left. candle keeps its error as text alone.
fn says_out_of_memory(err: &candle_core::Error) -> bool {
    err.to_string()
        .to_ascii_lowercase()
        .replace('_', " ")
        .contains("out of memory")
}

/// Bytes that are free on the device, where that is known.
fn free_memory(device: &Device) -> Result<Option<usize>, ModelError> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return Ok(Some(crate::gpu::free_memory(device)?));
    }
    let _ = device;
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_those_of_the_tensors_that_the_network_takes() -> anyhow::Result<()> {
        let base = crate::testing::config();
        // Seven matrices of a layer: q and o of 32 x 32, k and v of 16 x 32, three of 48 x 32; two norms of 32; the
        // embeddings of 50 x 32 and the last norm.
        let layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32;
        assert_eq!(elements(&base), 2 * layer + 51 * 32);
        assert_eq!(bytes_to_load(&base, DType::BF16), 2 * elements(&base) + 4 * 48 * 32);
        let untied = ModelConfig {
            tie_word_embeddings: false,
            ..base.clone()
        };
        assert_eq!(elements(&untied), elements(&base) + 50 * 32);
        let more = ModelConfig {
            attention_bias: true,
            qk_norm: true,
            ..base
        };
        let tensors = crate::testing::weights(&more, DType::F32, &Device::Cpu)?;
        let Source::Memory(tensors) = &tensors.source else {
            anyhow::bail!("they are in memory")
        };
        assert_eq!(elements(&more), tensors.values().map(|t| t.elem_count()).sum::<usize>());
        Ok(())
    }

    #[test]
    fn a_7b_fits_a_card_of_24_gb_in_16_bits_and_not_in_32() {
        let vicuna = ModelConfig {
            vocab_size: 32_000,
            hidden_size: 4096,
            intermediate_size: 11_008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: 32,
            head_dim: 128,
            tie_word_embeddings: false,
            ..crate::testing::config()
        };
        // The parameters of Llama-7B.
        assert_eq!(elements(&vicuna), 6_738_415_616);
        let free = 24_000_000_000;
        check(bytes_to_load(&vicuna, DType::BF16), free, DType::BF16).expect("13.7 GB");
        let err = check(bytes_to_load(&vicuna, DType::F32), free, DType::F32).expect_err("27.1 GB");
        assert_eq!(
            err.to_string(),
            "the weights need 27134017536 bytes in f32, the device has 24000000000 free: ask for --dtype bf16, another GPU \
             (--device cuda:N) or --device cpu"
        );
        let err = check(101, 100, DType::F16).expect_err("a byte too many").to_string();
        assert!(err.contains("--quantize q8_0") && !err.contains("--dtype"), "{err}");
        check(100, 100, DType::F16).expect("just enough");
    }

    #[test]
    fn the_drivers_words_are_known_and_others_are_kept() -> anyhow::Result<()> {
        let of = |text: &str| candle_core::Error::Msg(text.to_owned());
        assert!(says_out_of_memory(&of(
            r#"DriverError(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")"#
        )));
        assert!(!says_out_of_memory(&of("shape mismatch")));
        // On the CPU nothing is known of memory.
        let config = crate::testing::config();
        let weights = crate::testing::weights(&config, DType::F32, &Device::Cpu)?;
        weights.check_room(&config)?;
        let err = weights.explain(ModelError::Candle(of("out of memory")), &config);
        assert!(matches!(err, ModelError::Candle(_)));
        Ok(())
    }
}
