//! A few panels' columns of a product: which tiles, in which order, from which memory.

use std::cell::Cell;
use std::ops::Range;

use super::instructions::Kernel;
use super::matrix::Panels;
use super::multiply::Product;
use super::panel::{FAR, Group, LANES, Lane, Output, Rows, ask_for, tile_of};
use super::registers::{Base, Vector};

/// Inner size of a block, whole 8-bit blocks: two panels' parts (32 KB) stay in the first-level cache while all rows pass.
pub(super) const INNER_BLOCK: usize = 256;

/// Room for the widened or turned part of as many panels as go together.
pub(super) type Wide = [[Lane; INNER_BLOCK]; 2];

/// Calls `f` with room that this thread keeps: it would be cleared for every part of every product. Not for use inside of a
/// [`Kernel`], whose instructions `f` would lack.
pub(super) fn with_room<T>(f: impl FnOnce(&mut Wide) -> T) -> T {
    thread_local! {
        static ROOM: Cell<Option<Box<Wide>>> = const { Cell::new(None) };
    }
    let mut room = ROOM.take().unwrap_or_else(|| Box::new([[Lane::ZERO; INNER_BLOCK]; 2]));
    let value = f(&mut room);
    ROOM.set(Some(room));
    value
}

/// Panels that are asked for while others are multiplied.
#[derive(Clone, Copy)]
pub(super) struct Next {
    /// Where the first lies.
    pub at: *const u8,
    /// Bytes from one to the next.
    pub panel: usize,
}

/// Some columns of a product.
pub(super) struct Columns<'a> {
    pub product: &'a Product<'a>,
    pub x: Rows<'a>,
    /// The first row and how many.
    pub rows: (usize, usize),
    /// Rows of a tile.
    pub tile: usize,
    /// The panels.
    pub panels: Range<usize>,
    /// What will be multiplied after these.
    pub next: Option<Next>,
    /// Where panels narrower than f32 are widened.
    pub wide: &'a mut Wide,
}

impl Kernel for Columns<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        match self.product.matrix.panels() {
            Panels::F32(lanes) => self.all::<V, _>(lanes),
            Panels::Q8(blocks) => self.all::<V, _>(blocks),
        }
    }
}

impl Columns<'_> {
    /// - `all`: the matrix's panels, `[outputs / 16][inputs, 16]`
    #[inline(always)]
    fn all<V: Vector, G: Group>(mut self, all: &[G]) {
        let whole = self.product.matrix.shape().0 / LANES;
        let mut p = self.panels.start;
        while p < self.panels.end {
            let left = self.panels.end.min(whole).saturating_sub(p);
            match V::together(self.tile).min(left) {
                0 => p += self.narrow::<V, _>(all, p),
                1 => p += self.group::<V, _, 1>(all, p),
                2 | 3 => p += self.group::<V, _, 2>(all, p),
                _ => p += self.group::<V, _, 4>(all, p),
            }
        }
    }

    /// The columns of `P` whole panels from `p` on.
    #[inline(always)]
    fn group<V: Vector, G: Group, const P: usize>(&mut self, all: &[G], p: usize) -> usize {
        let inputs = self.product.matrix.shape().1;
        let panels: [&[G]; P] = std::array::from_fn(|i| panel(all, inputs, p + i));
        let (first, height) = self.rows;
        for start in (0..inputs).step_by(INNER_BLOCK) {
            let k = (inputs - start).min(INNER_BLOCK);
            let accumulate = self.product.accumulate || start > 0;
            let part = panels.map(|p| &p[start / G::ROWS..][..k.div_ceil(G::ROWS)]);
            let ahead = self.ahead(panels, p, start + INNER_BLOCK);
            let ahead = ahead.as_ref().map_or(&[][..], |ahead| &ahead[..]);
            let x = self.x.columns_from(start);
            if height > self.tile && G::ROWS > 1 && P <= 2 {
                // Several tiles: widened once into the first-level cache, not once for each.
                let wide = widen::<V, _, P>(part, k, ahead, self.wide);
                for row in (first..first + height).step_by(self.tile) {
                    let rows = (first + height - row).min(self.tile);
                    let at = (row, p * LANES);
                    tile_of::<V, _, P>(x.from(row), rows, (wide, k), &self.product.out, at, accumulate, &[]);
                }
                continue;
            }
            for (t, row) in (first..first + height).step_by(self.tile).enumerate() {
                let rows = (first + height - row).min(self.tile);
                // What comes next is asked for evenly: by the only tile, or by the first tiles a panel each.
                let ahead = match height <= self.tile {
                    true => ahead,
                    false => ahead.get(t..t + 1).unwrap_or(&[]),
                };
                let at = (row, p * LANES);
                tile_of::<V, _, P>(x.from(row), rows, (part, k), &self.product.out, at, accumulate, ahead);
            }
        }
        P
    }

    /// Where the rows lie that will be multiplied after the block of `panels` before row `start`.
    #[inline(always)]
    fn ahead<G: Group, const P: usize>(&self, panels: [&[G]; P], p: usize, start: usize) -> Option<[*const G; P]> {
        let groups = panels[0].len();
        if start < groups * G::ROWS {
            return Some(panels.map(|p| p[start / G::ROWS..].as_ptr()));
        }
        let next = match p + P < self.panels.end {
            true => Next {
                at: panels[P - 1].as_ptr_range().end.cast(),
                panel: size_of_val(panels[0]),
            },
            // Where the next matrix is of another shape, as many rows of it are asked for.
            false => self.next?,
        };
        Some(std::array::from_fn(|i| next.at.wrapping_add(i * next.panel).cast()))
    }

    /// The last panel of a width that is no multiple of sixteen.
    #[inline(always)]
    fn narrow<V: Vector, G: Group>(&mut self, all: &[G], p: usize) -> usize {
        let (outputs, inputs) = self.product.matrix.shape();
        let (first, height) = self.rows;
        for row in (first..first + height).step_by(self.tile) {
            let rows = (first + height - row).min(self.tile);
            let panel = (panel(all, inputs, p), inputs);
            let at = (row, p * LANES, outputs - p * LANES);
            narrow_tile_of::<V, G>(
                self.x.from(row),
                rows,
                panel,
                &self.product.out,
                at,
                self.product.accumulate,
            );
        }
        1
    }
}

/// The first `k` rows of `panels` in f32.
#[inline(always)]
fn widen<'a, V: Vector, G: Group, const P: usize>(
    panels: [&[G]; P],
    k: usize,
    ahead: &[*const G],
    to: &'a mut Wide,
) -> [&'a [Lane]; P] {
    for (p, (panel, to)) in panels.iter().zip(to.iter_mut()).enumerate() {
        for (g, (group, to)) in panel.iter().zip(to[..k].chunks_mut(G::ROWS)).enumerate() {
            if let Some(ahead) = ahead.get(p) {
                ask_for::<_, FAR>(ahead.wrapping_add(g));
            }
            for (i, lane) in to.iter_mut().enumerate() {
                group.row::<V>(i).store(&mut lane.0);
            }
        }
    }
    std::array::from_fn(|p| &to[p][..k])
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
    panel[i / G::ROWS].row::<Base>(i % G::ROWS).store(&mut lane.0);
    lane
}

/// [`super::panel::tile`] for fewer than sixteen `columns` and any kind of panel, of which the first `k` rows count.
pub(super) fn narrow_tile<G: Group>(
    x: Rows,
    rows: usize,
    panel: (&[G], usize),
    out: &Output,
    at: (usize, usize, usize),
    accumulate: bool,
) {
    narrow_tile_of::<Base, G>(x, rows, panel, out, at, accumulate);
}

/// [`narrow_tile`] with at most [`Vector::ROWS`] rows.
#[inline(always)]
pub(super) fn narrow_tile_of<V: Vector, G: Group>(
    x: Rows,
    rows: usize,
    (panel, k): (&[G], usize),
    out: &Output,
    (row, column, columns): (usize, usize, usize),
    accumulate: bool,
) {
    const { assert!(V::ROWS <= 16) }
    let mut whole = [0f32; 16 * LANES];
    if accumulate {
        // Added up in the order of whole tiles: a sum depends on nothing but its row and its column.
        for (r, sums) in whole.chunks_exact_mut(LANES).take(rows).enumerate() {
            sums[..columns].copy_from_slice(out.part(row + r, column, columns));
        }
    }
    // SAFETY: one thread, and `whole` is read only when the product is there.
    let to = unsafe { Output::shared(&mut whole, LANES) };
    tile_of::<V, G, 1>(x, rows, ([panel], k), &to, (0, 0), accumulate, &[]);
    for (r, sums) in whole.chunks_exact(LANES).take(rows).enumerate() {
        out.part(row + r, column, columns).copy_from_slice(&sums[..columns]);
    }
}
