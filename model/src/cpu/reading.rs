//! Reading weights and doing nothing with them: how fast a product can be at most where no cache holds them.

use super::PackedMatrix;
use super::panel::{FAR, ask_for};
use super::share::{Cost, Turn, share};

/// Bytes of a unit that threads share out.
const UNIT: usize = 1 << 16;
/// Cache lines that are asked for ahead of their reading.
const AHEAD: usize = 128;

/// Reads all weights once, on all threads, one matrix after the other; with `ahead` every line is asked for early, which
/// pays on some machines.
pub(crate) fn read_weights(matrices: &[&PackedMatrix], ahead: bool) {
    for matrix in matrices {
        let bytes = matrix.as_bytes();
        let cost = Cost {
            products: 0,
            bytes: bytes.len(),
        };
        share(bytes.len().div_ceil(UNIT), cost, |Turn { units, .. }| {
            let part = &bytes[units.start * UNIT..(units.end * UNIT).min(bytes.len())];
            // A sum that is looked at, so that the reading is not left out.
            std::hint::black_box(if ahead { fold::<true>(part) } else { fold::<false>(part) });
        });
    }
}

/// All cache lines, joined by exclusive or.
fn fold<const EARLY: bool>(bytes: &[u8]) -> [u64; 8] {
    let mut all = [[0u64; 8]; 4];
    for four in bytes.chunks_exact(256) {
        if EARLY {
            ask_for::<[u8; 256], FAR>(four.as_ptr().wrapping_add(64 * AHEAD).cast());
        }
        for (all, line) in all.iter_mut().zip(four.chunks_exact(64)) {
            for (all, word) in all.iter_mut().zip(line.chunks_exact(8)) {
                *all ^= u64::from_le_bytes(std::array::from_fn(|i| word[i]));
            }
        }
    }
    all.into_iter()
        .fold([0; 8], |sum, line| std::array::from_fn(|i| sum[i] ^ line[i]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_read() {
        // The last four lines differ from the others in one bit each.
        let mut bytes = vec![0u8; 1024];
        for (i, byte) in [768, 832 + 8, 896 + 16, 1023].into_iter().enumerate() {
            bytes[byte] = 1 << i;
        }
        let want = [1, 2, 4, 0, 0, 0, 0, 8 << 56];
        assert_eq!((fold::<false>(&bytes), fold::<true>(&bytes)), (want, want));
    }
}
