//! Frozen weights in panels.

use rayon::prelude::*;

use super::columns::{Next, lane, panel};
use super::memory::Memory;
use super::panel::{Group, LANES, Lane};
use super::quantized::Q8Block;
use super::share::first_unit;

/// A frozen weight `[outputs, inputs]`, laid out as products read it: panels of sixteen outputs one behind the other,
/// each `[inputs, 16]`, the last filled up with zeros.
pub(crate) struct PackedMatrix {
    panels: Panels,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
}

/// All panels of a matrix.
pub(super) enum Panels {
    F32(Memory<Lane>),
    Q8(Memory<Q8Block>),
}

impl PackedMatrix {
    /// - `weight`: `[outputs, inputs]`, row by row
    pub fn pack(weight: &[f32], outputs: usize, inputs: usize) -> Self {
        assert_eq!(weight.len(), outputs * inputs, "a weight of another shape");
        let mut panels = Memory::filled(Lane::ZERO, outputs.div_ceil(LANES) * inputs);
        panels.par_chunks_mut(inputs.max(1)).enumerate().for_each(|(p, panel)| {
            for (j, row) in weight[p * LANES * inputs..]
                .chunks_exact(inputs)
                .take(LANES)
                .enumerate()
            {
                for (lane, value) in panel.iter_mut().zip(row) {
                    lane.0[j] = *value;
                }
            }
        });
        Self {
            panels: Panels::F32(panels),
            outputs,
            inputs,
        }
    }

    /// The nearest 8-bit weight.
    pub fn quantized(&self) -> Self {
        let groups = self.inputs.div_ceil(Q8Block::ROWS);
        let mut panels = Memory::filled(Q8Block::nearest(&[]), self.outputs.div_ceil(LANES) * groups);
        panels.par_chunks_mut(groups.max(1)).enumerate().for_each(|(p, panel)| {
            self.with_lanes(p, (0, self.inputs), |lanes| {
                let nearest = lanes.chunks(Q8Block::ROWS).map(Q8Block::nearest);
                panel
                    .iter_mut()
                    .zip(nearest)
                    .for_each(|(block, nearest)| *block = nearest);
            });
        });
        Self {
            panels: Panels::Q8(panels),
            outputs: self.outputs,
            inputs: self.inputs,
        }
    }

    /// Whether the weights have 8 bits.
    pub fn is_quantized(&self) -> bool {
        matches!(self.panels, Panels::Q8(_))
    }

    /// Bytes that the weights take.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(lanes) => size_of_val(&lanes[..]),
            Panels::Q8(blocks) => size_of_val(&blocks[..]),
        }
    }

    /// The weight again, `[outputs, inputs]`, row by row.
    pub fn unpack(&self) -> Vec<f32> {
        let mut weight = vec![0f32; self.outputs * self.inputs];
        for (p, rows) in weight.chunks_mut((LANES * self.inputs).max(1)).enumerate() {
            self.with_lanes(p, (0, self.inputs), |lanes| {
                for (j, row) in rows.chunks_exact_mut(self.inputs).enumerate() {
                    row.iter_mut().zip(lanes).for_each(|(out, lane)| *out = lane.0[j]);
                }
            });
        }
        weight
    }

    /// `(outputs, inputs)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    /// Calls `f` with `count` rows of panel `p`, from `first` on, in f32.
    pub(super) fn with_lanes<T>(&self, p: usize, (first, count): (usize, usize), f: impl FnOnce(&[Lane]) -> T) -> T {
        match &self.panels {
            Panels::F32(lanes) => f(&lanes[p * self.inputs..][first..first + count]),
            Panels::Q8(blocks) => {
                let panel = panel(blocks, self.inputs, p);
                f(&(first..first + count).map(|i| lane(panel, i)).collect::<Vec<_>>())
            }
        }
    }

    /// The weights as they are stored.
    pub(super) fn panels(&self) -> &Panels {
        &self.panels
    }

    /// The weights as bytes.
    pub(super) fn as_bytes(&self) -> &[u8] {
        // SAFETY: as many bytes as the panels take, all of them written when they were made: lanes and blocks are plain
        // numbers without padding.
        unsafe { std::slice::from_raw_parts(self.start(), self.bytes()) }
    }

    /// The panels from `p` on, to be asked for.
    pub(super) fn next(&self, p: usize) -> Next {
        let panel = match &self.panels {
            Panels::F32(_) => self.inputs * size_of::<Lane>(),
            Panels::Q8(_) => self.inputs.div_ceil(Q8Block::ROWS) * size_of::<Q8Block>(),
        };
        Next {
            at: self.start().wrapping_add(p * panel),
            panel,
        }
    }

    /// The panels that one of several threads begins with, where as many as `together` are shared out at once.
    pub(super) fn first(&self, together: usize, thread: (usize, usize)) -> Next {
        self.next(first_unit(self.groups(together), thread) * together)
    }

    /// How many groups of `together` panels there are.
    pub(super) fn groups(&self, together: usize) -> usize {
        self.outputs.div_ceil(LANES).div_ceil(together)
    }

    fn start(&self) -> *const u8 {
        match &self.panels {
            Panels::F32(lanes) => lanes.as_ptr().cast(),
            Panels::Q8(blocks) => blocks.as_ptr().cast(),
        }
    }
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix [{}, {}]", self.outputs, self.inputs)
    }
}
