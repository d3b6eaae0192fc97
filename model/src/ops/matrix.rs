//! A matrix product through the `gemm` crate that candle's own products use, to measure ours against.

use gemm::Parallelism;

/// `out = a bᵀ` on all threads, as candle's own products run: what our kernels are measured against.
///
/// - `a`: `[m, k]` and perhaps more behind it; `b`: `[n, k]`; `out`: `[m, n]`; the shape is `(m, n, k)`
pub(crate) fn gemm_transposed(a: &[f32], b: &[f32], (m, n, k): (usize, usize, usize), out: &mut [f32]) {
    assert!(
        a.len() >= m * k && b.len() >= n * k && out.len() >= m * n,
        "operand too small"
    );
    // SAFETY: the assert keeps every index inside the three slices, and `out` overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            1,
            k as isize,
            b.as_ptr(),
            k as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::Rayon(rayon::current_num_threads()),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_on_all_threads_takes_the_right_side_turned() {
        let (a, b) = ([1., 2., 3., 4.], [1., 0., 1., 1.]);
        let mut out = [10f32; 4];
        gemm_transposed(&a, &b, (2, 2, 2), &mut out);
        assert_eq!(out, [1., 3., 3., 7.]);
    }
}
