//! Keys and values in main memory, laid out as attention multiplies them.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::marker::PhantomData;

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
    /// The cache for threads that fill and read it together.
    ///
    /// # Safety
    /// While it is used, no head of a block is written by one thread and used by another.
    pub unsafe fn shared(&mut self) -> SharedLayer<'_> {
        SharedLayer {
            keys: self.keys.as_mut_ptr(),
            values: self.values.as_mut_ptr(),
            blocks: self.keys.len() / (self.heads * self.head_dim).max(1),
            heads: self.heads,
            head_dim: self.head_dim,
            cache: PhantomData,
        }
    }
}

/// A [`LayerCache`] in the hands of several threads.
#[derive(Clone, Copy)]
pub(crate) struct SharedLayer<'a> {
    keys: *mut Lane,
    values: *mut Lane,
    blocks: usize,
    heads: usize,
    head_dim: usize,
    cache: PhantomData<&'a mut LayerCache>,
}

// SAFETY: whoever made it promised that no element is written by one thread while another uses it.
unsafe impl Send for SharedLayer<'_> {}
// SAFETY: as above.
unsafe impl Sync for SharedLayer<'_> {}

impl SharedLayer<'_> {
    /// Stores one head of token `token` of a block.
    ///
    /// - `key`, `value`: `[head_dim]`
    pub fn write(&self, (block, token): (u32, usize), head: usize, key: &[f32], value: &[f32]) {
        assert!(token < LANES && key.len() == self.head_dim && value.len() == self.head_dim);
        let (at, d) = (self.place(block, head), self.head_dim);
        // SAFETY: `place` is inside the cache, and so are the `head_dim` lanes of the head's keys there and the
        // `value_lanes` of its values; that they are this thread's was promised.
        unsafe {
            let keys = self.keys.add(at * d).cast::<f32>().add(token);
            for (i, x) in key.iter().enumerate() {
                *keys.add(i * LANES) = *x;
            }
            let values = self.values.add(at * self.value_lanes()).cast::<f32>();
            for (p, x) in value.chunks(LANES).enumerate() {
                let to = values.add((p * LANES + token) * LANES);
                std::ptr::copy_nonoverlapping(x.as_ptr(), to, x.len());
            }
        }
    }

    /// The keys of a block, `[head_dim, 16 tokens]`.
    pub fn keys(&self, block: u32, head: usize) -> &[Lane] {
        let at = self.place(block, head) * self.head_dim;
        // SAFETY: inside the cache; nobody writes it now, as was promised.
        unsafe { std::slice::from_raw_parts(self.keys.add(at), self.head_dim) }
    }

    /// The values of a block, `[head_dim / 16][16 tokens, 16]`.
    pub fn values(&self, block: u32, head: usize) -> &[Lane] {
        let at = self.place(block, head) * self.value_lanes();
        // SAFETY: as for the keys.
        unsafe { std::slice::from_raw_parts(self.values.add(at), self.value_lanes()) }
    }

    /// Heads before this one.
    fn place(&self, block: u32, head: usize) -> usize {
        assert!((block as usize) < self.blocks && head < self.heads, "outside the cache");
        block as usize * self.heads + head
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
        // SAFETY: one thread.
        let layer = unsafe { cache.layers[1].shared() };
        for (head, (key, value)) in key.chunks(20).zip(value.chunks(20)).enumerate() {
            layer.write((2, 5), head, key, value);
        }
        for i in 0..40 {
            let (head, d) = (i / 20, i % 20);
            assert_eq!(layer.keys(2, head)[d].0[5], i as f32);
            assert_eq!(layer.values(2, head)[d / 16 * 16 + 5].0[d % 16], -(i as f32));
        }
        assert!(layer.keys(1, 0).iter().all(|lane| lane.0 == [0.0; 16]));
    }

    #[test]
    #[should_panic(expected = "outside the cache")]
    fn a_block_that_is_not_there_is_refused() {
        let mut cache = HostCache::new(&crate::testing::config(), 3);
        // SAFETY: one thread.
        unsafe { cache.layers[0].shared() }.keys(3, 0);
    }
}
