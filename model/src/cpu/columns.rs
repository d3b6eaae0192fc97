//! A few panels' columns of a product: which tiles, in which order, from which memory.

use std::ops::Range;

use super::matrix::Product;
use super::panel::{Group, LANES, Lane, Output, Rows, TILE_ROWS, WIDE_PANELS, prefetch_behind, tile_of, wide_tile};

/// Inner size of a block, whole 8-bit blocks: a panel's part (24 KB) stays in the first-level cache while all rows pass.
pub(super) const INNER_BLOCK: usize = 384;

/// The columns of `panels` (at most [`WIDE_PANELS`]) of a product, for `rows` rows from a first one on.
///
/// - `all`: the matrix's panels, `[outputs / 16][inputs, 16]`
/// - `wide`: room for [`INNER_BLOCK`] lanes, where the panels are narrower than f32
pub(super) fn columns<G: Group>(
    (all, inputs): (&[G], usize),
    x: Rows,
    rows: (usize, usize),
    panels: Range<usize>,
    product: &Product,
    wide: Option<&mut [Lane]>,
) {
    let (first, height) = rows;
    if height == 1 && panels.len() == WIDE_PANELS && panels.end * LANES <= product.matrix.shape().0 {
        let x = &x.from(first).data[..inputs];
        let four = std::array::from_fn(|i| panel(all, inputs, panels.start + i));
        let to = (first, panels.start * LANES);
        return wide_tile(x, four, &product.out, to, product.accumulate);
    }
    let mut wide = wide.filter(|_| height > TILE_ROWS);
    for p in panels {
        let panel = panel(all, inputs, p);
        let mut part = Part {
            first,
            height,
            column: p * LANES,
            columns: (product.matrix.shape().0 - p * LANES).min(LANES),
            accumulate: product.accumulate,
        };
        for (block, groups) in panel.chunks(INNER_BLOCK / G::ROWS).enumerate() {
            let k = (inputs - block * INNER_BLOCK).min(INNER_BLOCK);
            let x = x.columns_from(block * INNER_BLOCK);
            part.accumulate = product.accumulate || block > 0;
            match &mut wide {
                // Several tiles: widened once into the first-level cache, not once for each.
                Some(wide) => {
                    (0..k).for_each(|i| wide[i] = lane(groups, i));
                    prefetch_behind(groups);
                    part.run::<_, false>(x, (&wide[..k], k), &product.out);
                }
                None => part.run::<_, true>(x, (groups, k), &product.out),
            }
        }
    }
}

/// Panel `p` of panels of `inputs` rows.
#[inline(always)]
pub(super) fn panel<G: Group>(all: &[G], inputs: usize, p: usize) -> &[G] {
    let groups = inputs.div_ceil(G::ROWS);
    &all[p * groups..][..groups]
}

/// Row `i` of a panel, in f32.
#[inline(always)]
pub(super) fn lane<G: Group>(panel: &[G], i: usize) -> Lane {
    let mut lane = Lane::ZERO;
    panel[i / G::ROWS].row(i % G::ROWS).store(&mut lane.0);
    lane
}

/// The part of a product that one panel gives.
struct Part {
    first: usize,
    height: usize,
    column: usize,
    columns: usize,
    accumulate: bool,
}

impl Part {
    /// Tile after tile with the first `k` rows of a panel; `AHEAD` as in [`tile_of`].
    #[inline(always)]
    fn run<G: Group, const AHEAD: bool>(&self, x: Rows, panel: (&[G], usize), out: &Output) {
        for (i, row) in (self.first..self.first + self.height).step_by(TILE_ROWS).enumerate() {
            let height = (self.first + self.height - row).min(TILE_ROWS);
            let (x, to) = (x.from(row), (row, self.column));
            match (self.columns, i) {
                // The first tile waits for its own panel; while the second runs, the memory has nothing else to do.
                (LANES, 1) => tile_of::<G, AHEAD>(x, height, panel, out, to, self.accumulate),
                (LANES, _) => tile_of::<G, false>(x, height, panel, out, to, self.accumulate),
                _ => self.narrow(x, (row, height), panel, out),
            }
        }
    }

    /// A tile of the last panel of a width that is no multiple of sixteen.
    fn narrow<G: Group>(&self, x: Rows, (row, height): (usize, usize), panel: (&[G], usize), out: &Output) {
        narrow_tile(x, height, panel, out, (row, self.column, self.columns), self.accumulate);
    }
}

/// [`tile_of`] for fewer than sixteen `columns`.
pub(super) fn narrow_tile<G: Group>(
    x: Rows,
    rows: usize,
    panel: (&[G], usize),
    out: &Output,
    (row, column, columns): (usize, usize, usize),
    accumulate: bool,
) {
    let mut whole = [0f32; TILE_ROWS * LANES];
    // SAFETY: one thread, and `whole` is read only when the product is there.
    let to = unsafe { Output::shared(&mut whole, LANES) };
    tile_of::<G, false>(x, rows, panel, &to, (0, 0), false);
    for (r, sums) in whole.chunks_exact(LANES).take(rows).enumerate() {
        for (out, sum) in out.part(row + r, column, columns).iter_mut().zip(sums) {
            *out = if accumulate { *out + sum } else { *sum };
        }
    }
}
