//! How much an engine may hold and do at once.

use lengthwise_core::DecodeError;
use lengthwise_model::{BLOCK_TOKENS, DTypeChoice, KvCache, Llama, kv_bytes_per_token, tokens_that_fit};

use crate::probes::MOST_PROBES;

/// How much the engine may hold and do at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// What the KV cache may hold.
    pub kv_budget: KvBudget,
    /// Its dtype; `Auto` is the weights' own.
    pub kv_dtype: DTypeChoice,
    /// Most prompt tokens in one forward pass; longer prompts are run in chunks.
    pub max_prefill_tokens: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            kv_budget: KvBudget::Memory,
            kv_dtype: DTypeChoice::Auto,
            max_prefill_tokens: 2048,
        }
    }
}

/// Size of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvBudget {
    /// What fits [`DEFAULT_CACHE_BYTES`], or on a GPU nine tenths of its free memory.
    Memory,
    /// The same of the first of two engines: on a GPU it leaves the second a third of that, at most 16,384 tokens.
    MemoryForTwo,
    /// So many tokens.
    Tokens(usize),
    /// As many tokens as fit so many bytes.
    Bytes(usize),
}

impl EngineConfig {
    /// Of the first of two engines that are there at once, where it is not said what its KV cache takes.
    #[must_use]
    pub fn for_two(self) -> Self {
        let kv_budget = match self.kv_budget {
            KvBudget::Memory => KvBudget::MemoryForTwo,
            other => other,
        };
        Self { kv_budget, ..self }
    }
}

/// Tokens of a GPU's memory that a first engine leaves at most to a second, which predicts: 64 prompts of 256.
const SECOND_CACHE_TOKENS: usize = 64 * 256;

/// Size of the KV cache on a CPU where none is asked for.
pub const DEFAULT_CACHE_BYTES: usize = 1 << 30;

/// Sequences in a pass that a GPU's memory is taken for at once; more take more when they come.
const EXPECTED_SLOTS: usize = 256;

/// Tokens of the KV cache: those asked for; else on a GPU what its memory holds, and on a CPU a fixed size.
pub(crate) fn cache_tokens(model: &Llama, config: &EngineConfig) -> Result<usize, DecodeError> {
    // Whole blocks: the cache rounds up, and a budget is not to be exceeded.
    let dtype = config.kv_dtype.of_cache(model.dtype());
    let block = BLOCK_TOKENS * kv_bytes_per_token(model.config(), dtype);
    let fit = |bytes: usize| bytes / block * BLOCK_TOKENS;
    match config.kv_budget {
        KvBudget::Tokens(tokens) => Ok(tokens),
        KvBudget::Bytes(bytes) => Ok(fit(bytes)),
        KvBudget::Memory | KvBudget::MemoryForTwo => {
            let (rows, segments) = largest_pass(config);
            let free = tokens_that_fit(model, rows, segments).map_err(DecodeError::model)?;
            Ok(free.map_or(fit(DEFAULT_CACHE_BYTES), |tokens| of_free(config.kv_budget, tokens)))
        }
    }
}

/// Of the tokens that fit a GPU's free memory those that an engine takes.
fn of_free(budget: KvBudget, tokens: usize) -> usize {
    match budget {
        KvBudget::MemoryForTwo => tokens - (tokens / 3).min(SECOND_CACHE_TOKENS),
        _ => tokens,
    }
}

/// Takes the memory of a pass in advance.
pub(crate) fn reserve_passes(cache: &mut KvCache, config: &EngineConfig) -> Result<(), DecodeError> {
    let (rows, segments) = largest_pass(config);
    cache.reserve_passes(rows, segments).map_err(DecodeError::model)
}

/// Tokens and segments of the largest pass that memory is taken for.
fn largest_pass(config: &EngineConfig) -> (usize, usize) {
    (config.max_prefill_tokens + EXPECTED_SLOTS, EXPECTED_SLOTS + MOST_PROBES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_engine_leaves_a_second_what_it_has_a_use_for() {
        let config = EngineConfig::default();
        let two = config.for_two().kv_budget;
        assert_eq!(of_free(config.kv_budget, 9_000), 9_000);
        assert_eq!(of_free(two, 9_000), 6_000);
        assert_eq!(of_free(two, 200_000), 200_000 - 64 * 256);
        // What was asked for is taken.
        let asked = EngineConfig {
            kv_budget: KvBudget::Tokens(100),
            ..config
        };
        assert_eq!(asked.for_two(), asked);
    }
}
