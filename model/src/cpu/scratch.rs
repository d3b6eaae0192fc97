//! Buffers that training passes use again.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Buffers below this many elements are left to the allocator.
const SMALL: usize = 1 << 13;

/// Buffers given back, for the next that asks: fresh ones would be cleared, and their pages mapped, at every use.
///
/// Whenever a new one must be made, old ones of at least its size are let go: all together never take more than the most
/// that was in use at once.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Mutex<Vec<Vec<f32>>>);

impl Scratch {
    /// A buffer of `len` elements of any value.
    pub fn take(&self, len: usize) -> Vec<f32> {
        if len < SMALL {
            return vec![0.0; len];
        }
        let mut kept = self.kept();
        let fits = |buffer: &Vec<f32>| (len..=len + len / 2).contains(&buffer.capacity());
        if let Some(i) = kept.iter().rposition(fits) {
            let mut buffer = kept.remove(i);
            drop(kept);
            buffer.resize(len, 0.0);
            return buffer;
        }
        let mut freed = 0;
        while freed < len && !kept.is_empty() {
            freed += kept.remove(0).capacity();
        }
        drop(kept);
        vec![0.0; len]
    }

    /// A buffer with the elements of `data`.
    pub fn copy(&self, data: &[f32]) -> Vec<f32> {
        let mut buffer = self.take(data.len());
        buffer.copy_from_slice(data);
        buffer
    }

    /// Takes buffers back.
    pub fn give(&self, buffers: impl IntoIterator<Item = Vec<f32>>) {
        let large = buffers.into_iter().filter(|b| b.capacity() >= SMALL);
        self.kept().extend(large);
    }

    /// Frees all that nobody holds.
    pub fn clear(&self) {
        self.kept().clear();
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Vec<f32>>> {
        // The list is whole whatever a thread that held it did.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_and_others_make_room_for_a_new_one() {
        let scratch = Scratch::default();
        scratch.give([vec![1.0; 10_000], vec![2.0; 20_000]]);
        assert_eq!(scratch.take(9_000), vec![1.0; 9_000]);
        scratch.give([vec![1.0; 9_000]]);
        // None is near 100,000: both are let go.
        assert_eq!(scratch.take(100_000), vec![0.0; 100_000]);
        assert!(scratch.kept().is_empty());
    }
}
