//! Forward passes over running sequences, and the cache they share.

use std::sync::Arc;

use lengthwise_core::DecodeError;
use lengthwise_model::{Adapter, KvCache, Llama, Segment, kv_bytes_per_token};
use rayon::prelude::*;

use crate::SequenceRequest;
use crate::sequence::Sequence;

/// How much the engine may hold and do at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Tokens of the KV cache; `None`: as many as fit [`DEFAULT_CACHE_BYTES`].
    pub kv_cache_tokens: Option<usize>,
    /// Most prompt tokens in one forward pass; longer prompts are run in chunks.
    pub max_prefill_tokens: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            kv_cache_tokens: None,
            max_prefill_tokens: 2048,
        }
    }
}

/// Size of the KV cache where none is asked for.
pub const DEFAULT_CACHE_BYTES: usize = 1 << 30;

/// Logits below which one thread draws all tokens: waking another costs some microseconds.
const DRAW_SERIALLY_BELOW: usize = 1 << 16;

/// A model with a KV cache, and an adapter or none.
pub struct Engine {
    model: Arc<Llama>,
    adapter: Option<Arc<Adapter>>,
    pub(crate) cache: KvCache,
    eos: Vec<u32>,
    config: EngineConfig,
}

impl Engine {
    /// `eos`: the tokens that end an answer.
    ///
    /// # Errors
    /// No memory for the cache.
    pub fn new(
        model: Arc<Llama>,
        adapter: Option<Arc<Adapter>>,
        eos: Vec<u32>,
        config: EngineConfig,
    ) -> Result<Self, DecodeError> {
        let per_token = kv_bytes_per_token(model.config(), model.dtype());
        let tokens = config.kv_cache_tokens.unwrap_or(DEFAULT_CACHE_BYTES / per_token);
        let cache = KvCache::new(&model, tokens).map_err(DecodeError::model)?;
        Ok(Self {
            model,
            adapter,
            cache,
            eos,
            config,
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Llama> {
        &self.model
    }

    /// Tokens that the KV cache holds.
    pub fn cache_tokens(&self) -> usize {
        self.cache.capacity()
    }

    /// Whether a request can be run at all; asked before anything is decoded.
    ///
    /// # Errors
    /// Its prompt is empty or too long, its cap is 0, or the cache is too small for it alone.
    pub fn check(&self, request: &SequenceRequest) -> Result<(), DecodeError> {
        let id = || request.id.clone();
        let max = self.model.config().max_position_embeddings - 1;
        let got = request.prompt.len();
        if got == 0 {
            return Err(DecodeError::EmptyPrompt { id: id() });
        }
        if got > max {
            return Err(DecodeError::PromptTooLong { id: id(), got, max });
        }
        if request.max_new_tokens == 0 || request.replay_tokens == Some(0) {
            return Err(DecodeError::NothingToGenerate { id: id() });
        }
        let (needed, capacity) = (got + self.longest_answer(request), self.cache.capacity());
        if needed > capacity {
            return Err(DecodeError::CacheTooSmall {
                id: id(),
                needed,
                capacity,
            });
        }
        Ok(())
    }

    /// Most tokens that the request's answer can have: its cap, or what the model's positions leave.
    pub fn longest_answer(&self, request: &SequenceRequest) -> usize {
        let left = self
            .model
            .config()
            .max_position_embeddings
            .saturating_sub(request.prompt.len());
        (request.max_new_tokens as usize).min(left)
    }

    /// A request that was checked, its cap lowered to what the model's positions leave.
    pub(crate) fn begin(&self, mut request: SequenceRequest) -> Sequence {
        request.max_new_tokens = self.longest_answer(&request) as u32;
        Sequence::new(request)
    }

    /// One forward pass: every sequence's next token, or a chunk of its prompt. Each must have its blocks reserved
    /// for all its pending tokens.
    pub(crate) fn step(&mut self, sequences: &mut [&mut Sequence]) -> Result<(), DecodeError> {
        let counts = self.share_prefill(sequences);
        let running = || counts.iter().enumerate().filter(|(_, n)| **n > 0);
        let segments: Vec<Segment> = running()
            .map(|(i, &n)| Segment {
                tokens: sequences[i].next_tokens(n),
                start: sequences[i].cached(),
                table: &sequences[i].table,
            })
            .collect();
        let logits = self
            .model
            .forward(&segments, &mut self.cache, self.adapter.as_deref())
            .map_err(DecodeError::model)?;
        let vocab = self.model.config().vocab_size;
        let ran = sequences.iter_mut().zip(&counts).filter(|(_, n)| **n > 0);
        let drawn: Vec<_> = ran.zip(logits.chunks_exact(vocab)).collect();
        let advance = |((sequence, n), logits): ((&mut &mut Sequence, &usize), &[f32])| {
            sequence.advance(*n, logits, &self.eos).map_err(DecodeError::model)
        };
        // Each request has its own random stream, so the order of the draws does not matter.
        match logits.len() < DRAW_SERIALLY_BELOW {
            true => drawn.into_iter().try_for_each(advance),
            false => drawn.into_par_iter().try_for_each(advance),
        }
    }

    /// How many tokens of each sequence go into the next pass: decoding rows always one, prompts share what a pass
    /// may prefill, first come first.
    fn share_prefill(&self, sequences: &[&mut Sequence]) -> Vec<usize> {
        let mut left = self.config.max_prefill_tokens;
        let share = |sequence: &&mut Sequence| match sequence.pending() {
            1 => 1,
            pending => {
                let count = pending.min(left);
                left -= count;
                count
            }
        };
        sequences.iter().map(share).collect()
    }

    /// Gives a sequence the blocks for its pending tokens. False where the cache is full.
    pub(crate) fn reserve(&mut self, sequence: &mut Sequence) -> bool {
        let tokens = sequence.cached() + sequence.pending();
        self.cache.reserve(&mut sequence.table, tokens)
    }

    /// Takes a sequence's blocks back; its tokens stay and can be run again.
    pub(crate) fn evict(&mut self, sequence: &mut Sequence) {
        let table = sequence.evict();
        self.cache.release(table);
    }
}
