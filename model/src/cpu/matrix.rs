//! Frozen weights in panels, and the products with them.

use std::ops::{Range, RangeInclusive};
use std::sync::Arc;

use rayon::prelude::*;

use super::columns::{Columns, Wide, lane, panel, with_room};
use super::instructions::Instructions;
use super::memory::Memory;
use super::panel::{Group, LANES, Lane, Output, Rows};
use super::quantized::Q8Block;
use super::share::{Cost, share};

/// A frozen weight `[outputs, inputs]`, laid out as products read it: panels of sixteen outputs one behind the other,
/// each `[inputs, 16]`, the last filled up with zeros.
pub(crate) struct PackedMatrix {
    panels: Panels,
    outputs: usize,
    inputs: usize,
}

/// A product that is wanted: of the shared rows with `matrix`, `+=` where `accumulate`.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub matrix: &'a PackedMatrix,
    pub out: Output,
    pub accumulate: bool,
}

/// All panels of a matrix.
pub(super) enum Panels {
    F32(Memory<Lane>),
    Q8(Memory<Q8Block>),
}

/// Bytes of a block of rows: it stays in the second-level cache while all panels pass.
const ROW_BLOCK_BYTES: usize = 3 << 18;
/// Rows of a block all the same: with too few the weights would be read too often.
const BLOCK_ROWS: RangeInclusive<usize> = 96..=512;

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
        let start = self.address(0);
        // SAFETY: as many bytes as the panels take, all of them written when they were made: lanes and blocks are plain
        // numbers without padding.
        unsafe { std::slice::from_raw_parts(start, self.bytes()) }
    }

    /// The address of panel `p`, or of where it would be.
    pub(super) fn address(&self, p: usize) -> *const u8 {
        match &self.panels {
            Panels::F32(lanes) => lanes.as_ptr().wrapping_add(p * self.inputs).cast(),
            Panels::Q8(blocks) => blocks
                .as_ptr()
                .wrapping_add(p * self.inputs.div_ceil(Q8Block::ROWS))
                .cast(),
        }
    }
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix [{}, {}]", self.outputs, self.inputs)
    }
}

/// All of `products` with the same rows, shared out among the threads by panels.
///
/// - `x`: `[rows, inputs]` of every matrix
pub(crate) fn multiply(x: Rows, rows: usize, products: &[Product]) {
    multiply_with(Instructions::best(), x, rows, products);
}

/// [`multiply`] with certain instructions: any give the same bits.
pub(super) fn multiply_with(instructions: Instructions, x: Rows, rows: usize, products: &[Product]) {
    let inputs = products.iter().map(|p| p.matrix.inputs).max().unwrap_or(0);
    let blocks = RowBlocks::new(instructions, rows, inputs);
    let units = Units {
        together: instructions.together(blocks.tile),
        products,
    };
    let per_block = units.count();
    let cost = Cost {
        products: products.iter().map(|p| rows * p.matrix.outputs * p.matrix.inputs).sum(),
        bytes: products.iter().map(|p| p.matrix.bytes()).sum::<usize>() * blocks.count(),
    };
    let run = |range: Range<usize>, more: bool, wide: &mut Wide| {
        for unit in range.clone() {
            let Some((product, panels)) = units.get(unit % per_block) else {
                continue;
            };
            let next = (unit + 1 < range.end || more).then(|| units.get((unit + 1) % per_block));
            instructions.run(Columns {
                product,
                x,
                rows: blocks.rows(unit / per_block),
                tile: blocks.tile,
                panels,
                next: next.flatten().map(|(p, panels)| p.matrix.address(panels.start)),
                wide,
            });
        }
    };
    share(per_block * blocks.count(), cost, |range: Range<usize>, more: bool| {
        with_room(|room| run(range, more, room))
    });
}

/// Groups of panels of several products, one after the other.
struct Units<'a> {
    together: usize,
    products: &'a [Product<'a>],
}

impl<'a> Units<'a> {
    fn of(&self, product: &Product) -> usize {
        product.matrix.outputs.div_ceil(LANES).div_ceil(self.together)
    }

    fn count(&self) -> usize {
        self.products.iter().map(|p| self.of(p)).sum()
    }

    /// The product and the panels of a unit.
    fn get(&self, mut unit: usize) -> Option<(&'a Product<'a>, Range<usize>)> {
        for product in self.products {
            if unit < self.of(product) {
                let first = unit * self.together;
                let end = (first + self.together).min(product.matrix.outputs.div_ceil(LANES));
                return Some((product, first..end));
            }
            unit -= self.of(product);
        }
        None
    }
}

/// The rows of a product in blocks of tiles of nearly the same height.
pub(super) struct RowBlocks {
    rows: usize,
    /// Rows of a tile.
    pub tile: usize,
    block: usize,
}

impl RowBlocks {
    pub fn new(instructions: Instructions, rows: usize, inputs: usize) -> Self {
        let tiles = rows.div_ceil(instructions.tile_rows()).max(1);
        let tile = rows.div_ceil(tiles).max(1);
        let fit = (ROW_BLOCK_BYTES / (4 * inputs.max(1))).clamp(*BLOCK_ROWS.start(), *BLOCK_ROWS.end());
        // As many tiles in each block, or one less.
        let blocks = rows.div_ceil(fit).max(1);
        Self {
            rows,
            tile,
            block: tile * tiles.div_ceil(blocks),
        }
    }

    pub fn count(&self) -> usize {
        self.rows.div_ceil(self.block)
    }

    /// The first row of a block and how many it has.
    pub fn rows(&self, block: usize) -> (usize, usize) {
        let first = block * self.block;
        (first, (self.rows - first).min(self.block))
    }
}

/// The products of one weight, for callers that hold tensors.
pub(crate) fn product(x: &[f32], matrix: &Arc<PackedMatrix>) -> Vec<f32> {
    let rows = x.len() / matrix.inputs.max(1);
    let mut out = vec![0f32; rows * matrix.outputs];
    let product = Product {
        matrix,
        // SAFETY: `multiply` shares out columns, and `out` is read only when it has returned.
        out: unsafe { Output::shared(&mut out, matrix.outputs) },
        accumulate: false,
    };
    let x = Rows {
        data: x,
        stride: matrix.inputs,
    };
    multiply(x, rows, &[product]);
    out
}

#[cfg(test)]
mod tests;
