//! Memory of the device that goes from layer to layer, and from step to step.

use std::borrow::Borrow;

use candle_core::Result;

use super::Place;
use crate::gpu::Gpu;
use crate::gpu::backend::Buffer;
use crate::gpu::work::Address;

/// Memory of a pass.
pub(crate) struct Rows {
    place: Place,
    buffer: Buffer,
    bytes: usize,
}

impl Rows {
    fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        let buffer = gpu.alloc(bytes)?;
        let place = Place {
            address: buffer.address(),
        };
        Ok(Self { place, buffer, bytes })
    }

    pub fn address(&self) -> Address {
        self.place.address
    }
}

impl Borrow<Place> for Rows {
    fn borrow(&self) -> &Place {
        &self.place
    }
}

/// Memory given back, for the next that asks. Old pieces are let go where a new one would else take the sum of all beyond
/// the most that was in use at once.
#[derive(Default)]
pub(super) struct Pool {
    /// What nobody uses, the oldest first.
    spare: Vec<Rows>,
    /// Bytes, with those of what was dropped instead of given back, as after an error.
    in_use: usize,
    most_in_use: usize,
}

impl Pool {
    /// Memory of any value.
    ///
    /// # Errors
    /// The device has not that much.
    pub fn take(&mut self, gpu: &Gpu, bytes: usize) -> Result<Rows> {
        // A quarter too much at most: a layer's widths are further apart, so that none takes another's place.
        let fits = |rows: &Rows| (bytes..=bytes + bytes / 4).contains(&rows.bytes);
        let found = self.spare.iter().rposition(fits).map(|i| self.spare.remove(i));
        self.in_use += found.as_ref().map_or(bytes, |rows| rows.bytes);
        self.most_in_use = self.most_in_use.max(self.in_use);
        let mut rows = match found {
            Some(rows) => rows,
            None => {
                self.let_go();
                Rows::new(gpu, bytes)?
            }
        };
        rows.buffer.spoil();
        Ok(rows)
    }

    /// As many of the oldest as leave room for what is in use.
    fn let_go(&mut self) {
        let spare: usize = self.spare.iter().map(|rows| rows.bytes).sum();
        let mut excess = (self.in_use + spare).saturating_sub(self.most_in_use);
        while excess > 0 && !self.spare.is_empty() {
            excess = excess.saturating_sub(self.spare.remove(0).bytes);
        }
    }

    pub fn give(&mut self, rows: impl IntoIterator<Item = Rows>) {
        for rows in rows {
            self.in_use -= rows.bytes;
            self.spare.push(rows);
        }
    }

    pub fn clear(&mut self) {
        self.spare.clear();
        self.most_in_use = self.in_use;
    }
}

#[cfg(all(test, feature = "kernel-emulation"))]
mod tests {
    use super::*;

    #[test]
    fn all_together_never_take_more_than_was_in_use_at_once() -> Result<()> {
        let gpu = Gpu::new(&candle_core::Device::Cpu)?;
        let mut pool = Pool::default();
        let (a, b) = (pool.take(&gpu, 1000)?, pool.take(&gpu, 3000)?);
        let places = [a.address(), b.address()];
        pool.give([a, b]);
        // Both serve again, for a little less too, and what is far smaller gets memory of its own where there is room.
        let (b, a) = (pool.take(&gpu, 2900)?, pool.take(&gpu, 1000)?);
        assert_eq!([a.address(), b.address()], places);
        pool.give([b]);
        let small = pool.take(&gpu, 100)?;
        assert!(
            pool.spare.is_empty(),
            "1000 + 3000 + 100 is more than the 4000 of before"
        );
        pool.give([a, small]);
        assert_eq!(pool.spare.iter().map(|rows| rows.bytes).sum::<usize>(), 1100);
        let large = pool.take(&gpu, 2900)?;
        assert_eq!(pool.spare.len(), 2, "all fit in the 4000 of before");
        pool.give([large]);
        pool.clear();
        assert_eq!((pool.spare.len(), pool.in_use, pool.most_in_use), (0, 0, 0));
        Ok(())
    }
}
