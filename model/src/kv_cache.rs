//! The KV cache: keys and values of every layer in blocks that sequences borrow and give back.

use candle_core::{DType, Tensor};

use crate::cpu::{HostCache, Workspace};
use crate::{Llama, ModelConfig, ModelError};

/// Tokens in a block.
pub const BLOCK_TOKENS: usize = 16;

/// Preallocated keys and values of one model.
///
/// A sequence holds a [`BlockTable`]; no row is ever copied or padded, and a sequence's end frees its blocks at once.
#[derive(Debug)]
pub struct KvCache {
    pub(crate) store: Store,
    /// The logits of the last pass, `[segments, vocab]`.
    pub(crate) logits: Vec<f32>,
    free: Vec<u32>,
    blocks: usize,
}

/// Where the keys and values are.
#[derive(Debug)]
pub(crate) enum Store {
    /// In main memory, with the buffers of a pass, which are kept from one to the next.
    Host(HostCache, Workspace),
    /// On a GPU that runs own kernels, with all that a pass needs there.
    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    Gpu(Box<crate::gpu::GpuCache>),
    /// Tensors `[blocks * BLOCK_TOKENS, kv_heads * head_dim]`, one of each per layer.
    Tensors {
        keys: Vec<Tensor>,
        values: Vec<Tensor>,
        /// What the last pass' head read, `[segments, hidden]`.
        normed: Option<Tensor>,
    },
}

impl Store {
    /// Own kernels where the build and the device have them and the model fits them, else candle's operations.
    fn on_device(model: &Llama, blocks: usize) -> Result<Self, ModelError> {
        let config = model.config();
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(device) = model.device() {
            let slots = blocks * BLOCK_TOKENS;
            let needed = slots * kv_bytes_per_token(config, model.dtype());
            let free = crate::gpu::free_memory(device)?;
            if needed > free {
                return Err(ModelError::NoMemory { needed, free });
            }
            let gpu = crate::gpu::Gpu::new(model.device())?;
            return Ok(Self::Gpu(Box::new(crate::gpu::GpuCache::new(gpu, model, slots)?)));
        }
        let shape = (blocks * BLOCK_TOKENS, config.num_key_value_heads * config.head_dim);
        let layers = || {
            (0..config.num_hidden_layers)
                .map(|_| Tensor::zeros(shape, model.dtype(), model.device()))
                .collect::<candle_core::Result<Vec<_>>>()
        };
        Ok(Self::Tensors {
            keys: layers()?,
            values: layers()?,
            normed: None,
        })
    }
}

/// The blocks that a sequence holds, in the order of its positions.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<u32>,
}

impl BlockTable {
    /// Tokens that the blocks hold.
    pub fn capacity(&self) -> usize {
        self.blocks.len() * BLOCK_TOKENS
    }

    /// The blocks, in the order of the positions.
    pub(crate) fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Cache row of `position`, which must be below the capacity.
    pub(crate) fn slot(&self, position: usize) -> u32 {
        self.blocks[position / BLOCK_TOKENS] * BLOCK_TOKENS as u32 + (position % BLOCK_TOKENS) as u32
    }
}

impl KvCache {
    /// Room for `tokens` of sequences of `model`, rounded up to whole blocks, in the dtype of its weights.
    ///
    /// # Errors
    /// The device has not that much memory.
    pub fn new(model: &Llama, tokens: usize) -> Result<Self, ModelError> {
        Self::in_dtype(model, tokens, model.dtype())
    }

    /// As [`KvCache::new`], in `dtype`, which may be f16 where f32 weights run on the CPU: reading the cache, what most of a
    /// decode step at long contexts is, then takes half the bytes. Scores and mixtures are added up in f32 all the same.
    ///
    /// # Errors
    /// The device has not that much memory, or the model takes no other dtype than its own.
    pub fn in_dtype(model: &Llama, tokens: usize, dtype: DType) -> Result<Self, ModelError> {
        let blocks = tokens.div_ceil(BLOCK_TOKENS).max(1);
        let host = |cache| Store::Host(cache, Workspace::default());
        let store = match dtype {
            DType::F32 if model.runs_on_host() => host(HostCache::f32(model.config(), blocks)),
            DType::F16 if model.runs_on_host() => host(HostCache::f16(model.config(), blocks)),
            _ if dtype == model.dtype() => Store::on_device(model, blocks)?,
            _ => {
                return Err(ModelError::CacheDTypeUnsupported {
                    cache: dtype.as_str(),
                    weights: model.dtype().as_str(),
                });
            }
        };
        Ok(Self::with_store(store, blocks))
    }

    fn with_store(store: Store, blocks: usize) -> Self {
        Self {
            store,
            logits: Vec::new(),
            free: (0..blocks as u32).rev().collect(),
            blocks,
        }
    }

    /// Takes the memory of passes of up to `rows` new tokens in `segments` sequences now, where a device would else take
    /// it in the middle of the work.
    ///
    /// # Errors
    /// The device has not that much memory.
    pub fn reserve_passes(&mut self, rows: usize, segments: usize) -> Result<(), ModelError> {
        #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
        if let Store::Gpu(gpu) = &mut self.store {
            gpu.reserve(rows, segments)?;
        }
        let _ = (rows, segments);
        Ok(())
    }

    /// A cache of `model` on the emulator of the GPU's kernels, whatever device its weights are on.
    ///
    /// # Errors
    /// The kernels do not take the model.
    #[cfg(feature = "kernel-emulation")]
    pub fn emulated(model: &Llama, tokens: usize) -> Result<Self, ModelError> {
        let blocks = tokens.div_ceil(BLOCK_TOKENS).max(1);
        let gpu = crate::gpu::Gpu::new(&candle_core::Device::Cpu)?;
        let cache = crate::gpu::GpuCache::new(gpu, model, blocks * BLOCK_TOKENS)?;
        Ok(Self::with_store(Store::Gpu(Box::new(cache)), blocks))
    }

    /// Whether a pass is launched before the one before has been waited for, so that it may take tokens that only the
    /// device knows.
    pub fn overlaps(&self) -> bool {
        match &self.store {
            #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
            Store::Gpu(_) => true,
            _ => false,
        }
    }

    /// What the last pass' head read of segment number `segment`, `[width]`: a hidden state of the model's width. Of a pass
    /// that ran here: from a GPU a flight brings it.
    pub(crate) fn hidden_of(&self, segment: usize, width: usize) -> Result<Vec<f32>, ModelError> {
        match &self.store {
            Store::Host(_, work) => Ok(work.normed[segment * width..][..width].to_vec()),
            Store::Tensors {
                normed: Some(normed), ..
            } => Ok(normed.get(segment)?.to_dtype(DType::F32)?.to_vec1()?),
            _ => unreachable!("asked behind a pass on the host"),
        }
    }

    /// Tokens that the whole cache holds.
    pub fn capacity(&self) -> usize {
        self.blocks * BLOCK_TOKENS
    }

    /// Tokens in blocks that nobody holds.
    pub fn free_tokens(&self) -> usize {
        self.free.len() * BLOCK_TOKENS
    }

    /// Grows `table` until it holds `tokens`. False, and nothing taken, where the free blocks do not suffice.
    #[must_use]
    pub fn reserve(&mut self, table: &mut BlockTable, tokens: usize) -> bool {
        let more = tokens.div_ceil(BLOCK_TOKENS).saturating_sub(table.blocks.len());
        if more > self.free.len() {
            return false;
        }
        table.blocks.extend(self.free.drain(self.free.len() - more..).rev());
        true
    }

    /// Takes the blocks of a sequence back that its first `tokens` tokens do not need.
    pub fn shrink(&mut self, table: &mut BlockTable, tokens: usize) {
        let kept = tokens.div_ceil(BLOCK_TOKENS).min(table.blocks.len());
        self.free.extend(table.blocks.drain(kept..).rev());
    }

    /// Takes the blocks of a sequence back.
    pub fn release(&mut self, mut table: BlockTable) {
        self.shrink(&mut table, 0);
    }
}

/// Tokens of `model` that a cache on its device can hold besides passes of up to `rows` new tokens in `segments` sequences:
/// nine tenths of the memory that is free there. `None` for a device whose memory is not known: the CPU.
///
/// # Errors
/// The device failed.
pub fn tokens_that_fit(model: &Llama, rows: usize, segments: usize) -> Result<Option<usize>, ModelError> {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = model.device() {
        let free = crate::gpu::free_memory(device)?;
        let passes = crate::gpu::pass_bytes(model.config(), model.dtype(), rows, segments);
        let left = (free / 10 * 9).saturating_sub(passes);
        return Ok(Some(left / kv_bytes_per_token(model.config(), model.dtype())));
    }
    let _ = (model, rows, segments);
    Ok(None)
}

/// Bytes of keys and values per token, over all layers.
pub fn kv_bytes_per_token(config: &ModelConfig, dtype: DType) -> usize {
    2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.size_in_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(tokens: usize) -> KvCache {
        let model = crate::testing::network(&crate::testing::config()).expect("a small network fits");
        KvCache::new(&model, tokens).expect("a small cache fits")
    }

    #[test]
    fn blocks_are_taken_whole_and_given_back() {
        let mut cache = cache(3 * BLOCK_TOKENS);
        let mut a = BlockTable::default();
        assert!(cache.reserve(&mut a, BLOCK_TOKENS + 1));
        assert_eq!((a.capacity(), cache.free_tokens()), (2 * BLOCK_TOKENS, BLOCK_TOKENS));
        let mut b = BlockTable::default();
        assert!(!cache.reserve(&mut b, BLOCK_TOKENS + 1), "only one block is free");
        assert_eq!(cache.free_tokens(), BLOCK_TOKENS, "a refusal takes nothing");
        cache.release(a);
        assert!(cache.reserve(&mut b, 3 * BLOCK_TOKENS));
    }

    #[test]
    fn growing_keeps_the_blocks_held() {
        let mut cache = cache(4 * BLOCK_TOKENS);
        let mut table = BlockTable::default();
        assert!(cache.reserve(&mut table, 1));
        let first = table.slot(0);
        assert!(cache.reserve(&mut table, 2 * BLOCK_TOKENS));
        assert_eq!(table.slot(0), first);
        assert_ne!(
            table.slot(BLOCK_TOKENS) / BLOCK_TOKENS as u32,
            first / BLOCK_TOKENS as u32
        );
    }
}
