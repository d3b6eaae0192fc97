//! Products with frozen weights: which rows and panels go together, and which thread has them.

use std::ops::{Range, RangeInclusive};

use super::columns::{Columns, Wide, with_room};
use super::instructions::Instructions;
use super::matrix::PackedMatrix;
use super::panel::{LANES, Output, Rows};
use super::share::{Cost, Turn, share};
use crate::ops;

/// A product that is wanted: of the shared rows with `matrix`, `+=` where `accumulate`.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub matrix: &'a PackedMatrix,
    pub out: Output,
    pub accumulate: bool,
}

/// Bytes of a block of rows: it stays in the second-level cache while all panels pass.
const ROW_BLOCK_BYTES: usize = 3 << 18;
/// Rows of a block all the same: with too few the weights would be read too often.
const BLOCK_ROWS: RangeInclusive<usize> = 96..=512;

/// All of `products` with the same rows, shared out among the threads by panels.
///
/// - `x`: `[rows, inputs]` of every matrix
/// - `then`: what is likely to be multiplied next: its first panels are asked for while the last ones of these are multiplied
pub(crate) fn multiply(x: Rows, rows: usize, products: &[Product], then: Option<&PackedMatrix>) {
    multiply_with(Instructions::best(), x, rows, Wanted::Each(products), then);
}

/// `gate = silu(x gateᵀ) * (x upᵀ)`, where both products are of the same shape; `up` is left as it comes out of its own.
pub(crate) fn multiply_gated(x: Rows, rows: usize, gate_and_up: &[Product; 2], then: Option<&PackedMatrix>) {
    multiply_with(Instructions::best(), x, rows, Wanted::Gated(gate_and_up), then);
}

/// What is multiplied with the same rows.
#[derive(Clone, Copy)]
pub(super) enum Wanted<'a> {
    /// Products side by side.
    Each(&'a [Product<'a>]),
    /// Those of [`multiply_gated`]: a thread has the same columns of both, and is done with them when they come out.
    Gated(&'a [Product<'a>; 2]),
}

/// [`multiply`] or [`multiply_gated`] with certain instructions: any give the same bits.
pub(super) fn multiply_with(
    instructions: Instructions,
    x: Rows,
    rows: usize,
    wanted: Wanted,
    then: Option<&PackedMatrix>,
) {
    let products = wanted.products();
    let inputs = products.iter().map(|p| p.matrix.inputs).max().unwrap_or(0);
    let blocks = RowBlocks::new(instructions, rows, inputs);
    let together = instructions.together(blocks.tile);
    let units = Units { together, wanted };
    let per_block = units.count();
    let cost = Cost {
        products: products.iter().map(|p| rows * p.matrix.outputs * p.matrix.inputs).sum(),
        bytes: products.iter().map(|p| p.matrix.bytes()).sum::<usize>() * blocks.count(),
    };
    let run = |turn: Turn, wide: &mut Wide| {
        for unit in turn.units.clone() {
            let next = match unit + 1 < turn.units.end || turn.more {
                true => units
                    .parts(unit + 1)
                    .next()
                    .map(|(p, panels)| p.matrix.next(panels.start)),
                false => then.map(|then| then.first(together, turn.thread)),
            };
            let rows = blocks.rows(unit / per_block);
            let mut parts = units.parts(unit).peekable();
            while let Some((product, panels)) = parts.next() {
                let beside = parts.peek().map(|(p, panels)| p.matrix.next(panels.start));
                instructions.run(Columns {
                    product,
                    x,
                    rows,
                    tile: blocks.tile,
                    panels,
                    next: beside.or(next),
                    wide,
                });
            }
            units.finish(unit, rows);
        }
    };
    share(per_block * blocks.count(), cost, |turn| {
        with_room(|room| run(turn, room))
    });
}

impl<'a> Wanted<'a> {
    fn products(self) -> &'a [Product<'a>] {
        match self {
            Self::Each(products) => products,
            Self::Gated(products) => products,
        }
    }
}

/// Groups of panels, numbered on from one block of rows to the next.
struct Units<'a> {
    together: usize,
    wanted: Wanted<'a>,
}

impl<'a> Units<'a> {
    fn of(&self, product: &Product) -> usize {
        product.matrix.groups(self.together)
    }

    /// Those of a block of rows.
    fn count(&self) -> usize {
        match self.wanted {
            Wanted::Each(products) => products.iter().map(|p| self.of(p)).sum(),
            Wanted::Gated([gate, _]) => self.of(gate),
        }
    }

    /// The products and the panels of a unit.
    fn parts(&self, unit: usize) -> impl Iterator<Item = (&'a Product<'a>, Range<usize>)> {
        let unit = unit % self.count();
        let (products, group) = match self.wanted {
            Wanted::Each(products) => self.of_each(products, unit),
            Wanted::Gated(both) => (&both[..], unit),
        };
        let together = self.together;
        products.iter().map(move |p| (p, panels(p, together, group)))
    }

    /// The product that a unit belongs to, and which of its groups that is.
    fn of_each(&self, products: &'a [Product<'a>], mut unit: usize) -> (&'a [Product<'a>], usize) {
        for (i, product) in products.iter().enumerate() {
            if unit < self.of(product) {
                return (&products[i..=i], unit);
            }
            unit -= self.of(product);
        }
        (&[], 0)
    }

    /// What is left to do with a unit's columns when they are multiplied.
    fn finish(&self, unit: usize, (first, rows): (usize, usize)) {
        let Wanted::Gated([gate, up]) = self.wanted else {
            return;
        };
        let panels = panels(gate, self.together, unit % self.count());
        let start = panels.start * LANES;
        let columns = (panels.end * LANES).min(gate.matrix.outputs) - start;
        for row in first..first + rows {
            ops::swiglu_in_place(gate.out.part(row, start, columns), up.out.part(row, start, columns));
        }
    }
}

/// The panels of a product's group number `group`, of `together` each.
fn panels(product: &Product, together: usize, group: usize) -> Range<usize> {
    let first = group * together;
    first..(first + together).min(product.matrix.outputs.div_ceil(LANES))
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

/// `out = x wᵀ`, or `out += x wᵀ`, before `then` is multiplied.
///
/// - `x`: `[rows, inputs]`; `out`: `[rows, outputs]`
pub(crate) fn multiply_into(
    matrix: &PackedMatrix,
    x: &[f32],
    out: &mut [f32],
    accumulate: bool,
    then: Option<&PackedMatrix>,
) {
    let product = Product {
        matrix,
        // SAFETY: `multiply` shares out columns, and `out` is read only when it has returned.
        out: unsafe { Output::shared(out, matrix.outputs) },
        accumulate,
    };
    let rows = Rows {
        data: x,
        stride: matrix.inputs,
    };
    multiply(rows, x.len() / matrix.inputs.max(1), &[product], then);
}

/// [`multiply_into`] new memory.
pub(crate) fn product(x: &[f32], matrix: &PackedMatrix) -> Vec<f32> {
    let mut out = vec![0f32; x.len() / matrix.inputs.max(1) * matrix.outputs];
    multiply_into(matrix, x, &mut out, false, None);
    out
}

#[cfg(test)]
mod tests;
