//! The buffers of a pass, which are kept from one to the next.

use candle_core::{DType, Result};

use super::Gpu;
use super::backend::Buffer;
use super::work::Address;
use crate::ModelConfig;

/// Rows, segments and other sizes that a pass needs room for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// New tokens.
    pub rows: usize,
    pub segments: usize,
    /// Words of [`super::inputs::Inputs`].
    pub input_words: usize,
    /// Elements of the row kernel's partial results.
    pub partial: usize,
    /// Of the adapter; 0 without one.
    pub rank: usize,
}

impl Sizes {
    /// Room for some more rows and segments: while slots fill each pass has a few more than the one before, and not all of
    /// them shall move the buffers, which makes recordings useless.
    fn with_more(self) -> Self {
        Self {
            rows: self.rows.next_multiple_of(256),
            segments: self.segments.next_multiple_of(256),
            input_words: self.input_words.next_power_of_two(),
            ..self
        }
    }

    /// Room for both.
    fn union(self, other: Self) -> Self {
        Self {
            rows: self.rows.max(other.rows),
            segments: self.segments.max(other.segments),
            input_words: self.input_words.max(other.input_words),
            partial: self.partial.max(other.partial),
            rank: self.rank.max(other.rank),
        }
    }
}

/// Where each buffer begins; T is the model's dtype.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Places {
    /// Words of the pass' inputs.
    pub inputs: Address,
    /// `[rows, hidden]` T: the residual stream.
    pub x: Address,
    /// `[rows, hidden]` T: what a norm gave.
    pub normed: Address,
    /// `[rows, (heads + 2 kv_heads) * head_dim]` T.
    pub qkv: Address,
    /// `[rows, heads * head_dim]` T.
    pub mixed: Address,
    /// `[rows, 2 * intermediate]` T.
    pub gate_up: Address,
    /// `[rows, intermediate]` T.
    pub active: Address,
    /// `[rows, rank]` f32.
    pub low: Address,
    /// The row kernel's partial results, f32.
    pub partial: Address,
    /// `[segments, hidden]` T.
    pub last_x: Address,
    /// `[segments, heads * head_dim]` T.
    pub last_mixed: Address,
    /// `[segments, vocab]` f32.
    pub logits: Address,
}

/// One piece of memory that holds them all.
#[derive(Default)]
pub(crate) struct Workspace {
    memory: Option<Buffer>,
    sizes: Sizes,
    pub places: Places,
    /// Counts how often the places changed: recordings of older places are of no use.
    pub generation: u64,
}

impl Workspace {
    /// Makes room, keeping what there is where it suffices. What the buffers held is lost when they grow.
    ///
    /// # Errors
    /// The device has not that much memory; the old buffers are gone then, too.
    pub fn reserve(&mut self, gpu: &Gpu, config: &ModelConfig, dtype: DType, wanted: Sizes) -> Result<()> {
        let sizes = self.sizes.union(wanted);
        if self.memory.is_some() && sizes == self.sizes {
            return Ok(());
        }
        // What was made in advance is as large as it was reckoned to be.
        let sizes = if self.memory.is_some() {
            sizes.with_more()
        } else {
            sizes
        };
        let (places, bytes) = places(config, dtype, sizes);
        // The old memory first: there may not be room for both.
        (self.memory, self.sizes) = (None, Sizes::default());
        let memory = gpu.alloc(bytes)?;
        self.places = places.moved(memory.address());
        (self.memory, self.sizes) = (Some(memory), sizes);
        self.generation += 1;
        Ok(())
    }
}

/// Bytes that a workspace of these sizes takes.
#[cfg(feature = "cuda")]
pub(crate) fn bytes(config: &ModelConfig, dtype: DType, sizes: Sizes) -> usize {
    places(config, dtype, sizes).1
}

/// The buffers one behind the other from 0, and their bytes together.
fn places(config: &ModelConfig, dtype: DType, sizes: Sizes) -> (Places, usize) {
    let (element, rows, segments) = (dtype.size_in_bytes(), sizes.rows, sizes.segments);
    let q_width = config.num_attention_heads * config.head_dim;
    let kv_width = config.num_key_value_heads * config.head_dim;
    let mut end = 0;
    let mut place = |elements: usize, bytes: usize| {
        let start = end;
        // 256: what cuBLAS and 16-byte loads like.
        end = (start + elements * bytes).next_multiple_of(256);
        start as Address
    };
    let places = Places {
        inputs: place(sizes.input_words, 4),
        x: place(rows * config.hidden_size, element),
        normed: place(rows * config.hidden_size, element),
        qkv: place(rows * (q_width + 2 * kv_width), element),
        mixed: place(rows * q_width, element),
        gate_up: place(rows * 2 * config.intermediate_size, element),
        active: place(rows * config.intermediate_size, element),
        low: place(rows * sizes.rank, 4),
        partial: place(sizes.partial, 4),
        last_x: place(segments * config.hidden_size, element),
        last_mixed: place(segments * q_width, element),
        logits: place(segments * config.vocab_size, 4),
    };
    (places, end)
}

impl Places {
    fn moved(self, base: Address) -> Self {
        Self {
            inputs: self.inputs + base,
            x: self.x + base,
            normed: self.normed + base,
            qkv: self.qkv + base,
            mixed: self.mixed + base,
            gate_up: self.gate_up + base,
            active: self.active + base,
            low: self.low + base,
            partial: self.partial + base,
            last_x: self.last_x + base,
            last_mixed: self.last_mixed + base,
            logits: self.logits + base,
        }
    }
}

#[cfg(all(test, feature = "kernel-emulation"))]
mod tests {
    use super::*;

    #[test]
    fn growing_pass_by_pass_moves_the_buffers_a_few_times() -> Result<()> {
        let gpu = Gpu::new(&candle_core::Device::Cpu)?;
        let (config, mut work) = (crate::testing::config(), Workspace::default());
        let mut moved = Vec::new();
        for segments in 270..600 {
            let sizes = Sizes {
                rows: 1000 + segments,
                segments,
                input_words: 24 * segments,
                ..Sizes::default()
            };
            let before = work.generation;
            work.reserve(&gpu, &config, DType::F32, sizes)?;
            if work.generation > before {
                moved.push(segments);
            }
        }
        // As asked for, all three, then for rows, words, segments and rows.
        assert_eq!(moved, [270, 271, 281, 342, 513, 537]);
        Ok(())
    }
}
