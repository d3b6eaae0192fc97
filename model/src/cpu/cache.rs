//! Keys and values in main memory, laid out as attention multiplies them.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};

use super::panel::{LANES, Lane};
use crate::ModelConfig;
use crate::kv_cache::BLOCK_TOKENS;

const _: () = assert!(BLOCK_TOKENS == LANES, "the keys of a block are one panel");

/// Keys and values of every layer, f32.
#[derive(Debug)]
pub(crate) struct HostCache {
    pub layers: Vec<LayerCache>,
}

/// One layer's keys and values.
///
/// A block of sixteen tokens holds, for each key and value head, the keys as a panel `[head_dim, 16 tokens]` and the
/// values as panels `[head_dim / 16][16 tokens, 16]`: scores and mixtures are then products with panels.
#[derive(Debug)]
pub(crate) struct LayerCache {
    keys: Vec<Lane>,
    values: Vec<Lane>,
    heads: usize,
    head_dim: usize,
}

impl HostCache {
    /// Room for `blocks` blocks. The memory is taken from the system as it is first written.
    pub fn new(config: &ModelConfig, blocks: usize) -> Self {
        let (heads, head_dim) = (config.num_key_value_heads, config.head_dim);
        let layer = |_| LayerCache {
            keys: zeroed(blocks * heads * head_dim),
            values: zeroed(blocks * heads * head_dim.div_ceil(LANES) * LANES),
            heads,
            head_dim,
        };
        Self {
            layers: (0..config.num_hidden_layers).map(layer).collect(),
        }
    }
}

impl LayerCache {
    /// Stores the token at `position` of the sequence that holds `blocks`.
    ///
    /// - `key`, `value`: `[heads * head_dim]`
    pub fn write(&mut self, blocks: &[u32], position: usize, key: &[f32], value: &[f32]) {
        let (block, token) = (blocks[position / LANES] as usize, position % LANES);
        let d = self.head_dim;
        for (head, key) in key.chunks_exact(d).enumerate() {
            let at = (block * self.heads + head) * d;
            for (lane, x) in self.keys[at..at + d].iter_mut().zip(key) {
                lane.0[token] = *x;
            }
        }
        let lanes = self.value_lanes();
        for (head, value) in value.chunks_exact(d).enumerate() {
            let at = (block * self.heads + head) * lanes;
            for (p, x) in value.chunks(LANES).enumerate() {
                self.values[at + p * LANES + token].0[..x.len()].copy_from_slice(x);
            }
        }
    }

    /// The keys of a block, `[head_dim, 16 tokens]`.
    pub fn keys(&self, block: u32, head: usize) -> &[Lane] {
        let at = (block as usize * self.heads + head) * self.head_dim;
        &self.keys[at..at + self.head_dim]
    }

    /// Sixteen elements, from `16 * p` on, of the values of a block's tokens, `[16 tokens, 16]`.
    pub fn values(&self, block: u32, head: usize, p: usize) -> &[Lane] {
        let at = (block as usize * self.heads + head) * self.value_lanes() + p * LANES;
        &self.values[at..at + LANES]
    }

    /// Lanes that the values of one head take in a block.
    fn value_lanes(&self) -> usize {
        self.head_dim.div_ceil(LANES) * LANES
    }
}

/// `len` lanes of zeros that the system hands out page by page, as they are touched: a cache may be far larger than
/// what is ever used of it.
fn zeroed(len: usize) -> Vec<Lane> {
    if len == 0 {
        return Vec::new();
    }
    let layout = Layout::array::<Lane>(len).unwrap_or_else(|_| panic!("a cache of {len} lanes"));
    // SAFETY: the layout is that of `len` lanes and not empty, all zeros is a lane, and a vector of that capacity is
    // freed with the same layout.
    unsafe {
        let data = alloc_zeroed(layout);
        if data.is_null() {
            handle_alloc_error(layout);
        }
        Vec::from_raw_parts(data.cast(), len, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_found_where_it_was_written() {
        let config = ModelConfig {
            num_key_value_heads: 2,
            head_dim: 20,
            ..crate::testing::config()
        };
        let mut cache = HostCache::new(&config, 3);
        let key: Vec<f32> = (0..40).map(|i| i as f32).collect();
        let value: Vec<f32> = (0..40).map(|i| -(i as f32)).collect();
        cache.layers[1].write(&[0, 2], 16 + 5, &key, &value);
        let layer = &cache.layers[1];
        for i in 0..40 {
            let (head, d) = (i / 20, i % 20);
            assert_eq!(layer.keys(2, head)[d].0[5], i as f32);
            assert_eq!(layer.values(2, head, d / 16)[5].0[d % 16], -(i as f32));
        }
        assert!(layer.keys(1, 0).iter().all(|lane| lane.0 == [0.0; 16]));
    }
}
