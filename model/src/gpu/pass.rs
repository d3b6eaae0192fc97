//! One forward pass on the GPU: every layer's launches, in order, without waiting for any.

use std::hash::{DefaultHasher, Hash, Hasher};

use candle_core::{DType, Result, bail};

use super::Gpu;
use super::backend::{Address, Buffer, CopyBack, Gemm};
use super::inputs::{Inputs, Part};
use super::kernels::{AttendInputs, CacheLayer, Kernels, RopeInputs};
use super::weights::{GpuWeights, low_rank};
#[cfg(feature = "cuda")]
use super::workspace;
use super::workspace::{Sizes, Workspace};
use crate::lora::{Adapter, LinearKind};
use crate::network::Llama;
use crate::sampling::Draw;
use crate::{ModelConfig, Segment};

/// Sequences that a pass can have at most.
const MOST_SEGMENTS: usize = 8192;

/// Blocks of the row kernel that keep all of a large GPU's multiprocessors busy: twice the 132 of an H200.
const BLOCKS_WANTED: usize = 264;

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

/// A pass: its launches with the addresses that they share.
struct Launches<'a> {
    cache: &'a GpuCache,
    kernels: Kernels<'a>,
    adapter: Option<&'a Adapter>,
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
            inputs: Inputs::default(),
            draws: false,
            gpu,
            config,
            weights,
            slots,
        })
    }

    /// Takes the memory of passes of up to `rows` new tokens in `segments` sequences now, so that none fails later.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn reserve(&mut self, rows: usize, segments: usize) -> Result<()> {
        let sizes = largest_pass(&self.config, rows, segments);
        self.work.reserve(&self.gpu, &self.config, self.dtype, sizes)
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
        let tiled = Kernels::has_tiles(self.config.head_dim);
        let scale = adapter.map(|a| a.config().scale() as f32);
        self.inputs.fill(segments, scale, tiled, draws);
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
        let pass = Launches {
            cache: self,
            kernels: Kernels {
                gpu: &self.gpu,
                dtype: self.dtype,
            },
            adapter,
        };
        // Prompts come in too many shapes to be recorded; a step of decoding is one of few.
        match self.inputs.tiles == 0 && self.inputs.rows == self.inputs.segments {
            true => self.gpu.replay(pass.key()?, &mut || pass.all()),
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

/// Bytes on the GPU besides weights and cache of passes of up to `rows` new tokens in `segments` sequences.
#[cfg(feature = "cuda")]
pub(crate) fn pass_bytes(config: &ModelConfig, dtype: DType, rows: usize, segments: usize) -> usize {
    workspace::bytes(config, dtype, largest_pass(config, rows, segments))
}

impl Launches<'_> {
    /// Everything that the launches depend on, besides the words of the inputs.
    fn key(&self) -> Result<u64> {
        let (inputs, cache) = (&self.cache.inputs, self.cache);
        let mut hasher = DefaultHasher::new();
        (
            inputs.rows,
            inputs.singles,
            inputs.table_stride,
            cache.splits(),
            cache.draws,
        )
            .hash(&mut hasher);
        cache.work.generation.hash(&mut hasher);
        if let Some(adapter) = self.adapter {
            for layer in 0..cache.weights.layers.len() {
                for kind in LinearKind::ALL {
                    if let Some(term) = low_rank(&cache.gpu, adapter, layer, kind, 0)? {
                        (layer, kind as usize, term.a, term.b, term.rank).hash(&mut hasher);
                    }
                }
            }
        }
        Ok(hasher.finish())
    }

    fn input(&self, part: Part) -> Address {
        self.cache.inputs.address(self.cache.work.places.inputs, part)
    }

    fn all(&self) -> Result<()> {
        let (config, weights) = (&self.cache.config, &self.cache.weights);
        let (places, hidden) = (self.cache.work.places, config.hidden_size);
        let (rows, segments) = (self.cache.inputs.rows, self.cache.inputs.segments);
        let drawn = self.cache.drawn.address();
        // SAFETY: here and below, the workspace was made for this pass' sizes, the weights have the config's shapes, and
        // the inputs' slots and tables name blocks of this cache.
        unsafe {
            self.kernels
                .embed(places.x, weights.embed, self.input(Part::Tokens), drawn, rows, hidden)?;
        }
        for layer in 0..weights.layers.len() {
            self.attention(layer)?;
            // Behind the last layer the head reads each segment's last row alone.
            let last = layer + 1 == weights.layers.len();
            match last && rows > segments {
                true => self.keep_last_rows(layer)?,
                false => self.feed_forward(layer, places.x, places.mixed, rows)?,
            }
        }
        let x = if rows > segments { places.last_x } else { places.x };
        // SAFETY: as above.
        unsafe {
            self.kernels
                .rms_norm(places.normed, x, weights.norm, segments, hidden, weights.eps)?;
            self.cache.gpu.gemm(&Gemm {
                out: places.logits,
                x: places.normed,
                w: weights.lm_head,
                rows: segments,
                outputs: config.vocab_size,
                inputs: hidden,
                accumulate: false,
                dtype: self.kernels.dtype,
                out_dtype: DType::F32,
            })?;
            if self.cache.draws {
                self.kernels.sample(
                    drawn,
                    places.logits,
                    self.input(Part::Draws),
                    segments,
                    config.vocab_size,
                )?;
            }
        }
        Ok(())
    }

    /// What each row takes of those before it, into `mixed`.
    fn attention(&self, layer: usize) -> Result<()> {
        let (weights, inputs) = (&self.cache.weights, &self.cache.inputs);
        let (w, shape, cache) = (&weights.layers[layer], weights.shape, self.cache.layer(layer));
        let (places, hidden, rows) = (self.cache.work.places, self.cache.config.hidden_size, inputs.rows);
        let width = shape.q_width() + 2 * shape.kv_width();
        let rope = RopeInputs {
            cos: weights.cos,
            sin: weights.sin,
            positions: self.input(Part::Positions),
            slots: self.input(Part::Slots),
            bias: w.bias,
            q_norm: w.q_norm,
            k_norm: w.k_norm,
            eps: weights.eps,
        };
        let attend = AttendInputs {
            out: places.mixed,
            qkv: places.qkv,
            positions: rope.positions,
            sequence: self.input(Part::Sequence),
            tables: self.input(Part::Tables),
            table_stride: inputs.table_stride,
        };
        let element = self.kernels.dtype.size_in_bytes();
        // SAFETY: see `all`.
        unsafe {
            self.kernels
                .rms_norm(places.normed, places.x, w.input_norm, rows, hidden, weights.eps)?;
            self.kernels
                .linear(places.qkv, places.normed, w.qkv, (rows, width, hidden), false)?;
            let key = shape.q_width() * element;
            let value = (shape.q_width() + shape.kv_width()) * element;
            for (kind, offset) in [
                (LinearKind::QProj, 0),
                (LinearKind::KProj, key),
                (LinearKind::VProj, value),
            ] {
                let out = places.qkv + offset as Address;
                self.low_rank(layer, kind, out, width, places.normed, Part::Scales, rows)?;
            }
            self.kernels.rope_cache(places.qkv, cache, &rope, rows, shape)?;
            let singles = self.input(Part::Singles);
            let splits = self.cache.splits();
            self.kernels
                .attend_rows(&attend, cache, singles, inputs.singles, splits, places.partial, shape)?;
            let (first, count) = (self.input(Part::TileRows), self.input(Part::TileCounts));
            if inputs.tiles > 0 {
                self.kernels
                    .attend_tiles(&attend, cache, first, count, inputs.tiles, shape)?;
            }
        }
        Ok(())
    }

    /// The last layer's rest on each segment's last row.
    fn keep_last_rows(&self, layer: usize) -> Result<()> {
        let (places, segments) = (self.cache.work.places, self.cache.inputs.segments);
        let wanted = self.input(Part::LastRows);
        let hidden = self.cache.config.hidden_size;
        let q_width = self.cache.weights.shape.q_width();
        // SAFETY: see `all`.
        unsafe {
            self.kernels
                .gather_rows(places.last_x, places.x, wanted, segments, hidden)?;
            self.kernels
                .gather_rows(places.last_mixed, places.mixed, wanted, segments, q_width)?;
        }
        self.feed_forward(layer, places.last_x, places.last_mixed, segments)
    }

    /// `x += o(mixed)`, then `x += feed_forward(norm(x))`, on `rows` rows.
    fn feed_forward(&self, layer: usize, x: Address, mixed: Address, rows: usize) -> Result<()> {
        let (config, weights) = (&self.cache.config, &self.cache.weights);
        let (w, places) = (&weights.layers[layer], self.cache.work.places);
        let (hidden, inner, q_width) = (config.hidden_size, config.intermediate_size, weights.shape.q_width());
        let element = self.kernels.dtype.size_in_bytes();
        let scales = if x == places.x { Part::Scales } else { Part::LastScales };
        // SAFETY: see `all`.
        unsafe {
            self.kernels.linear(x, mixed, w.o, (rows, hidden, q_width), true)?;
            self.low_rank(layer, LinearKind::OProj, x, hidden, mixed, scales, rows)?;
            self.kernels
                .rms_norm(places.normed, x, w.post_norm, rows, hidden, weights.eps)?;
            self.kernels.linear(
                places.gate_up,
                places.normed,
                w.gate_up,
                (rows, 2 * inner, hidden),
                false,
            )?;
            for (kind, offset) in [(LinearKind::GateProj, 0), (LinearKind::UpProj, inner * element)] {
                let out = places.gate_up + offset as Address;
                self.low_rank(layer, kind, out, 2 * inner, places.normed, scales, rows)?;
            }
            self.kernels.swiglu(places.active, places.gate_up, rows, inner)?;
            self.kernels
                .linear(x, places.active, w.down, (rows, hidden, inner), true)?;
            self.low_rank(layer, LinearKind::DownProj, x, hidden, places.active, scales, rows)
        }
    }

    /// The adapter's term of one layer added to rows of `out`, where there is one.
    ///
    /// # Safety
    /// `out` holds `rows` rows, `stride` apart; `x` as many of the layer's inputs.
    #[allow(clippy::too_many_arguments)]
    unsafe fn low_rank(
        &self,
        layer: usize,
        kind: LinearKind,
        out: Address,
        stride: usize,
        x: Address,
        scales: Part,
        rows: usize,
    ) -> Result<()> {
        let Some(adapter) = self.adapter else {
            return Ok(());
        };
        let Some(term) = low_rank(&self.cache.gpu, adapter, layer, kind, stride)? else {
            return Ok(());
        };
        let low = self.cache.work.places.low;
        // SAFETY: the caller's promise.
        unsafe { self.kernels.add_low_rank(out, x, low, self.input(scales), rows, &term) }
    }
}
