//! The one inner loop of the CPU path: a few rows times a panel of sixteen columns.

use super::registers::{Base, Vector};

/// Columns of a panel: two AVX registers of f32, one cache line.
pub(crate) const LANES: usize = 16;

/// Rows that [`tile`] multiplies together.
pub(crate) const TILE_ROWS: usize = Base::ROWS;

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
    fn row<V: Vector>(&self, i: usize) -> V;
}

impl Group for Lane {
    const ROWS: usize = 1;

    #[inline(always)]
    fn row<V: Vector>(&self, _: usize) -> V {
        V::load(&self.0)
    }
}

/// `out = a panel`, or `out += a panel`, for `rows` rows, at most [`TILE_ROWS`].
///
/// - `a`: `[rows, panel.len()]`
/// - `panel`: `[k, LANES]`
/// - `out` and `(row, column)`: where the `[rows, LANES]` go
#[inline(always)]
pub(crate) fn tile(a: Rows, rows: usize, panel: &[Lane], out: &Output, at: (usize, usize), accumulate: bool) {
    tile_of::<Base, Lane, 1>(a, rows, ([panel], panel.len()), out, at, accumulate, &[]);
}

/// [`tile`] for the first `k` rows of `P` panels side by side, of any kind, with at most [`Vector::ROWS`] rows. It asks for
/// what lies at `ahead`, one panel's or all panels' rows: what is multiplied next then comes while this is multiplied, not
/// when it is needed.
#[inline(always)]
pub(crate) fn tile_of<V: Vector, G: Group, const P: usize>(
    a: Rows,
    rows: usize,
    (panels, k): ([&[G]; P], usize),
    out: &Output,
    (row, column): (usize, usize),
    accumulate: bool,
    ahead: &[*const G],
) {
    if rows == 0 {
        return;
    }
    assert!(panels.iter().all(|p| k <= p.len() * G::ROWS), "panel too short");
    assert!(
        k == 0 || a.data.len() >= (rows - 1) * a.stride + k,
        "rows too short for the panel"
    );
    let tile = Tile {
        a: a.data.as_ptr(),
        stride: a.stride,
        panels: panels.map(<[G]>::as_ptr),
        k,
        out: out.pointer(row, column, rows, P * LANES),
        width: out.width,
        accumulate,
        ahead: std::array::from_fn(|p| ahead.get(p).copied().unwrap_or(std::ptr::null())),
    };
    // SAFETY: the asserts and `pointer` keep `rows` rows of `k` elements inside `a`, `k` rows inside each panel, and as
    // many rows of `P * LANES` elements inside `out`.
    unsafe {
        match ahead.len() {
            0 => V::dispatch::<G, P, 0, false>(rows, tile),
            1 => V::dispatch::<G, P, 1, false>(rows, tile),
            _ => V::dispatch::<G, P, P, false>(rows, tile),
        }
    }
}

/// [`tile`] for panels and a left side that lies turned: `a` is `[panel.len(), rows]`, one row per row of the panel.
#[inline(always)]
pub(crate) fn tile_turned_of<V: Vector>(
    a: Rows,
    rows: usize,
    panel: &[Lane],
    out: &Output,
    (row, column): (usize, usize),
    accumulate: bool,
) {
    if rows == 0 {
        return;
    }
    assert!(
        panel.is_empty() || a.data.len() >= (panel.len() - 1) * a.stride + rows,
        "too few rows for the panel"
    );
    let tile = Tile {
        a: a.data.as_ptr(),
        stride: a.stride,
        panels: [panel.as_ptr()],
        k: panel.len(),
        out: out.pointer(row, column, rows, LANES),
        width: out.width,
        accumulate,
        ahead: [std::ptr::null()],
    };
    // SAFETY: as in `tile_of`, with rows and columns of `a` changed over.
    unsafe { V::dispatch::<Lane, 1, 0, true>(rows, tile) }
}

/// What one run of the inner loop works on.
#[derive(Clone, Copy)]
pub(crate) struct Tile<G, const P: usize> {
    a: *const f32,
    stride: usize,
    panels: [*const G; P],
    k: usize,
    out: *mut f32,
    width: usize,
    accumulate: bool,
    ahead: [*const G; P],
}

impl<G: Group, const P: usize> Tile<G, P> {
    /// The first `k` rows of the panels times `M` rows, or, where `T`, times `M` columns of `k` rows; asks for the rows at the
    /// first `A` of `ahead`.
    ///
    /// # Safety
    /// `M` rows of `k` elements (or `k` of `M`) are readable at `a`, `k` rows of each panel are there, `M` rows of
    /// `P * LANES` are writable at `out`, and the processor has the instructions of `V`.
    #[inline(always)]
    pub(super) unsafe fn run<V: Vector, const M: usize, const A: usize, const T: bool>(self) {
        // SAFETY: the caller vouches for the rows and the panels.
        unsafe {
            let mut sums = [[V::zero(); P]; M];
            if self.accumulate {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (p, sum) in sums.iter_mut().enumerate() {
                        *sum = V::load(&*self.out.add(r * self.width + p * LANES).cast());
                    }
                }
            }
            let groups = self.k.div_ceil(G::ROWS);
            let at_once = const { if M * P <= UNROLLED_SUMS { UNROLLED } else { 1 } };
            let whole = self.k / G::ROWS / at_once * at_once;
            for turn in 0..whole / at_once {
                for g in 0..at_once {
                    let g = turn * at_once + g;
                    self.ask::<A>(g);
                    for i in 0..G::ROWS {
                        self.add::<V, M, T>(&mut sums, g, i);
                    }
                }
            }
            for g in whole..groups {
                self.ask::<A>(g);
                for i in 0..(self.k - g * G::ROWS).min(G::ROWS) {
                    self.add::<V, M, T>(&mut sums, g, i);
                }
            }
            for (r, sums) in sums.iter().enumerate() {
                for (p, sum) in sums.iter().enumerate() {
                    sum.store(&mut *self.out.add(r * self.width + p * LANES).cast());
                }
            }
        }
    }
}

impl<G: Group, const P: usize> Tile<G, P> {
    /// Asks for what goes with group `g` in the first `A` of `ahead`. Lines of one or two panels are [`spread`]; more panels
    /// are as many pages by themselves, and groups of several lines few pages.
    #[inline(always)]
    fn ask<const A: usize>(&self, g: usize) {
        let g = if G::ROWS == 1 && A <= 2 { spread(g) } else { g };
        for ahead in &self.ahead[..A.min(P)] {
            ask_for::<_, FAR>(ahead.wrapping_add(g));
        }
    }

    /// Adds the products of row `i` of group `g` of the panels.
    ///
    /// # Safety
    /// As [`Tile::run`] asks, and the panels have such a row.
    #[inline(always)]
    unsafe fn add<V: Vector, const M: usize, const T: bool>(&self, sums: &mut [[V; P]; M], g: usize, i: usize) {
        // SAFETY: the caller's.
        unsafe {
            let column = g * G::ROWS + i;
            let rows: [V; P] = std::array::from_fn(|p| (*self.panels[p].add(g)).row(i));
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = match T {
                    true => *self.a.add(column * self.stride + r),
                    false => *self.a.add(r * self.stride + column),
                };
                for (sum, row) in sums.iter_mut().zip(&rows) {
                    *sum = sum.plus(x, *row);
                }
            }
        }
    }
}

/// Groups of one turn of the inner loop, for tiles of few sums: more sums leave no registers for it.
const UNROLLED: usize = 4;
const UNROLLED_SUMS: usize = 16;

/// Pages of which lines are asked for in turn, and lines of one.
///
/// A line that is asked for holds one of the few places of the first-level cache for such lines (16 in recent Intel cores)
/// until it has come from memory: by themselves they give a third of what a core can read. The second-level cache reads
/// ahead in places of its own, up to twenty lines in a page that is read in order (Intel's optimization manual, "Streamer"):
/// with four pages at a time enough of them are on their way. Measured: `docs/benchmarks/decode.md`.
const PAGES: usize = 4;
const PAGE_LINES: usize = 64;

/// The line of a block that is asked for as number `i`. Of a block that is not four pages some are left out, and lines
/// behind it asked for instead: that costs time, no more.
#[inline(always)]
fn spread(i: usize) -> usize {
    i % PAGES * PAGE_LINES + i / PAGES
}

/// Asks for a panel that will be read soon.
#[inline(always)]
pub(crate) fn prefetch<G: Group>(panel: &[G]) {
    for lane in panel {
        ask_for::<_, NEAR>(lane);
    }
}

/// Into the first-level cache, for what is read at once.
pub(super) const NEAR: bool = true;
/// Into the second-level cache: the first has too few places for lines on their way.
pub(super) const FAR: bool = false;

/// Asks for every cache line of `at`, which may lie anywhere.
#[inline(always)]
pub(super) fn ask_for<T, const HINT: bool>(at: *const T) {
    #[cfg(target_arch = "x86_64")]
    for line in 0..size_of::<T>().div_ceil(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        let at = at.cast::<i8>().wrapping_add(64 * line);
        // SAFETY: a prefetch reads nothing that the program sees, faults nowhere, and every x86-64 processor has it.
        unsafe {
            match HINT {
                NEAR => _mm_prefetch::<_MM_HINT_T0>(at),
                FAR => _mm_prefetch::<_MM_HINT_T1>(at),
            }
        }
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
    fn every_line_of_four_pages_is_asked_for_once() {
        let mut asked: Vec<usize> = (0..PAGES * PAGE_LINES).map(spread).collect();
        assert_eq!(asked[..5], [0, 64, 128, 192, 1]);
        asked.sort_unstable();
        assert!(asked.into_iter().eq(0..PAGES * PAGE_LINES));
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
