//! Forward passes over running sequences, and the cache they share.

use std::collections::HashMap;
use std::sync::Arc;

use lengthwise_core::DecodeError;
use lengthwise_model::{
    Adapter, BLOCK_TOKENS, DTypeChoice, Flight, KvCache, Llama, drawn_token, kv_bytes_per_token, tokens_that_fit,
};
use lengthwise_scheduler::Timeline;

use crate::SequenceRequest;
use crate::recording::Recording;
use crate::sequence::Sequence;

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
    /// So many tokens.
    Tokens(usize),
    /// As many tokens as fit so many bytes.
    Bytes(usize),
}

/// Size of the KV cache on a CPU where none is asked for.
pub const DEFAULT_CACHE_BYTES: usize = 1 << 30;

/// Sequences in a pass that a GPU's memory is taken for at once; more take more when they come.
const EXPECTED_SLOTS: usize = 256;

/// A model with a KV cache, and an adapter or none.
pub struct Engine {
    model: Arc<Llama>,
    adapter: Option<Arc<Adapter>>,
    pub(crate) cache: KvCache,
    eos: Vec<u32>,
    config: EngineConfig,
    /// The last pass of [`Engine::step_ahead`], where it has not been waited for.
    ahead: Option<Launched>,
    /// Sequences that were given a number.
    runs: u64,
    /// What the slots do, where somebody wants to know.
    pub(crate) recording: Option<Recording>,
}

/// A pass, and whose tokens it draws: the number of each segment's sequence, or none.
struct Launched {
    flight: Flight,
    runs: Vec<Option<u64>>,
}

/// Tokens of the KV cache: those asked for; else on a GPU what its memory holds, and on a CPU a fixed size.
fn cache_tokens(model: &Llama, config: &EngineConfig) -> Result<usize, DecodeError> {
    // Whole blocks: the cache rounds up, and a budget is not to be exceeded.
    let dtype = config.kv_dtype.of_cache(model.dtype());
    let block = BLOCK_TOKENS * kv_bytes_per_token(model.config(), dtype);
    let fit = |bytes: usize| bytes / block * BLOCK_TOKENS;
    match config.kv_budget {
        KvBudget::Tokens(tokens) => Ok(tokens),
        KvBudget::Bytes(bytes) => Ok(fit(bytes)),
        KvBudget::Memory => {
            let rows = config.max_prefill_tokens + EXPECTED_SLOTS;
            let free = tokens_that_fit(model, rows, EXPECTED_SLOTS).map_err(DecodeError::model)?;
            Ok(free.unwrap_or(fit(DEFAULT_CACHE_BYTES)))
        }
    }
}

impl Engine {
    /// `eos`: the tokens that end an answer.
    ///
    /// # Errors
    /// No memory for the cache, or none in that dtype.
    pub fn new(
        model: Arc<Llama>,
        adapter: Option<Arc<Adapter>>,
        eos: Vec<u32>,
        config: EngineConfig,
    ) -> Result<Self, DecodeError> {
        let tokens = cache_tokens(&model, &config)?;
        let dtype = config.kv_dtype.of_cache(model.dtype());
        let cache = KvCache::in_dtype(&model, tokens, dtype).map_err(DecodeError::model)?;
        Self::with_cache(model, adapter, eos, config, cache)
    }

    /// An engine on a cache of the model.
    pub(crate) fn with_cache(
        model: Arc<Llama>,
        adapter: Option<Arc<Adapter>>,
        eos: Vec<u32>,
        config: EngineConfig,
        mut cache: KvCache,
    ) -> Result<Self, DecodeError> {
        cache
            .reserve_passes(config.max_prefill_tokens + EXPECTED_SLOTS, EXPECTED_SLOTS)
            .map_err(DecodeError::model)?;
        Ok(Self {
            model,
            adapter,
            cache,
            eos,
            config,
            ahead: None,
            runs: 0,
            recording: None,
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

    /// Records what every slot does in the next run of a strategy, for [`Engine::take_timeline`].
    pub fn record_timeline(&mut self) {
        self.recording = Some(Recording::default());
    }

    /// What was recorded since [`Engine::record_timeline`]; `None` without it. Its area is the run's slots × steps; what
    /// is computed a second time for a sequence that lost its cache takes no step of its own, and is drawn where it was
    /// computed first: as thrown away where the continuous mode preempted it.
    pub fn take_timeline(&mut self) -> Option<Timeline> {
        self.recording.take().map(Recording::into_timeline)
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
        match self.launch(sequences)? {
            Some(launched) => self.land(launched, sequences),
            None => Ok(()),
        }
    }

    /// As [`Engine::step`], but where the device allows it the pass is only launched, and the one before is waited for:
    /// while the host works on that one's tokens, the device is at the next. A sequence's end is so seen one pass late.
    ///
    /// Returns whether there was anything to launch.
    pub(crate) fn step_ahead(&mut self, sequences: &mut [&mut Sequence]) -> Result<bool, DecodeError> {
        let launched = self.launch(sequences)?;
        let is_launched = launched.is_some();
        let before = match self.cache.overlaps() {
            true => std::mem::replace(&mut self.ahead, launched),
            false => launched,
        };
        if let Some(before) = before {
            self.land(before, sequences)?;
        }
        Ok(is_launched)
    }

    /// Forgets the last pass that [`Engine::step_ahead`] launched; nobody waits for its tokens.
    pub(crate) fn forget_ahead(&mut self) {
        self.ahead = None;
    }

    fn launch(&mut self, sequences: &mut [&mut Sequence]) -> Result<Option<Launched>, DecodeError> {
        let counts = self.share_prefill(sequences);
        let passes = sequences.iter_mut().zip(&counts).filter(|(_, n)| **n > 0);
        let (segments, mut samplers): (Vec<_>, Vec<_>) = passes.map(|(s, n)| s.pass(*n)).unzip();
        if segments.is_empty() {
            return Ok(None);
        }
        let flight = self
            .model
            .launch(&segments, &mut self.cache, self.adapter.as_deref(), &mut samplers)
            .map_err(DecodeError::model)?;
        let ran = sequences.iter_mut().zip(counts).filter(|(_, n)| *n > 0);
        let mut runs = Vec::new();
        for (segment, (sequence, count)) in ran.enumerate() {
            let draws = sequence.advance(count, drawn_token(segment));
            let run = *sequence.run.get_or_insert_with(|| {
                self.runs += 1;
                self.runs
            });
            runs.push(draws.then_some(run));
        }
        Ok(Some(Launched { flight, runs }))
    }

    /// Waits for a pass and gives its tokens to their sequences; those that are gone have none to take.
    fn land(&self, launched: Launched, sequences: &mut [&mut Sequence]) -> Result<(), DecodeError> {
        let tokens = launched.flight.land().map_err(DecodeError::model)?;
        let drawn = launched.runs.into_iter().zip(tokens);
        let mut drawn: HashMap<u64, u32> = drawn.filter_map(|(run, token)| Some((run?, token))).collect();
        for sequence in sequences {
            if let Some(token) = sequence.run.and_then(|run| drawn.remove(&run)) {
                sequence.see(token, &self.eos);
            }
        }
        Ok(())
    }

    /// How many tokens of each sequence go into the next pass: decoding rows always one, prompts share what a pass
    /// may prefill, first come first.
    fn share_prefill(&self, sequences: &[&mut Sequence]) -> Vec<usize> {
        let mut left = self.config.max_prefill_tokens;
        let share = |sequence: &&mut Sequence| match sequence.pending() {
            _ if sequence.ends_unseen() => 0,
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
        if sequence.ends_unseen() {
            return true;
        }
        let tokens = sequence.cached() + sequence.pending();
        self.cache.reserve(&mut sequence.table, tokens)
    }

    /// Takes a sequence's blocks back; its tokens stay and can be run again.
    pub(crate) fn evict(&mut self, sequence: &mut Sequence) {
        let table = sequence.evict();
        self.cache.release(table);
    }
}
