//! 8-bit weights: blocks of 32 along the inputs with one scale each, as GGML's `Q8_0`.
//!
//! They are widened to f32 and go through the same inner loop, so a step reads about a quarter of the bytes and the
//! activations are not rounded. candle's quantised matrices, which round the activations and multiply row by row, were
//! measured against this on Zen 3, one thread, all products of a step: as fast at one row of a 5 M model, 1.4 times slower at
//! one row of 110 M, 2.5 to 3.5 times at 16 rows, 4 at 64.

use super::panel::{Group, LANES, Lane};
use super::registers::Vector;

/// Inputs that share a scale.
pub(crate) const BLOCK_INPUTS: usize = 32;

/// 32 rows of a panel: `weight[i][j] = scales[j] * rows[i][j]`, nine cache lines for 512 weights.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Q8Block {
    scales: [f32; LANES],
    rows: [[i8; LANES]; BLOCK_INPUTS],
}

impl Q8Block {
    /// The nearest to `rows`, at most 32 of them: each column's largest magnitude becomes 127.
    pub fn nearest(rows: &[Lane]) -> Self {
        let mut block = Self {
            scales: [0.0; LANES],
            rows: [[0; LANES]; BLOCK_INPUTS],
        };
        for j in 0..LANES {
            let largest = rows.iter().fold(0f32, |m, row| m.max(row.0[j].abs()));
            block.scales[j] = largest / 127.0;
            let per_step = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            for (out, row) in block.rows.iter_mut().zip(rows) {
                // `as` saturates, so that a rounding up past 127 does no harm.
                out[j] = (row.0[j] * per_step).round() as i8;
            }
        }
        block
    }
}

impl Group for Q8Block {
    const ROWS: usize = BLOCK_INPUTS;

    #[inline(always)]
    fn row<V: Vector>(&self, i: usize) -> V {
        V::scaled(&self.rows[i], &self.scales)
    }
}

#[cfg(test)]
mod tests {
    use super::super::registers::Base;
    use super::*;

    #[test]
    fn a_weight_is_rounded_to_the_nearest_of_255_steps_of_its_columns_largest() {
        // Column 0 has the largest magnitude 12.7, so steps of 0.1; column 1 is all zero.
        let mut rows = [Lane::ZERO; 3];
        for (row, value) in rows.iter_mut().zip([-12.7, 0.26, 3.04]) {
            row.0[0] = value;
        }
        let block = Q8Block::nearest(&rows);
        let block = &block;
        let column = |j: usize| {
            (0..4).map(move |i| {
                let mut out = [0f32; LANES];
                block.row::<Base>(i).store(&mut out);
                out[j]
            })
        };
        for (got, want) in column(0).zip([-12.7, 0.3, 3.0, 0.0]) {
            assert!((got - want).abs() < 1e-6, "{got}, want {want}");
        }
        assert!(column(1).all(|v| v == 0.0), "no division by zero");
    }
}
