//! What the layers of one pass read besides activations and weights: where the sequences lie, and what is read of them.

use candle_core::{DType, Result};

use super::NO_ROW;
use crate::gpu::Gpu;
use crate::gpu::backend::Buffer;
use crate::gpu::kernels::{Tiles, packed_tile};
use crate::gpu::work::Address;
use crate::lora::AdaptedRows;

/// The inputs of one pass on the device.
pub(crate) struct PassInputs {
    _memory: Buffer,
    /// `[tokens]`: positions in the sequences.
    pub positions: Address,
    pub tokens: usize,
    /// Of a layer whose every row is read, and of the last.
    pub all: Reading,
    pub last: Reading,
    /// The rows that the adapter changes, where the backward pass stays within them.
    pub changed: Option<Reading>,
}

/// The rows that are read of a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading {
    pub queries: usize,
    /// `[queries]`: their packed rows; 0 where all are read.
    pub rows: Address,
    /// For each row whose input has a gradient its place among them; 0 where those are the same.
    pub places: Address,
    /// `[queries]`: their positions.
    pub positions: Address,
    /// `[queries]` f32: what the adapter's low-rank terms are multiplied by, 0 where it changes nothing.
    pub scales: Address,
    pub query_tiles: Tiles,
    pub key_tiles: Tiles,
}

impl PassInputs {
    /// - `lengths`: tokens of each sequence; `read`: packed rows that are read of the last layer, ascending; `changed`: those
    ///   that the backward pass stays within, where that is not all
    /// - `scale`: of the adapter's terms, and the rows that it changes where that is not all
    ///
    /// # Errors
    /// The device failed.
    pub fn new(
        gpu: &Gpu,
        dtype: DType,
        (lengths, positions): (&[usize], &[u32]),
        (read, changed): (&[u32], Option<&[u32]>),
        (scale, adapted): (f32, Option<&AdaptedRows>),
    ) -> Result<Self> {
        let (tokens, tile) = (positions.len(), packed_tile(dtype));
        let every: Vec<u32> = (0..tokens as u32).collect();
        let mut words = Words::default();
        let at = words.push(positions);
        let adapted = |row: u32| adapted.is_none_or(|rows| rows.changes(row as usize));
        let scale = |row: u32| if adapted(row) { scale } else { 0.0 };
        let mut reading = |read, inputs| words.reading(tile, (lengths, positions), (read, inputs), &scale);
        let all = reading(&every, &every);
        let last = match read.len() == tokens {
            true => all,
            false => reading(read, changed.unwrap_or(&every)),
        };
        let changed = changed.map(|changed| reading(changed, changed));
        let memory = gpu.alloc(4 * words.0.len())?;
        // SAFETY: the memory was just made for these words.
        unsafe { gpu.upload(memory.address(), &words.0)? };
        let base = memory.address();
        Ok(Self {
            positions: base + at,
            tokens,
            all: all.moved(base),
            last: last.moved(base),
            changed: changed.map(|changed| changed.moved(base)),
            _memory: memory,
        })
    }
}

impl Reading {
    fn moved(self, base: Address) -> Self {
        let moved = |at: Address| if at == 0 { 0 } else { at + base };
        let tiles = |tiles: Tiles| Tiles {
            words: tiles.words + base,
            ..tiles
        };
        Self {
            rows: moved(self.rows),
            places: moved(self.places),
            positions: self.positions + base,
            scales: self.scales + base,
            query_tiles: tiles(self.query_tiles),
            key_tiles: tiles(self.key_tiles),
            ..self
        }
    }
}

/// All inputs one behind the other. The positions of all tokens come first, so that no other lies at 0.
#[derive(Default)]
struct Words(Vec<u32>);

impl Words {
    /// Bytes from the start to where the words lie.
    fn push(&mut self, words: &[u32]) -> Address {
        let at = 4 * self.0.len();
        self.0.extend_from_slice(words);
        at as Address
    }

    fn reading(
        &mut self,
        tile: usize,
        (lengths, positions): (&[usize], &[u32]),
        (read, inputs): (&[u32], &[u32]),
        scale: &dyn Fn(u32) -> f32,
    ) -> Reading {
        let every = read.len() == positions.len();
        let asking: Vec<u32> = read.iter().map(|&row| positions[row as usize]).collect();
        let place = |row: &u32| read.binary_search(row).map_or(NO_ROW, |place| place as u32);
        let places: Vec<u32> = inputs.iter().map(place).collect();
        let scales: Vec<u32> = read.iter().map(|&row| scale(row).to_bits()).collect();
        let (query_words, key_words) = tiles(tile, lengths, (read, inputs));
        let mut tiles = |words: Vec<u32>| Tiles {
            count: words.len() / 4,
            words: self.push(&words),
        };
        let (query_tiles, key_tiles) = (tiles(query_words), tiles(key_words));
        Reading {
            queries: read.len(),
            rows: if every { 0 } else { self.push(read) },
            places: if read == inputs { 0 } else { self.push(&places) },
            positions: self.push(&asking),
            scales: self.push(&scales),
            query_tiles,
            key_tiles,
        }
    }
}

/// Tiles of `tile` queries and of `tile` keys, as `training_attention.cuh` describes them. A tile of keys names the queries from its own
/// first position on; which of those see which key, the kernel asks the positions. Keys whose input has no gradient have no
/// tile, unless one beside them has.
fn tiles(tile: usize, lengths: &[usize], (read, inputs): (&[u32], &[u32])) -> (Vec<u32>, Vec<u32>) {
    let (mut queries, mut keys, mut row) = (Vec::new(), Vec::new(), 0);
    let place = |rows: &[u32], row: usize| rows.partition_point(|&r| (r as usize) < row);
    for &length in lengths {
        let (begin, end) = (place(read, row), place(read, row + length));
        for first in (begin..end).step_by(tile) {
            let count = tile.min(end - first);
            queries.extend([first, count, row, 0].map(|word| word as u32));
        }
        for first in (row..row + length).step_by(tile) {
            let count = tile.min(row + length - first);
            if place(inputs, first) < place(inputs, first + count) {
                keys.extend([first, count, place(read, first), end].map(|word| word as u32));
            }
        }
        row += length;
    }
    (queries, keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_stay_within_a_sequence_and_keys_know_who_may_see_them() {
        // Sequences of 40, 0 and 3 tokens; rows 1, 33, 39, 42 are read.
        let (lengths, read) = ([40, 0, 3], [1, 33, 39, 42]);
        let every: Vec<u32> = (0..43).collect();
        let (queries, keys) = tiles(32, &lengths, (&read, &every));
        assert_eq!(queries, [0, 3, 0, 0, 3, 1, 40, 0]);
        assert_eq!(keys, [0, 32, 0, 3, 32, 8, 1, 3, 40, 3, 3, 4]);
        // Of keys 32, 34 and 41 alone a gradient is wanted.
        let (all_queries, keys) = tiles(32, &lengths, (&read, &[32, 34, 41]));
        assert_eq!(all_queries, queries);
        assert_eq!(keys, [32, 8, 1, 3, 40, 3, 3, 4]);
    }
}
