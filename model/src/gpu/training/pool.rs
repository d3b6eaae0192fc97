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
    pub fn address(&self) -> Address {
        self.place.address
    }
}

impl Borrow<Place> for Rows {
    fn borrow(&self) -> &Place {
        &self.place
    }
}

/// Memory given back, for the next that asks: as `cpu::Scratch`, whenever a new piece must be made, old ones of at least
/// its size are let go first.
#[derive(Default)]
pub(super) struct Pool(Vec<Rows>);

impl Pool {
    /// Memory of any value.
    ///
    /// # Errors
    /// The device has not that much.
    pub fn take(&mut self, gpu: &Gpu, bytes: usize) -> Result<Rows> {
        let fits = |rows: &Rows| (bytes..=bytes + bytes / 2).contains(&rows.bytes);
        let mut rows = match self.0.iter().rposition(fits) {
            Some(i) => self.0.remove(i),
            None => {
                let mut freed = 0;
                while freed < bytes && !self.0.is_empty() {
                    freed += self.0.remove(0).bytes;
                }
                let buffer = gpu.alloc(bytes)?;
                let place = Place {
                    address: buffer.address(),
                };
                Rows { place, buffer, bytes }
            }
        };
        rows.buffer.spoil();
        Ok(rows)
    }

    pub fn give(&mut self, rows: impl IntoIterator<Item = Rows>) {
        self.0.extend(rows);
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }
}
