//! The one inner loop of the CPU path: a few rows times a panel of sixteen columns.

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
    width: usize,
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
    fn pointer(&self, row: usize, column: usize, rows: usize, columns: usize) -> *mut f32 {
        let start = row * self.width + column;
        let end = start + (rows - 1) * self.width + columns;
        assert!(end <= self.len, "output too small");
        // SAFETY: `start` is inside the data.
        unsafe { self.data.add(start) }
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
    if rows == 0 {
        return;
    }
    assert!(
        panel.is_empty() || a.data.len() >= (rows - 1) * a.stride + panel.len(),
        "rows too short for the panel"
    );
    let to = (out.pointer(row, column, rows, LANES), out.width);
    // SAFETY: the assert and `pointer` keep `rows` rows of `panel.len()` elements inside `a` and as many rows of
    // `LANES` elements inside `out`.
    unsafe { dispatch((a.data.as_ptr(), a.stride, 1), rows, panel, to, accumulate) }
}

/// [`tile`] with a left side that lies turned: `a` is `[panel.len(), rows]`, one row per row of the panel.
#[inline(always)]
pub(crate) fn tile_turned(
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
    let to = (out.pointer(row, column, rows, LANES), out.width);
    // SAFETY: as in `tile`, with rows and columns of `a` changed over.
    unsafe { dispatch((a.data.as_ptr(), 1, a.stride), rows, panel, to, accumulate) }
}

/// # Safety
/// As [`kernel::run`] asks, with `rows` for `M`.
#[inline(always)]
unsafe fn dispatch(
    a: (*const f32, usize, usize),
    rows: usize,
    panel: &[Lane],
    out: (*mut f32, usize),
    accumulate: bool,
) {
    // SAFETY: the caller's.
    unsafe {
        match rows {
            1 => kernel::run::<1>(a, panel, out, accumulate),
            2 => kernel::run::<2>(a, panel, out, accumulate),
            3 => kernel::run::<3>(a, panel, out, accumulate),
            4 => kernel::run::<4>(a, panel, out, accumulate),
            5 => kernel::run::<5>(a, panel, out, accumulate),
            TILE_ROWS => kernel::run::<TILE_ROWS>(a, panel, out, accumulate),
            _ => unreachable!("a tile has at most {TILE_ROWS} rows"),
        }
    }
}

/// Asks for a panel that will be read soon.
#[inline(always)]
pub(crate) fn prefetch(panel: &[Lane]) {
    #[cfg(target_arch = "x86_64")]
    for lane in panel {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch reads nothing that the program sees, and every x86-64 processor has it.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(lane.0.as_ptr().cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = panel;
}

#[cfg(all(target_arch = "x86_64", target_feature = "avx2", target_feature = "fma"))]
mod kernel {
    use std::arch::x86_64::{
        _mm256_broadcast_ss, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };

    use super::Lane;

    /// # Safety
    /// `M` rows of `panel.len()` elements are readable at `a`, where rows lie `stride` apart and their elements `step`,
    /// and `M` rows of sixteen are writable at `out`.
    #[inline(always)]
    pub unsafe fn run<const M: usize>(
        (a, stride, step): (*const f32, usize, usize),
        panel: &[Lane],
        (out, out_stride): (*mut f32, usize),
        accumulate: bool,
    ) {
        // SAFETY: the caller vouches for the rows; a lane is sixteen elements.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; M];
            if accumulate {
                for (r, sum) in sums.iter_mut().enumerate() {
                    let at = out.add(r * out_stride);
                    *sum = [_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8))];
                }
            }
            for (i, lane) in panel.iter().enumerate() {
                let lane = lane.0.as_ptr();
                let (low, high) = (_mm256_loadu_ps(lane), _mm256_loadu_ps(lane.add(8)));
                for (r, sum) in sums.iter_mut().enumerate() {
                    let x = _mm256_broadcast_ss(&*a.add(r * stride + i * step));
                    *sum = [_mm256_fmadd_ps(x, low, sum[0]), _mm256_fmadd_ps(x, high, sum[1])];
                }
            }
            for (r, sum) in sums.iter().enumerate() {
                let at = out.add(r * out_stride);
                _mm256_storeu_ps(at, sum[0]);
                _mm256_storeu_ps(at.add(8), sum[1]);
            }
        }
    }
}

#[cfg(not(all(target_arch = "x86_64", target_feature = "avx2", target_feature = "fma")))]
mod kernel {
    use super::{LANES, Lane};

    /// # Safety
    /// `M` rows of `panel.len()` elements are readable at `a`, where rows lie `stride` apart and their elements `step`,
    /// and `M` rows of sixteen are writable at `out`.
    #[inline(always)]
    pub unsafe fn run<const M: usize>(
        (a, stride, step): (*const f32, usize, usize),
        panel: &[Lane],
        (out, out_stride): (*mut f32, usize),
        accumulate: bool,
    ) {
        let mut sums = [[0f32; LANES]; M];
        for (r, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the caller vouches for the rows.
            let out = unsafe { std::slice::from_raw_parts(out.add(r * out_stride), LANES) };
            if accumulate {
                sum.copy_from_slice(out);
            }
        }
        for (i, lane) in panel.iter().enumerate() {
            for (r, sum) in sums.iter_mut().enumerate() {
                // SAFETY: the caller vouches for the rows.
                let x = unsafe { *a.add(r * stride + i * step) };
                for j in 0..LANES {
                    sum[j] = x.mul_add(lane.0[j], sum[j]);
                }
            }
        }
        for (r, sum) in sums.iter().enumerate() {
            // SAFETY: the caller vouches for the rows.
            unsafe { std::slice::from_raw_parts_mut(out.add(r * out_stride), LANES) }.copy_from_slice(sum);
        }
    }
}

#[cfg(test)]
mod tests {
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
