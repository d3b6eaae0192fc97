//! The inner loop with a left side that lies turned, as the gradients of factors need it.

use super::panel::{LANES, Lane, Output, Rows, TILE_ROWS};

/// [`super::panel::tile`] with a left side that lies turned: `a` is `[panel.len(), rows]`, one row per row of the panel.
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
