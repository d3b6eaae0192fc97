//! The one inner loop of the CPU path: a few rows times a panel of sixteen columns.

use super::registers::Registers;

/// Columns of a panel: two AVX registers of f32, one cache line.
pub(crate) const LANES: usize = 16;

/// Rows that are multiplied together: twelve accumulators, two registers of the panel and one of the rows are fifteen
/// of the sixteen there are.
pub(crate) const TILE_ROWS: usize = 6;

/// One row of a panel, on a cache line of its own.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Lane(pub [f32; LANES]);

impl Lane {
    pub const ZERO: Self = Self([0.0; LANES]);
}

/// The rows on the left of a product: row r begins at `r * stride`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

impl<'a> Rows<'a> {
    /// The rows from `first` on.
    pub fn from(self, first: usize) -> Self {
        Self {
            data: &self.data[first * self.stride..],
            stride: self.stride,
        }
    }

    /// The columns from `first` on.
    pub fn columns_from(self, first: usize) -> Self {
        Self {
            data: &self.data[first..],
            stride: self.stride,
        }
    }
}

/// Where a product goes: rows of `width`, whose parts several threads may write, each its own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    data: *mut f32,
    len: usize,
    pub(super) width: usize,
}

// SAFETY: whoever makes one promises that no element is used by two threads; see `Output::shared`.
unsafe impl Send for Output {}
// SAFETY: as above.
unsafe impl Sync for Output {}

impl Output {
    /// All of `data`, in rows of `width`.
    ///
    /// # Safety
    /// While the output is used `data` lives, nothing else touches it, and no two threads touch the same element.
    pub unsafe fn shared(data: &mut [f32], width: usize) -> Self {
        Self {
            data: data.as_mut_ptr(),
            len: data.len(),
            width,
        }
    }

    /// `len` elements from column `column` of row `row` on.
    #[allow(clippy::mut_from_ref)]
    pub fn part(&self, row: usize, column: usize, len: usize) -> &mut [f32] {
        // SAFETY: the pointer is checked; that nobody else holds this part was promised at the beginning.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(row, column, 1, len), len) }
    }

    /// Where `rows` rows of `columns` elements begin, all of them inside the data.
    pub(super) fn pointer(&self, row: usize, column: usize, rows: usize, columns: usize) -> *mut f32 {
        let start = row * self.width + column;
        let end = start + (rows - 1) * self.width + columns;
        assert!(end <= self.len, "output too small");
        // SAFETY: `start` is inside the data.
        unsafe { self.data.add(start) }
    }
}

/// Consecutive rows of a panel as they are stored: [`Lane`]s, or something narrower that is widened as it is read.
pub(crate) trait Group: Copy + Send + Sync {
    /// Rows that one holds.
    const ROWS: usize;

    /// Row `i`, below [`Group::ROWS`].
    fn row(&self, i: usize) -> Registers;
}

impl Group for Lane {
    const ROWS: usize = 1;

    #[inline(always)]
    fn row(&self, _: usize) -> Registers {
        Registers::load(&self.0)
    }
}

/// `out = a panel`, or `out += a panel`, for `rows` rows, at most [`TILE_ROWS`].
///
/// - `a`: `[rows, panel.len()]`
/// - `panel`: `[k, LANES]`
/// - `out` and `(row, column)`: where the `[rows, LANES]` go
#[inline(always)]
pub(crate) fn tile(
    a: Rows,
    rows: usize,
    panel: &[Lane],
    out: &Output,
    (row, column): (usize, usize),
    accumulate: bool,
) {
    tile_of::<Lane, false>(a, rows, (panel, panel.len()), out, (row, column), accumulate);
}

/// [`tile`] for a panel of any kind, whose first `k` rows count. With `AHEAD` it asks for what lies behind the panel, row
/// by row: the next panel then comes while this one is multiplied, not when it is needed.
#[inline(always)]
pub(crate) fn tile_of<G: Group, const AHEAD: bool>(
    a: Rows,
    rows: usize,
    (panel, k): (&[G], usize),
    out: &Output,
    (row, column): (usize, usize),
    accumulate: bool,
) {
    if rows == 0 {
        return;
    }
    assert!(k <= panel.len() * G::ROWS, "panel too short");
    assert!(
        k == 0 || a.data.len() >= (rows - 1) * a.stride + k,
        "rows too short for the panel"
    );
    let (a, out) = (
        (a.data.as_ptr(), a.stride),
        (out.pointer(row, column, rows, LANES), out.width),
    );
    let panel = [panel];
    // SAFETY: the asserts and `pointer` keep `rows` rows of `k` elements inside `a`, `k` rows inside the panel, and as
    // many rows of `LANES` elements inside `out`.
    unsafe {
        match rows {
            1 => run::<G, 1, 1, AHEAD>(a, panel, k, out, accumulate),
            2 => run::<G, 2, 1, AHEAD>(a, panel, k, out, accumulate),
            3 => run::<G, 3, 1, AHEAD>(a, panel, k, out, accumulate),
            4 => run::<G, 4, 1, AHEAD>(a, panel, k, out, accumulate),
            5 => run::<G, 5, 1, AHEAD>(a, panel, k, out, accumulate),
            TILE_ROWS => run::<G, TILE_ROWS, 1, AHEAD>(a, panel, k, out, accumulate),
            _ => unreachable!("a tile has at most {TILE_ROWS} rows"),
        }
    }
}

/// Panels that are multiplied with a single row together: one panel's two sums would wait for each other.
pub(crate) const WIDE_PANELS: usize = 4;

/// [`tile_of`] for one row and [`WIDE_PANELS`] panels that lie one behind the other, `[WIDE_PANELS][k, LANES]`.
///
/// - `a`: `[k]`
/// - `out` and `(row, column)`: where the `WIDE_PANELS * LANES` sums go
#[inline(always)]
pub(crate) fn wide_tile<G: Group>(
    a: &[f32],
    panels: [&[G]; WIDE_PANELS],
    out: &Output,
    (row, column): (usize, usize),
    accumulate: bool,
) {
    let k = a.len();
    assert!(panels.iter().all(|p| k <= p.len() * G::ROWS), "panel too short");
    let to = out.pointer(row, column, 1, WIDE_PANELS * LANES);
    // SAFETY: as in `tile_of`.
    unsafe { run::<G, 1, WIDE_PANELS, false>((a.as_ptr(), 0), panels, k, (to, 0), accumulate) }
}

/// The first `k` rows of `P` panels times `M` rows.
///
/// # Safety
/// `M` rows of `k` elements are readable at `a`, `k` rows of each panel are there, and `M` rows of `P * LANES` are
/// writable at `out`.
#[inline(always)]
unsafe fn run<G: Group, const M: usize, const P: usize, const AHEAD: bool>(
    (a, stride): (*const f32, usize),
    panels: [&[G]; P],
    k: usize,
    (out, out_stride): (*mut f32, usize),
    accumulate: bool,
) {
    // SAFETY: the caller vouches for the rows and the panels.
    unsafe {
        let mut sums = [[Registers::zero(); P]; M];
        if accumulate {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (p, sum) in sums.iter_mut().enumerate() {
                    *sum = Registers::load(&*out.add(r * out_stride + p * LANES).cast());
                }
            }
        }
        for g in 0..k.div_ceil(G::ROWS) {
            let first = g * G::ROWS;
            if AHEAD {
                ask_for(panels[0].as_ptr().wrapping_add(panels[0].len() + g));
            }
            let count = if G::ROWS == 1 { 1 } else { (k - first).min(G::ROWS) };
            for i in 0..count {
                let rows: [Registers; P] = std::array::from_fn(|p| panels[p].get_unchecked(g).row(i));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = *a.add(r * stride + first + i);
                    for (sum, row) in sums.iter_mut().zip(&rows) {
                        *sum = sum.plus(x, *row);
                    }
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            for (p, sum) in sums.iter().enumerate() {
                sum.store(&mut *out.add(r * out_stride + p * LANES).cast());
            }
        }
    }
}

/// Asks for a panel that will be read soon.
#[inline(always)]
pub(crate) fn prefetch(panel: &[Lane]) {
    for lane in panel {
        ask_for(lane);
    }
}

/// Asks for as many groups as there are in `panel`, from behind it.
#[inline(always)]
pub(crate) fn prefetch_behind<G: Group>(panel: &[G]) {
    for i in 0..panel.len() {
        ask_for(panel.as_ptr().wrapping_add(panel.len() + i));
    }
}

/// Asks for every cache line of `at`, which may lie anywhere.
#[inline(always)]
fn ask_for<T>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..size_of::<T>().div_ceil(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that the program sees, faults nowhere, and every x86-64 processor has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(64 * line)) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    use super::super::turned::tile_turned;
    use super::*;

    #[test]
    fn tiles_of_every_height_equal_the_sums_they_stand_for() {
        let k = 5;
        let value = |i: usize| (i * 7 % 11) as f32 - 5.0;
        let panel: Vec<Lane> = (0..k)
            .map(|i| Lane(std::array::from_fn(|j| value(i * 3 + j))))
            .collect();
        for rows in 1..=TILE_ROWS {
            let stride = k + 2;
            let a: Vec<f32> = (0..rows * stride).map(value).collect();
            let want = |r: usize, j: usize| (0..k).map(|i| a[r * stride + i] * panel[i].0[j]).sum::<f32>();
            let mut data = vec![1.0; rows * 20];
            let left = Rows { data: &a, stride };
            // SAFETY: one thread, and `data` is read only after the last use.
            let out = unsafe { Output::shared(&mut data, 20) };
            tile(left, rows, &panel, &out, (0, 2), true);
            let turned: Vec<f32> = (0..k * rows).map(|i| a[i % rows * stride + i / rows]).collect();
            let left = Rows {
                data: &turned,
                stride: rows,
            };
            tile_turned(left, rows, &panel, &out, (0, 2), true);
            for r in 0..rows {
                let row = &data[r * 20..][..20];
                for j in 0..LANES {
                    assert_eq!(row[j + 2], 1.0 + 2.0 * want(r, j), "row {r} of {rows}, column {j}");
                }
                assert!(
                    [row[0], row[1], row[18], row[19]].iter().all(|v| *v == 1.0),
                    "written past the columns"
                );
            }
        }
    }

    #[test]
    #[should_panic(expected = "output too small")]
    fn a_tile_that_does_not_fit_is_refused() {
        let mut data = vec![0.0; 20];
        // SAFETY: one thread.
        let out = unsafe { Output::shared(&mut data, 20) };
        tile(
            Rows {
                data: &[1.0],
                stride: 1,
            },
            1,
            &[Lane::ZERO],
            &out,
            (0, 5),
            false,
        );
    }
}
