//! Keys and values in main memory, laid out as attention multiplies them.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::marker::PhantomData;

use half::f16;

use super::panel::{Group, LANES, Lane};
use super::registers::Vector;
use crate::ModelConfig;
use crate::kv_cache::BLOCK_TOKENS;

const _: () = assert!(BLOCK_TOKENS == LANES, "the keys of a block are one panel");

/// Keys and values of every layer.
#[derive(Debug)]
pub(crate) enum HostCache {
    F32(Vec<LayerCache<Lane>>),
    /// Half the bytes: read in half the time where memory is what a step waits for.
    F16(Vec<LayerCache<HalfLane>>),
}

/// One layer's keys and values.
///
/// A block of sixteen tokens holds, for each key and value head, the keys as a panel `[head_dim, 16 tokens]` and the
/// values as panels `[head_dim / 16][16 tokens, 16]`: scores and mixtures are then products with panels.
#[derive(Debug)]
pub(crate) struct LayerCache<L> {
    keys: Vec<L>,
    values: Vec<L>,
    heads: usize,
    head_dim: usize,
}

impl HostCache {
    /// Room for `blocks` blocks in f32. The memory is taken from the system as it is first written.
    pub fn f32(config: &ModelConfig, blocks: usize) -> Self {
        Self::F32(layers(config, blocks))
    }

    /// The same in f16.
    pub fn f16(config: &ModelConfig, blocks: usize) -> Self {
        Self::F16(layers(config, blocks))
    }
}

fn layers<L: Stored>(config: &ModelConfig, blocks: usize) -> Vec<LayerCache<L>> {
    let (heads, head_dim) = (config.num_key_value_heads, config.head_dim);
    let layer = |_| LayerCache {
        keys: zeroed(blocks * heads * head_dim),
        values: zeroed(blocks * heads * head_dim.div_ceil(LANES) * LANES),
        heads,
        head_dim,
    };
    (0..config.num_hidden_layers).map(layer).collect()
}

/// Sixteen elements as a cache holds them.
///
/// # Safety
/// Bytes that are all zero are sixteen zeros of it, and it needs no drop.
pub(crate) unsafe trait Stored: Group + std::fmt::Debug {
    /// Puts `x` at place `i`, rounded to what the cache holds.
    fn set(&mut self, i: usize, x: f32);
}

// SAFETY: floats.
unsafe impl Stored for Lane {
    fn set(&mut self, i: usize, x: f32) {
        self.0[i] = x;
    }
}

/// Sixteen f16. What is too large for one is stored as the largest: infinity would make every later answer NaN.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(crate) struct HalfLane([f16; LANES]);

impl Group for HalfLane {
    const ROWS: usize = 1;

    #[inline(always)]
    fn row<V: Vector>(&self, _: usize) -> V {
        V::widened(&self.0)
    }
}

// SAFETY: floats of 16 bits, which are whole numbers to the compiler.
unsafe impl Stored for HalfLane {
    fn set(&mut self, i: usize, x: f32) {
        let most = f32::from(f16::MAX);
        self.0[i] = f16::from_f32(x.clamp(-most, most));
    }
}

impl<L: Stored> LayerCache<L> {
    /// The cache for threads that fill and read it together.
    ///
    /// # Safety
    /// While it is used, no head of a block is written by one thread and used by another.
    pub unsafe fn shared(&mut self) -> SharedLayer<'_, L> {
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
pub(crate) struct SharedLayer<'a, L> {
    keys: *mut L,
    values: *mut L,
    blocks: usize,
    heads: usize,
    head_dim: usize,
    cache: PhantomData<&'a mut LayerCache<L>>,
}

// SAFETY: whoever made it promised that no element is written by one thread while another uses it.
unsafe impl<L: Send> Send for SharedLayer<'_, L> {}
// SAFETY: as above.
unsafe impl<L: Sync> Sync for SharedLayer<'_, L> {}

impl<L: Stored> SharedLayer<'_, L> {
    /// Stores one head of token `token` of a block.
    ///
    /// - `key`, `value`: `[head_dim]`
    pub fn write(&self, (block, token): (u32, usize), head: usize, key: &[f32], value: &[f32]) {
        assert!(token < LANES && key.len() == self.head_dim && value.len() == self.head_dim);
        let (at, d) = (self.place(block, head), self.head_dim);
        // SAFETY: `place` is inside the cache, and so are the `head_dim` lanes of the head's keys there and the
        // `value_lanes` of its values; that they are this thread's was promised.
        unsafe {
            let keys = self.keys.add(at * d);
            for (i, x) in key.iter().enumerate() {
                (*keys.add(i)).set(token, *x);
            }
            let values = self.values.add(at * self.value_lanes());
            for (p, chunk) in value.chunks(LANES).enumerate() {
                let lane = &mut *values.add(p * LANES + token);
                chunk.iter().enumerate().for_each(|(i, x)| lane.set(i, *x));
            }
        }
    }

    /// The keys of a block, `[head_dim, 16 tokens]`.
    pub fn keys(&self, block: u32, head: usize) -> &[L] {
        let at = self.place(block, head) * self.head_dim;
        // SAFETY: inside the cache; nobody writes it now, as was promised.
        unsafe { std::slice::from_raw_parts(self.keys.add(at), self.head_dim) }
    }

    /// The values of a block, `[head_dim / 16][16 tokens, 16]`.
    pub fn values(&self, block: u32, head: usize) -> &[L] {
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
fn zeroed<L: Stored>(len: usize) -> Vec<L> {
    if len == 0 {
        return Vec::new();
    }
    let layout = Layout::array::<L>(len).unwrap_or_else(|_| panic!("a cache of {len} lanes"));
    // SAFETY: the layout is that of `len` lanes and not empty, all zeros is a lane, as `Stored` promises, and a vector of that
    // capacity is freed with the same layout.
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
    use super::super::instructions::{Instructions, Kernel};
    use super::super::registers::Base;
    use super::*;

    #[test]
    fn a_token_is_found_where_it_was_written() {
        let config = ModelConfig {
            num_key_value_heads: 2,
            head_dim: 20,
            ..crate::testing::config()
        };
        let mut cache = layers::<Lane>(&config, 3);
        let key: Vec<f32> = (0..40).map(|i| i as f32).collect();
        let value: Vec<f32> = (0..40).map(|i| -(i as f32)).collect();
        // SAFETY: one thread.
        let layer = unsafe { cache[1].shared() };
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
    fn sixteen_bits_hold_what_is_written_rounded_to_the_nearest_and_never_infinity() {
        let mut cache = layers::<HalfLane>(&crate::testing::config(), 2);
        // SAFETY: one thread.
        let layer = unsafe { cache[0].shared() };
        // Steps of f16 are 2^-11 of the power of two below.
        let (key, value) = (
            [1.0 + 1.4 / 1024.0; 8],
            [-1e9, 70_000.0, 0.1, -2.0, 0.0, 1e-9, 65_504.0, f32::NAN],
        );
        layer.write((1, 3), 1, &key, &value);
        let mut row = [0f32; LANES];
        layer.keys(1, 1)[4].row::<Base>(0).store(&mut row);
        assert_eq!(row[3], 1.0 + 1.0 / 1024.0);
        layer.values(1, 1)[3].row::<Base>(0).store(&mut row);
        assert_eq!(row[..7], [-65_504.0, 65_504.0, 0.099_975_586, -2.0, 0.0, 0.0, 65_504.0]);
        assert!(row[7].is_nan(), "what is no number is not hidden");
    }

    #[test]
    fn all_instructions_widen_every_number_of_sixteen_bits_alike() {
        struct Widen<'a>(&'a HalfLane, &'a mut [f32; LANES]);
        impl Kernel for Widen<'_> {
            #[inline(always)]
            fn run<V: Vector>(self) {
                self.0.row::<V>(0).store(self.1);
            }
        }
        for first in (0..=u16::MAX).step_by(LANES) {
            let half = HalfLane(std::array::from_fn(|i| f16::from_bits(first + i as u16)));
            for instructions in Instructions::all() {
                let mut got = [0f32; LANES];
                instructions.run(Widen(&half, &mut got));
                for (half, got) in half.0.iter().zip(got) {
                    assert!(
                        half.to_f32() == got || half.is_nan() && got.is_nan(),
                        "{instructions:?}: {half}"
                    );
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "outside the cache")]
    fn a_block_that_is_not_there_is_refused() {
        let mut cache = layers::<HalfLane>(&crate::testing::config(), 3);
        // SAFETY: one thread.
        unsafe { cache[0].shared() }.keys(3, 0);
    }
}
