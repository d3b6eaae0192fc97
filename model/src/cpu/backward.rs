//! The products of a backward pass: gradients with a weight turned, and activations with gradients.

use std::ops::Range;

use super::PackedMatrix;
use super::columns::{INNER_BLOCK, Wide, narrow_tile_of, with_room};
use super::instructions::{Instructions, Kernel};
use super::multiply::RowBlocks;
use super::panel::{LANES, Lane, Output, Rows, tile_of, tile_turned_of};
use super::registers::Vector;
use super::share::{Cost, Turn, share};

/// A gradient `[rows, outputs]` and the weight that it goes back through.
#[derive(Clone, Copy)]
pub(crate) struct Turned<'a> {
    pub grad: &'a [f32],
    pub matrix: &'a PackedMatrix,
}

/// `out = Σ grad weight` over layers that had the same input, or `out += …`.
///
/// The weight's panels are turned as they are read, sixteen inputs at a time: for the rows of a block that is a small part
/// of the work, and a second copy of the weights would be half as much memory again.
///
/// - `out`: `[rows, inputs]`
pub(crate) fn multiply_turned(products: &[Turned], out: &mut [f32], accumulate: bool) {
    let Some((_, inputs)) = products.first().map(|p| p.matrix.shape()) else {
        return;
    };
    let rows = out.len() / inputs.max(1);
    assert!(
        products
            .iter()
            .all(|p| p.matrix.shape().1 == inputs && p.grad.len() == rows * p.matrix.shape().0),
        "gradients of another shape"
    );
    multiply_turned_with(Instructions::best(), products, (rows, inputs), out, accumulate);
}

/// [`multiply_turned`] with certain instructions, of gradients of the right shape: any give the same bits.
pub(super) fn multiply_turned_with(
    instructions: Instructions,
    products: &[Turned],
    (rows, inputs): (usize, usize),
    out: &mut [f32],
    accumulate: bool,
) {
    // SAFETY: each unit has rows and columns of its own, and `out` is touched again only when all are done.
    let out = unsafe { Output::shared(out, inputs) };
    let widest = products.iter().map(|p| p.matrix.shape().0).max().unwrap_or(0);
    let blocks = RowBlocks::new(instructions, rows, widest);
    let panels = inputs.div_ceil(LANES);
    let together = instructions.together(blocks.tile).min(2);
    let per_block = panels.div_ceil(together);
    let cost = Cost {
        products: products.iter().map(|p| p.grad.len() * inputs).sum(),
        bytes: products.iter().map(|p| p.matrix.bytes()).sum::<usize>() * blocks.count(),
    };
    let run = |units: Range<usize>, turned: &mut Wide| {
        for unit in units {
            let first = unit % per_block * together;
            let mut accumulate = accumulate;
            for product in products {
                instructions.run(TurnedColumns {
                    product,
                    rows: blocks.rows(unit / per_block),
                    tile: blocks.tile,
                    panels: first..(first + together).min(panels),
                    out: &out,
                    accumulate,
                    turned,
                });
                accumulate = true;
            }
        }
    };
    share(per_block * blocks.count(), cost, |turn| {
        with_room(|room| run(turn.units, room))
    });
}

/// Some columns of a product with a turned weight.
struct TurnedColumns<'a> {
    product: &'a Turned<'a>,
    /// The first row and how many.
    rows: (usize, usize),
    /// Rows of a tile.
    tile: usize,
    /// Of the columns, one or two.
    panels: Range<usize>,
    out: &'a Output,
    accumulate: bool,
    /// Where the weight's part is turned.
    turned: &'a mut Wide,
}

impl Kernel for TurnedColumns<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        let (outputs, inputs) = self.product.matrix.shape();
        let (column, columns) = (
            self.panels.start * LANES,
            inputs.min(self.panels.end * LANES) - self.panels.start * LANES,
        );
        for start in (0..outputs).step_by(INNER_BLOCK) {
            let k = (outputs - start).min(INNER_BLOCK);
            for (p, to) in self.turned.iter_mut().take(self.panels.len()).enumerate() {
                let width = (columns - p * LANES).min(LANES);
                for (i, lanes) in to[..k].chunks_mut(LANES).enumerate() {
                    let part = (column + p * LANES, width);
                    self.product.matrix.with_lanes(start / LANES + i, part, |weight| {
                        let weight = Rows {
                            data: weight.as_floats(),
                            stride: LANES,
                        };
                        turn(weight, width, lanes);
                    });
                }
            }
            let accumulate = self.accumulate || start > 0;
            let grad = Rows {
                data: self.product.grad,
                stride: outputs,
            };
            let [one, two] = &*self.turned;
            let (first, rows) = self.rows;
            for row in (first..first + rows).step_by(self.tile) {
                let height = (first + rows - row).min(self.tile);
                let grad = grad.from(row).columns_from(start);
                let at = (row, column);
                if columns == 2 * LANES {
                    tile_of::<V, _, 2>(grad, height, ([&one[..k], &two[..k]], k), self.out, at, accumulate, &[]);
                    continue;
                }
                for (p, panel) in self.turned.iter().take(self.panels.len()).enumerate() {
                    let at = (row, column + p * LANES);
                    match (columns - p * LANES).min(LANES) {
                        LANES => tile_of::<V, _, 1>(grad, height, ([&panel[..k]], k), self.out, at, accumulate, &[]),
                        width => {
                            let at = (at.0, at.1, width);
                            narrow_tile_of::<V, _>(grad, height, (&panel[..k], k), self.out, at, accumulate);
                        }
                    }
                }
            }
        }
    }
}

/// Columns of the left side that one unit of [`outer`] takes: whole tiles of both heights that there are.
const OUTER_COLUMNS: usize = 42;
/// Rows that pass before the next columns do: their part of the left side stays near.
const OUTER_ROWS: usize = 64;

/// `aᵀ b`, the gradient of a factor: `out[c, j] = Σ a[t, c] b[t, j]`.
///
/// - `a`: `[t, columns]`; `b`: `[t, n]`; `put` takes every `(c, j)` and its sum once
pub(crate) fn outer(a: &[f32], columns: usize, b: &[f32], n: usize, put: impl FnMut(usize, usize, f32)) {
    outer_with(Instructions::best(), (a, columns), (b, n), put);
}

/// [`outer`] with certain instructions: any give the same bits.
fn outer_with(
    instructions: Instructions,
    (a, columns): (&[f32], usize),
    (b, n): (&[f32], usize),
    mut put: impl FnMut(usize, usize, f32),
) {
    let rows = a.len() / columns.max(1);
    assert_eq!(b.len(), rows * n, "two sides of different rows");
    let mut sums = vec![0f32; columns * LANES];
    let mut panel = vec![Lane::ZERO; rows];
    for first in (0..n).step_by(LANES) {
        let width = (n - first).min(LANES);
        for (lane, row) in panel.iter_mut().zip(b.chunks_exact(n)) {
            *lane = Lane::ZERO;
            lane.0[..width].copy_from_slice(&row[first..first + width]);
        }
        // SAFETY: each unit has columns of its own, and the sums are read only when all are done.
        let out = unsafe { Output::shared(&mut sums, LANES) };
        let cost = Cost {
            products: rows * columns * LANES,
            bytes: size_of_val(a),
        };
        share(columns.div_ceil(OUTER_COLUMNS), cost, |Turn { units, .. }| {
            let all = units.start * OUTER_COLUMNS..(units.end * OUTER_COLUMNS).min(columns);
            instructions.run(OuterColumns {
                a: Rows {
                    data: a,
                    stride: columns,
                },
                panel: &panel,
                columns: all,
                out: &out,
            });
        });
        for (c, sums) in sums.chunks_exact(LANES).enumerate() {
            for (j, sum) in sums[..width].iter().enumerate() {
                put(c, first + j, *sum);
            }
        }
    }
}

/// Some rows of an outer product, sixteen columns wide.
struct OuterColumns<'a> {
    a: Rows<'a>,
    panel: &'a [Lane],
    columns: Range<usize>,
    out: &'a Output,
}

impl Kernel for OuterColumns<'_> {
    #[inline(always)]
    fn run<V: Vector>(self) {
        for start in self.columns.clone().step_by(OUTER_COLUMNS) {
            let end = (start + OUTER_COLUMNS).min(self.columns.end);
            for (block, panel) in self.panel.chunks(OUTER_ROWS).enumerate() {
                for c in (start..end).step_by(V::ROWS) {
                    let left = self.a.from(block * OUTER_ROWS).columns_from(c);
                    tile_turned_of::<V>(left, (end - c).min(V::ROWS), panel, self.out, (c, 0), block > 0);
                }
            }
        }
    }
}

/// `to[c][r] = from[r][c]` for `rows` rows, at most sixteen, of as many columns as there are lanes, at most sixteen; the
/// rest of the lanes becomes 0.
#[inline(always)]
pub(super) fn turn(from: Rows, rows: usize, to: &mut [Lane]) {
    if rows == LANES && to.len() == LANES {
        assert!(from.data.len() >= (LANES - 1) * from.stride + LANES, "too few rows");
        // SAFETY: sixteen rows of sixteen are readable, as the assert says, and sixteen lanes writable.
        return unsafe { turn_block(from.data.as_ptr(), from.stride, to.as_mut_ptr().cast()) };
    }
    for (c, lane) in to.iter_mut().enumerate() {
        *lane = Lane(std::array::from_fn(|r| {
            if r < rows { from.data[r * from.stride + c] } else { 0.0 }
        }));
    }
}

/// # Safety
/// Sixteen rows of sixteen elements, `stride` apart, are readable at `from`, and 256 elements are writable at `to`.
#[cfg(all(target_arch = "x86_64", target_feature = "avx2", target_feature = "fma"))]
#[inline(always)]
unsafe fn turn_block(from: *const f32, stride: usize, to: *mut f32) {
    use std::arch::x86_64::{
        _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_shuffle_ps, _mm256_storeu_ps, _mm256_unpackhi_ps,
        _mm256_unpacklo_ps,
    };
    // SAFETY: the caller's; each quarter reads eight rows of eight and writes eight columns of eight.
    unsafe {
        for (row, column) in [(0, 0), (0, 8), (8, 0), (8, 8)] {
            let r: [_; 8] = std::array::from_fn(|i| _mm256_loadu_ps(from.add((row + i) * stride + column)));
            // Pairs, then fours, then eights of rows are interleaved.
            let low: [_; 4] = std::array::from_fn(|i| _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]));
            let high: [_; 4] = std::array::from_fn(|i| _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]));
            let fours = |a: usize, pick: usize| match pick {
                0 => _mm256_shuffle_ps::<0x44>(low[a], low[a + 1]),
                1 => _mm256_shuffle_ps::<0xee>(low[a], low[a + 1]),
                2 => _mm256_shuffle_ps::<0x44>(high[a], high[a + 1]),
                _ => _mm256_shuffle_ps::<0xee>(high[a], high[a + 1]),
            };
            for pick in 0..4 {
                let (a, b) = (fours(0, pick), fours(2, pick));
                let at = to.add((column + pick) * LANES + row);
                _mm256_storeu_ps(at, _mm256_permute2f128_ps::<0x20>(a, b));
                _mm256_storeu_ps(at.add(4 * LANES), _mm256_permute2f128_ps::<0x31>(a, b));
            }
        }
    }
}

/// # Safety
/// As above.
#[cfg(not(all(target_arch = "x86_64", target_feature = "avx2", target_feature = "fma")))]
unsafe fn turn_block(from: *const f32, stride: usize, to: *mut f32) {
    for i in 0..LANES * LANES {
        // SAFETY: the caller's.
        unsafe { *to.add(i) = *from.add(i % LANES * stride + i / LANES) }
    }
}

/// A view of lanes as plain numbers.
trait Floats {
    fn as_floats(&self) -> &[f32];
}

impl Floats for [Lane] {
    fn as_floats(&self) -> &[f32] {
        // SAFETY: a lane is sixteen f32 in a row without padding.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), self.len() * LANES) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_turned_whole_or_in_part() {
        let data: Vec<f32> = (0..16 * 20).map(|i| i as f32).collect();
        let from = Rows {
            data: &data,
            stride: 20,
        };
        for (rows, columns) in [(16, 16), (16, 5), (3, 16), (1, 1)] {
            let mut to = vec![Lane([7.0; LANES]); columns];
            turn(from, rows, &mut to);
            for (c, lane) in to.iter().enumerate() {
                for (r, got) in lane.0.iter().enumerate() {
                    let want = if r < rows { (r * 20 + c) as f32 } else { 0.0 };
                    assert_eq!(*got, want, "row {r}, column {c} of {rows} x {columns}");
                }
            }
        }
    }

    #[test]
    fn the_outer_product_sums_over_rows() {
        // 150 rows are more than two blocks, 50 columns more than one job, 18 right columns more than one panel.
        let (rows, columns, n) = (150, 50, 18);
        let a: Vec<f32> = (0..rows * columns).map(|i| (i % 7) as f32 - 3.0).collect();
        let b: Vec<f32> = (0..rows * n).map(|i| (i % 5) as f32 - 2.0).collect();
        for &instructions in Instructions::all() {
            let mut seen = 0;
            outer_with(instructions, (&a, columns), (&b, n), |c, j, got| {
                let want: f32 = (0..rows).map(|t| a[t * columns + c] * b[t * n + j]).sum();
                assert_eq!(got, want, "column {c} with {j}, {instructions:?}");
                seen += 1;
            });
            assert_eq!(seen, columns * n);
        }
    }
}
