//! The transformer: one network for every Llama-style model; what differs between them is data in the config.

mod block;
mod draw;
mod host;
mod layer;
mod linear;
#[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
mod parts;
mod pass;
mod products;
mod rope_scaling;
mod stack;
#[cfg(test)]
mod tests;
mod train_pass;
mod training_memory;

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::cpu::Scratch;
use crate::kv_cache::{KvCache, Store};
use crate::lora::{Adapter, Dropout, LinearKind};
use crate::ops::{self, RopeTable};
use crate::{ModelConfig, ModelError, OpenProgress, Quantization, Weights};

use block::Block;
pub use draw::{Flight, Landed, Wanted, drawn_token};
use linear::Weight;
pub use pass::Segment;
use pass::{Attention, Pass};
pub use products::ProductTiming;
#[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
pub(crate) use stack::{Keeps, Layer, Stack, rows_within};
pub use train_pass::{GradientSink, TrainPass};
pub use training_memory::TrainingMemory;

/// A Llama-style decoder-only transformer.
///
/// Sequences lie packed one behind the other, without padding: a batch is `[tokens, hidden]`, whatever mixture of
/// prefill and decode it holds, and a row's result does not depend on its neighbours.
#[derive(Debug, Clone)]
pub struct Llama {
    config: ModelConfig,
    embed_tokens: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    lm_head: Weight,
    rope: Arc<RopeTable>,
    /// Buffers of the training passes on the CPU path.
    scratch: Arc<Scratch>,
    /// What trains it on the GPU path.
    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    gpu_training: crate::gpu::TrainingSlot,
    /// How its products are computed on the GPU path.
    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    gpu_products: crate::gpu::SharedProducts,
}

impl Llama {
    /// Builds the network from weights under their Hugging Face names.
    ///
    /// # Errors
    /// A tensor is missing, its shape is not what the config says, or the device has no room for all of them.
    pub fn new(config: &ModelConfig, weights: &Weights) -> Result<Self, ModelError> {
        Self::load(config, weights, &mut ())
    }

    /// [`Llama::new`], which takes a while for a large checkpoint.
    ///
    /// # Errors
    /// As there.
    pub fn load(config: &ModelConfig, weights: &Weights, progress: &mut dyn OpenProgress) -> Result<Self, ModelError> {
        weights.check_room(config)?;
        Self::read(config, weights, progress).map_err(|err| weights.explain(err, config))
    }

    fn read(config: &ModelConfig, weights: &Weights, progress: &mut dyn OpenProgress) -> Result<Self, ModelError> {
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        // The layers, and what lies before and behind them.
        let parts = config.num_hidden_layers + 1;
        progress.loaded(0, parts);
        let embed_tokens = weights.get("model.embed_tokens.weight", &[vocab, hidden])?;
        let lm_head = match config.tie_word_embeddings {
            true => Weight::new(embed_tokens.clone())?.quantized(weights.quantization()),
            false => Weight::load(weights, "lm_head.weight", [vocab, hidden])?,
        };
        progress.loaded(1, parts);
        let block = |layer| {
            let block = Block::load(config, weights, layer);
            progress.loaded(layer + 2, parts);
            block
        };
        let blocks = (0..config.num_hidden_layers).map(block).collect::<Result<_, _>>()?;
        let frequencies = rope_scaling::inverse_frequencies(config);
        Ok(Self {
            embed_tokens,
            blocks,
            norm: weights.get("model.norm.weight", &[hidden])?,
            lm_head,
            rope: Arc::new(RopeTable::new(&frequencies, config.max_position_embeddings)),
            config: config.clone(),
            scratch: Arc::default(),
            #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
            gpu_training: crate::gpu::TrainingSlot::default(),
            #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
            gpu_products: crate::gpu::SharedProducts::default(),
        })
    }

    /// The config that it was built from.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where the weights lie.
    pub fn device(&self) -> &Device {
        self.embed_tokens.device()
    }

    /// The dtype of the weights.
    pub fn dtype(&self) -> DType {
        self.embed_tokens.dtype()
    }

    /// How the weights of the linear layers and of the head are stored, where that is not the dtype.
    pub fn quantization(&self) -> Option<Quantization> {
        let quantized = self.lm_head.packed().is_some_and(|w| w.is_quantized());
        quantized.then_some(Quantization::Q8_0)
    }

    /// Bytes of the linear layers' and the head's weights, which a decode step reads.
    pub fn linear_bytes(&self) -> usize {
        let layers = self.blocks.iter().flat_map(|b| &b.linears);
        layers.map(|l| l.weight.bytes()).sum::<usize>() + self.lm_head.bytes()
    }

    /// Whether the CPU path runs it: frozen f32 weights in main memory.
    pub(crate) fn runs_on_host(&self) -> bool {
        self.lm_head.packed().is_some()
    }

    /// Runs every segment's new tokens on top of what the cache holds of its sequence, and adds them to the cache.
    ///
    /// Returns the logits after each segment's last token, `[segments, vocab]` in f32 row by row; they lie in the cache
    /// until the next pass.
    ///
    /// # Errors
    /// A position past the model's context, a block table too short, or the device failed.
    pub fn forward<'c>(
        &self,
        segments: &[Segment],
        cache: &'c mut KvCache,
        adapter: Option<&Adapter>,
    ) -> Result<&'c [f32], ModelError> {
        #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
        if let Store::Gpu(gpu) = &mut cache.store {
            self.check(segments, 0)?;
            gpu.launch(segments, adapter, &[])?;
            gpu.logits(&mut cache.logits)?;
            return Ok(&cache.logits);
        }
        pass::check(segments)?;
        let (tokens, positions) = self.pack(segments.iter().map(|s| (s.tokens, s.start)))?;
        let adapted = adapter.and_then(|_| pass::adapted_rows(segments));
        match &mut cache.store {
            #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
            Store::Gpu(_) => unreachable!("returned above"),
            Store::Host(host, workspace) => {
                let spans = host::spans(segments);
                let pass = host::HostPass {
                    tokens: &tokens,
                    spans: &spans,
                    adapter,
                    adapted: adapted.as_ref(),
                };
                self.forward_host(&pass, host, workspace, &mut cache.logits)?;
            }
            Store::Tensors { keys, values, normed } => {
                let rows = pass::cached_rows(segments);
                let pass = Pass {
                    positions,
                    rope: &self.rope,
                    adapter,
                    adapted: adapted.map(|rows| rows.on(self.device())).transpose()?,
                    dropout: None,
                    attention: Attention::Cached {
                        keys,
                        values,
                        rows: &rows,
                    },
                };
                let sequences: Vec<&[u32]> = segments.iter().map(|s| s.tokens).collect();
                let hidden = self.normed(&self.hidden(&tokens, &pass, &last_positions(&sequences))?)?;
                cache.logits = self.head(&hidden)?.flatten_all()?.to_vec1()?;
                *normed = Some(hidden);
            }
        }
        Ok(&cache.logits)
    }

    /// Runs whole sequences without a cache, differentiably.
    ///
    /// - `sequences`: the tokens of each
    /// - `wanted`: packed positions whose logits are wanted; the head is spent on no others
    ///
    /// Returns `[wanted, vocab]` in f32.
    ///
    /// # Errors
    /// A sequence longer than the model's context, or the device failed.
    pub fn forward_train(
        &self,
        sequences: &[&[u32]],
        wanted: &[u32],
        adapter: Option<&Adapter>,
        dropout: Option<&Dropout>,
    ) -> Result<Tensor, ModelError> {
        TrainPass::new(self, adapter, dropout, false).logits(sequences, wanted)
    }

    /// The last position's hidden state of whole sequences, behind the last norm: what the head that gives the logits
    /// sees there. Without a cache, differentiable.
    ///
    /// Returns `[sequences, hidden]` in f32.
    ///
    /// # Errors
    /// A sequence that is empty or longer than the model's context, or the device failed.
    pub fn last_hidden(
        &self,
        sequences: &[&[u32]],
        adapter: Option<&Adapter>,
        dropout: Option<&Dropout>,
    ) -> Result<Tensor, ModelError> {
        TrainPass::new(self, adapter, dropout, false).last_hidden(sequences)
    }

    /// The same network with the adapter's low-rank terms added to its weights.
    ///
    /// # Errors
    /// The adapter changes a part of each sequence alone, or the device failed.
    pub fn merged(&self, adapter: &Adapter) -> Result<Self, ModelError> {
        if !adapter.config().invocation_tokens.is_empty() {
            return Err(ModelError::AdapterMismatch {
                reason: "it has invocation tokens, and weights that it were merged into would change what stands before them too"
                    .to_owned(),
            });
        }
        let mut merged = self.clone();
        for (layer, block) in merged.blocks.iter_mut().enumerate() {
            for kind in LinearKind::ALL {
                if let Some(delta) = adapter.delta(layer, kind)? {
                    let weight = &mut block.linear_mut(kind).weight;
                    *weight = weight.add(&delta)?;
                }
            }
        }
        Ok(merged)
    }

    /// Every segment has tokens of this vocabulary at positions of this model, and blocks for them.
    ///
    /// - `drawn`: tokens that the pass before drew and a segment may refer to
    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    fn check(&self, segments: &[Segment], drawn: usize) -> Result<(), ModelError> {
        pass::check(segments)?;
        segments
            .iter()
            .try_for_each(|s| self.check_sequence(s.tokens, s.start, drawn))
    }

    fn check_sequence(&self, tokens: &[u32], start: usize, drawn: usize) -> Result<(), ModelError> {
        let (end, max) = (start + tokens.len(), self.rope.positions());
        if end > max {
            return Err(ModelError::PromptTooLong { got: end, max });
        }
        let vocab_size = self.config.vocab_size;
        let known = |token: u32| match draw::segment_of(token) {
            Some(segment) => segment < drawn,
            None => (token as usize) < vocab_size,
        };
        match tokens.iter().find(|t| !known(**t)) {
            Some(&token) => Err(ModelError::UnknownToken { token, vocab_size }),
            None => Ok(()),
        }
    }

    /// All tokens of a batch one behind the other, and the position of each in its own sequence.
    fn pack<'a>(
        &self,
        sequences: impl Iterator<Item = (&'a [u32], usize)>,
    ) -> Result<(Vec<u32>, Arc<[u32]>), ModelError> {
        let (mut tokens, mut positions) = (Vec::new(), Vec::new());
        for (sequence, start) in sequences {
            self.check_sequence(sequence, start, 0)?;
            tokens.extend_from_slice(sequence);
            positions.extend(start as u32..(start + sequence.len()) as u32);
        }
        Ok((tokens, positions.into()))
    }

    /// Hidden states at the packed positions `wanted`, before the last norm, `[wanted, hidden]`.
    fn hidden(&self, tokens: &[u32], pass: &Pass, wanted: &[u32]) -> Result<Tensor, ModelError> {
        let wanted = Tensor::new(wanted, self.device())?;
        let mut x = self.embed(tokens)?;
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, layer, pass, self.wanted_of(layer, &wanted))?;
        }
        Ok(x)
    }

    /// The rows that are read behind a layer: all but for the last, whose output goes to the head alone.
    fn wanted_of<'t>(&self, layer: usize, wanted: &'t Tensor) -> Option<&'t Tensor> {
        (layer + 1 == self.blocks.len()).then_some(wanted)
    }

    /// `[tokens, hidden]`.
    fn embed(&self, tokens: &[u32]) -> Result<Tensor, ModelError> {
        let tokens = Tensor::new(tokens, self.device())?;
        Ok(self.embed_tokens.index_select(&tokens, 0)?)
    }

    /// Of hidden states before the last norm; `[rows, vocab]` in f32.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        self.head(&self.normed(hidden)?)
    }

    /// Of hidden states behind the last norm; `[rows, vocab]` in f32.
    fn head(&self, normed: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.lm_head.product(normed)?.to_dtype(DType::F32)?)
    }

    fn normed(&self, hidden: &Tensor) -> Result<Tensor, ModelError> {
        Ok(ops::rms_norm(hidden, &self.norm, self.config.rms_norm_eps)?)
    }
}

/// The packed position of every sequence's last token.
fn last_positions(sequences: &[&[u32]]) -> Vec<u32> {
    let ends = sequences.iter().scan(0, |end, sequence| {
        *end += sequence.len() as u32;
        Some(end.saturating_sub(1))
    });
    ends.collect()
}
