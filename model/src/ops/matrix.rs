//! Matrix products on slices, through the `gemm` crate that candle's own products use.

use gemm::Parallelism;

/// A matrix inside a slice: element (r, c) is at `r * row_stride + c * column_stride`.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub columns: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a> Mat<'a> {
    /// Rows of `columns` elements that lie `row_stride` apart.
    pub fn new(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self {
            data,
            rows,
            columns,
            row_stride,
            column_stride: 1,
        }
    }

    /// The same elements with rows and columns changed over.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    fn last_index(&self) -> usize {
        (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride
    }
}

/// `out = scale * a b`, or `out += scale * a b`; the rows of `out` lie `out_stride` apart. One thread: callers
/// split their work over heads and sequences.
pub(super) fn product(a: Mat, b: Mat, scale: f32, out: &mut [f32], out_stride: usize, accumulate: bool) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner dimensions disagree");
    if m == 0 || n == 0 {
        return;
    }
    assert!(k > 0 && out.len() > (m - 1) * out_stride + n - 1, "output too small");
    assert!(
        a.data.len() > a.last_index() && b.data.len() > b.last_index(),
        "operand too small"
    );
    // SAFETY: the asserts above keep every index that the product touches inside the three slices, and `out` is
    // borrowed mutably, so it overlaps neither operand.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

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

    #[test]
    fn product_of_a_transposed_operand() {
        // a = [[1, 2], [3, 4]], b = [[1, 0], [1, 1]]; a bᵀ = [[1, 3], [3, 7]]
        let (a, b) = ([1., 2., 3., 4.], [1., 0., 1., 1.]);
        let mut out = [10f32; 4];
        let (a, b) = (Mat::new(&a, 2, 2, 2), Mat::new(&b, 2, 2, 2).transposed());
        product(a, b, 1.0, &mut out, 2, false);
        assert_eq!(out, [1., 3., 3., 7.]);
        product(a, b, 2.0, &mut out, 2, true);
        assert_eq!(out, [3., 9., 9., 21.]);
    }
}
