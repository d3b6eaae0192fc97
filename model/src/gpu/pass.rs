//! Forward passes on the GPU: put into its stream without waiting for any.

mod launches;
mod multiply;

use candle_core::{DType, Result, bail};

use super::Gpu;
use super::backend::{Buffer, CopyBack};
use super::hidden::HiddenCopy;
use super::inputs::Inputs;
use super::kernels::{CacheLayer, Kernels};
use super::products::{Products, Projection, SharedProducts, Way};
use super::weights::GpuWeights;
use super::work::Address;
#[cfg(feature = "cuda")]
use super::workspace;
use super::workspace::{Sizes, Workspace};
use crate::lora::Adapter;
use crate::network::Llama;
use crate::sampling::Draw;
use crate::{ModelConfig, Segment};
use launches::Launches;

/// Sequences that a pass can have at most.
const MOST_SEGMENTS: usize = 8192;

/// Blocks of the row kernel that keep the memory of a large GPU busy: four on each of an H200's 132 multiprocessors, with
/// 16 KiB each on their way.
const BLOCKS_WANTED: usize = 528;

/// Of these the fastest counts.
const TIMES_MEASURED: usize = 4;

/// Keys below which a row's attention is not shared out further.
const LEAST_KEYS_PER_SPLIT: usize = 64;

/// Keys and values on the GPU, with all that a pass needs there.
pub(crate) struct GpuCache {
    gpu: Gpu,
    config: ModelConfig,
    dtype: DType,
    weights: GpuWeights,
    /// Keys and values of every layer, each `[slots, kv_heads * head_dim]`.
    memory: Buffer,
    slots: usize,
    work: Workspace,
    products: Products,
    shared_products: SharedProducts,
    inputs: Inputs,
    /// `[MOST_SEGMENTS]` u32: the tokens that the last pass drew.
    drawn: Buffer,
    /// Whether it drew any.
    draws: bool,
}

impl std::fmt::Debug for GpuCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GpuCache")
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

impl GpuCache {
    /// Room for `slots` tokens.
    ///
    /// # Errors
    /// The model is none that the kernels take, or there is no memory for it.
    pub fn new(gpu: Gpu, llama: &Llama, slots: usize) -> Result<Self> {
        let weights = GpuWeights::new(&gpu, llama)?;
        let config = llama.config().clone();
        let bytes = slots * crate::kv_bytes_per_token(&config, llama.dtype());
        Ok(Self {
            memory: gpu.alloc(bytes)?,
            drawn: gpu.alloc(4 * MOST_SEGMENTS)?,
            dtype: llama.dtype(),
            work: Workspace::default(),
            products: llama.gpu_products().choose(llama.dtype(), 0, |_, _, _| Ok(None))?,
            shared_products: llama.gpu_products().clone(),
            inputs: Inputs::default(),
            draws: false,
            gpu,
            config,
            weights,
            slots,
        })
    }

    /// Takes the memory of passes of up to `rows` new tokens in `segments` sequences now, so that none fails later, and
    /// measures which way their products are computed fastest, where no cache of the network has.
    ///
    /// # Errors
    /// There is no memory for it, or the device failed.
    pub fn reserve(&mut self, rows: usize, segments: usize) -> Result<()> {
        let sizes = largest_pass(&self.config, rows, segments);
        self.work.reserve(&self.gpu, &self.config, self.dtype, sizes)?;
        let time = |projection, rows, way| self.time_products(projection, rows, way);
        self.products = self.shared_products.choose(self.dtype, sizes.segments, time)?;
        Ok(())
    }

    /// Seconds that the products of every layer with one of its weights take in a way: all layers, since one layer's weight
    /// may stay in the device's cache.
    fn time_products(&self, projection: Projection, rows: usize, way: Way) -> Result<Option<f64>> {
        let pass = self.launches(None);
        let layers = match projection {
            Projection::Head => 1,
            _ => self.weights.layers.len(),
        };
        self.gpu.time(TIMES_MEASURED, &mut || {
            (0..layers).try_for_each(|layer| {
                // SAFETY: the workspace was made for as many rows; what they hold is of no account.
                unsafe { pass.multiply_by(way, &pass.product(projection, layer, rows)) }
            })
        })
    }

    fn launches<'a>(&'a self, adapter: Option<&'a Adapter>) -> Launches<'a> {
        Launches {
            cache: self,
            kernels: Kernels {
                gpu: &self.gpu,
                dtype: self.dtype,
            },
            adapter,
        }
    }

    /// Puts a pass over the segments into the stream and returns without waiting for it.
    ///
    /// - `draws`: how each segment's next token is drawn; empty: none is
    ///
    /// # Errors
    /// No memory, or the device failed.
    pub fn launch(&mut self, segments: &[Segment], adapter: Option<&Adapter>, draws: &[Option<Draw>]) -> Result<()> {
        if segments.len() > MOST_SEGMENTS {
            bail!("a pass takes at most {MOST_SEGMENTS} sequences, not {}", segments.len());
        }
        let tile = Kernels::tile(self.config.head_dim, self.dtype);
        let scale = adapter.map(|a| a.config().scale() as f32);
        self.inputs.fill(segments, scale, tile, draws);
        self.draws = !draws.is_empty();
        let sizes = Sizes {
            rows: self.inputs.rows,
            segments: self.inputs.segments,
            input_words: self.inputs.words.len(),
            partial: self.partial_elements(),
            rank: adapter.map_or(0, |a| a.config().r),
        };
        self.work.reserve(&self.gpu, &self.config, self.dtype, sizes)?;
        // SAFETY: the workspace has just been made large enough for the words.
        unsafe { self.gpu.upload(self.work.places.inputs, &self.inputs.words)? };
        let pass = self.launches(adapter);
        // Prompts come in too many shapes to be recorded; a step of decoding is one of few.
        match self.inputs.tiles == 0 && self.inputs.rows == self.inputs.segments {
            true => self.gpu.replay(pass.key(), &mut || pass.all()),
            false => pass.all(),
        }
    }

    /// Waits for the last pass and copies its logits, `[segments, vocab]`.
    pub fn logits(&self, logits: &mut Vec<f32>) -> Result<()> {
        logits.resize(self.inputs.segments * self.config.vocab_size, 0.0);
        // SAFETY: the workspace holds that many.
        unsafe {
            self.gpu
                .download(self.work.places.logits, bytemuck::cast_slice_mut(logits))
        }
    }

    /// How many tokens the last pass drew.
    pub fn last_drawn(&self) -> usize {
        if self.draws { self.inputs.segments } else { 0 }
    }

    /// The tokens that the last pass drew, one of each segment, on their way; `u32::MAX` where no logit was finite.
    pub fn drawn(&self) -> Result<CopyBack> {
        // SAFETY: a pass has at most as many segments as the buffer holds, which lives as long as the stream's work on it.
        unsafe { self.gpu.copy_back(self.drawn.address(), self.inputs.segments) }
    }

    /// What the last pass' head read of these of its segments, which ascend, on their way; `None` of none.
    pub fn hidden(&self, segments: Vec<usize>) -> Result<Option<HiddenCopy>> {
        let (Some(&first), Some(&last)) = (segments.first(), segments.last()) else {
            return Ok(None);
        };
        let width = self.config.hidden_size;
        // Whole words: a row is a multiple of 16 bytes (GpuWeights::new).
        let row_words = width * self.dtype.size_in_bytes() / 4;
        let from = self.work.places.normed + (4 * row_words * first) as Address;
        // SAFETY: the last norm wrote a row for each segment, and the next pass, which writes there again, is behind the copy
        // in the stream.
        let words = unsafe { self.gpu.copy_back(from, (last + 1 - first) * row_words)? };
        Ok(Some(HiddenCopy {
            words,
            dtype: self.dtype,
            width,
            rows: segments.into_iter().map(|segment| segment - first).collect(),
        }))
    }

    /// Parts that the keys of each single row are shared out in.
    fn splits(&self) -> usize {
        let shape = self.weights.shape;
        let blocks = self.inputs.singles * shape.heads / Kernels::head_group(shape);
        let wanted = BLOCKS_WANTED / blocks.max(1);
        let most = self.inputs.longest_single / LEAST_KEYS_PER_SPLIT;
        // A power of two: few numbers mean few recordings.
        let splits = wanted.min(most).max(1);
        1 << splits.ilog2()
    }

    fn partial_elements(&self) -> usize {
        match self.splits() {
            1 => 0,
            splits => self.inputs.singles * self.weights.shape.heads * splits * (self.config.head_dim + 2),
        }
    }

    fn layer(&self, layer: usize) -> CacheLayer {
        let width = self.config.num_key_value_heads * self.config.head_dim * self.dtype.size_in_bytes();
        let bytes = (self.slots * width) as Address;
        let keys = self.memory.address() + 2 * layer as Address * bytes;
        CacheLayer {
            keys,
            values: keys + bytes,
        }
    }
}

/// What the largest passes of `rows` new tokens in `segments` sequences need.
fn largest_pass(config: &ModelConfig, rows: usize, segments: usize) -> Sizes {
    let rows = rows.max(segments);
    let table = config
        .max_position_embeddings
        .div_ceil(crate::BLOCK_TOKENS)
        .next_power_of_two();
    Sizes {
        rows,
        segments,
        // Eight words of a row at most; a segment's last row, its scale, table and draw.
        input_words: 8 * rows + segments * (8 + table),
        // Rows are split while there are fewer blocks than wanted: blocks times splits is at most that.
        partial: BLOCKS_WANTED * 8 * (config.head_dim + 2),
        rank: 64,
    }
}

/// Bytes on the GPU besides weights and cache, cuBLAS' own among them, of passes of up to `rows` new tokens in `segments`
/// sequences.
#[cfg(feature = "cuda")]
pub(crate) fn pass_bytes(config: &ModelConfig, dtype: DType, rows: usize, segments: usize) -> usize {
    let buffers = workspace::bytes(config, dtype, largest_pass(config, rows, segments));
    buffers + 4 * MOST_SEGMENTS + super::cuda::BLAS_WORKSPACE
}
