//! Forward passes over running sequences, and the cache they share.

use std::collections::HashMap;
use std::sync::Arc;

use lengthwise_core::DecodeError;
use lengthwise_model::{Adapter, Flight, KvCache, Llama, Wanted, drawn_token};
use lengthwise_scheduler::Timeline;

use crate::budget::{cache_tokens, reserve_passes};
use crate::probes::{Probed, Probes};
use crate::recording::Recording;
use crate::sequence::Sequence;
use crate::{EngineConfig, SequenceRequest};

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

/// A pass, and whose tokens it draws: the number of each sequence's, or none.
struct Launched {
    flight: Flight,
    runs: Vec<Option<u64>>,
    /// The requests whose lengths the hidden states that it gives tell.
    probed: Vec<u32>,
    /// Tokens of probes in it.
    probe_tokens: usize,
}

/// What [`Engine::step_ahead`] did.
#[derive(Default)]
pub(crate) struct Stepped {
    /// Whether there was anything to launch.
    pub is_launched: bool,
    /// Tokens of probes in what was launched.
    pub probe_tokens: usize,
    /// What probes of the pass that was waited for gave.
    pub probed: Vec<Probed>,
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
        reserve_passes(&mut cache, &config)?;
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
        Sequence::new(request, self.adapter.as_deref())
    }

    /// One forward pass: every sequence's next token, or a chunk of its prompt, and probes behind them. Each sequence must
    /// have its blocks reserved for all its pending tokens. Where the device allows it the pass is only launched, and the one
    /// before is waited for: while the host works on that one's tokens, the device is at the next. A sequence's end is so
    /// seen one pass late.
    pub(crate) fn step_ahead(
        &mut self,
        sequences: &mut [&mut Sequence],
        probes: &mut Probes,
    ) -> Result<Stepped, DecodeError> {
        let launched = self.launch(sequences, probes)?;
        let mut stepped = Stepped {
            is_launched: launched.is_some(),
            probe_tokens: launched.as_ref().map_or(0, |launched| launched.probe_tokens),
            probed: Vec::new(),
        };
        let before = match self.cache.overlaps() {
            true => std::mem::replace(&mut self.ahead, launched),
            false => launched,
        };
        if let Some(before) = before {
            stepped.probed = self.land(before, sequences)?;
        }
        Ok(stepped)
    }

    /// Waits for the last pass that [`Engine::step_ahead`] launched, and launches none.
    pub(crate) fn land_ahead(&mut self, sequences: &mut [&mut Sequence]) -> Result<(), DecodeError> {
        self.ahead
            .take()
            .map_or(Ok(()), |before| self.land(before, sequences).map(|_| ()))
    }

    /// Forgets the last pass that [`Engine::step_ahead`] launched, whose tokens nobody waits for. Whether there was one.
    pub(crate) fn forget_ahead(&mut self) -> bool {
        self.ahead.take().is_some()
    }

    fn launch(
        &mut self,
        sequences: &mut [&mut Sequence],
        probes: &mut Probes,
    ) -> Result<Option<Launched>, DecodeError> {
        let (counts, left) = self.share_prefill(sequences);
        let passes = sequences.iter_mut().zip(&counts).filter(|(_, n)| **n > 0);
        let (mut segments, mut wanted): (Vec<_>, Vec<_>) = passes.map(|(s, n)| s.pass(*n)).unzip();
        let rows = segments.len();
        if rows == 0 && !probes.are_awaited() {
            return Ok(None);
        }
        probes.reserve(&mut self.cache, left);
        let mut adapter = self.adapter.as_deref();
        for (segment, is_last) in probes.segments() {
            segments.push(segment);
            wanted.push(if is_last { Wanted::Hidden } else { Wanted::Nothing });
        }
        if segments.len() > rows {
            // The engine has no adapter of its own where there are probes.
            adapter = probes.prober.map(|prober| prober.adapter());
            segments[..rows]
                .iter_mut()
                .for_each(|segment| segment.adapted_from = usize::MAX);
        }
        if segments.is_empty() {
            return Ok(None);
        }
        let flight = self
            .model
            .launch(&segments, &mut self.cache, adapter, &mut wanted)
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
        let (probe_tokens, probed) = probes.advance(&mut self.cache);
        Ok(Some(Launched {
            flight,
            runs,
            probed,
            probe_tokens,
        }))
    }

    /// Waits for a pass and gives its tokens to their sequences; those that are gone, or had ended before it, have none to
    /// take. Returns what its probes gave.
    fn land(&self, launched: Launched, sequences: &mut [&mut Sequence]) -> Result<Vec<Probed>, DecodeError> {
        let landed = launched.flight.land().map_err(DecodeError::model)?;
        let drawn = launched.runs.into_iter().zip(landed.tokens);
        let mut drawn: HashMap<u64, u32> = drawn.filter_map(|(run, token)| Some((run?, token))).collect();
        for sequence in sequences {
            let token = sequence.run.and_then(|run| drawn.remove(&run));
            if let Some(token) = token.filter(|_| sequence.is_unseen()) {
                sequence.see(token, &self.eos);
            }
        }
        Ok(launched.probed.into_iter().zip(landed.hidden).collect())
    }

    /// How many tokens of each sequence go into the next pass: decoding rows always one, prompts share what a pass
    /// may prefill, first come first. And how many that leaves.
    fn share_prefill(&self, sequences: &[&mut Sequence]) -> (Vec<usize>, usize) {
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
        (sequences.iter().map(share).collect(), left)
    }

    /// That the adapter of a pass is free for probes.
    ///
    /// # Errors
    /// The engine's sequences have one of their own.
    pub(crate) fn check_probes(&self) -> Result<(), DecodeError> {
        match self.adapter {
            Some(_) => Err(DecodeError::model(
                "a pass takes one adapter, and this engine's answers have one",
            )),
            None => Ok(()),
        }
    }

    /// Most tokens that a probe may have.
    pub(crate) fn longest_probe(&self) -> usize {
        self.cache.capacity().min(self.model.config().max_position_embeddings)
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
