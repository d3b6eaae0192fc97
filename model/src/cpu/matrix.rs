//! Frozen weights in panels, and the products with them.

use std::sync::Arc;

use rayon::prelude::*;

use super::panel::{LANES, Lane, Output, Rows, TILE_ROWS, tile};

/// A frozen weight `[outputs, inputs]` in f32, laid out as products read it: panels of sixteen outputs one behind
/// the other, each `[inputs, 16]`, the last filled up with zeros.
pub(crate) struct PackedMatrix {
    panels: Vec<Lane>,
    outputs: usize,
    inputs: usize,
}

/// A product that is wanted: of the shared rows with `matrix`, `+=` where `accumulate`.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    pub matrix: &'a PackedMatrix,
    pub out: Output,
    pub accumulate: bool,
}

/// Inner size of a block: a panel's part (24 KB) stays in the first-level cache while all rows pass.
pub(super) const INNER_BLOCK: usize = 384;
/// Rows of a block: their part of the left side stays in the second-level cache while all panels pass.
pub(super) const ROW_BLOCK: usize = 32 * TILE_ROWS;
/// Multiplications below which a product is not shared out: waking a thread costs some microseconds.
const SERIAL_BELOW: usize = 1 << 18;

impl PackedMatrix {
    /// - `weight`: `[outputs, inputs]`, row by row
    pub fn pack(weight: &[f32], outputs: usize, inputs: usize) -> Self {
        assert_eq!(weight.len(), outputs * inputs, "a weight of another shape");
        let mut panels = vec![Lane::ZERO; outputs.div_ceil(LANES) * inputs];
        panels.par_chunks_mut(inputs.max(1)).enumerate().for_each(|(p, panel)| {
            for (j, row) in weight[p * LANES * inputs..]
                .chunks_exact(inputs)
                .take(LANES)
                .enumerate()
            {
                for (lane, value) in panel.iter_mut().zip(row) {
                    lane.0[j] = *value;
                }
            }
        });
        Self {
            panels,
            outputs,
            inputs,
        }
    }

    /// The weight again, `[outputs, inputs]`, row by row.
    pub fn unpack(&self) -> Vec<f32> {
        let at = |o: usize, i: usize| self.panel(o / LANES)[i].0[o % LANES];
        (0..self.outputs)
            .flat_map(|o| (0..self.inputs).map(move |i| at(o, i)))
            .collect()
    }

    /// `(outputs, inputs)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    pub(super) fn panel(&self, p: usize) -> &[Lane] {
        &self.panels[p * self.inputs..][..self.inputs]
    }

    /// Sixteen columns of the product for `rows` rows from `first` on.
    fn columns(&self, x: Rows, (first, rows): (usize, usize), p: usize, product: &Product) {
        let columns = (self.outputs - p * LANES).min(LANES);
        for (block, panel) in self.panel(p).chunks(INNER_BLOCK).enumerate() {
            let accumulate = product.accumulate || block > 0;
            let x = x.columns_from(block * INNER_BLOCK);
            for row in (first..first + rows).step_by(TILE_ROWS) {
                let height = (first + rows - row).min(TILE_ROWS);
                match columns {
                    LANES => tile(x.from(row), height, panel, &product.out, (row, p * LANES), accumulate),
                    _ => narrow_tile(
                        x.from(row),
                        height,
                        panel,
                        &product.out,
                        (row, p * LANES, columns),
                        accumulate,
                    ),
                }
            }
        }
    }
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix [{}, {}]", self.outputs, self.inputs)
    }
}

/// The last panel of a width that is no multiple of sixteen.
pub(super) fn narrow_tile(
    x: Rows,
    rows: usize,
    panel: &[Lane],
    out: &Output,
    (row, column, columns): (usize, usize, usize),
    accumulate: bool,
) {
    let mut whole = [0f32; TILE_ROWS * LANES];
    // SAFETY: one thread, and `whole` is read only when the product is there.
    let to = unsafe { Output::shared(&mut whole, LANES) };
    tile(x, rows, panel, &to, (0, 0), false);
    for (r, sums) in whole.chunks_exact(LANES).take(rows).enumerate() {
        for (out, sum) in out.part(row + r, column, columns).iter_mut().zip(sums) {
            *out = if accumulate { *out + sum } else { *sum };
        }
    }
}

/// All of `products` with the same rows, shared out among the threads by panels.
///
/// - `x`: `[rows, inputs]` of every matrix
pub(crate) fn multiply(x: Rows, rows: usize, products: &[Product]) {
    let work: usize = products.iter().map(|p| rows * p.matrix.outputs * p.matrix.inputs).sum();
    let mut jobs = Vec::new();
    for first in (0..rows).step_by(ROW_BLOCK) {
        for product in products {
            jobs.extend((0..product.matrix.outputs.div_ceil(LANES)).map(|p| (first, product, p)));
        }
    }
    let one = |&(first, product, p): &(usize, &Product, usize)| {
        let height = (rows - first).min(ROW_BLOCK);
        product.matrix.columns(x, (first, height), p, product);
    };
    share(&jobs, work, one);
}

/// Runs every job, on several threads where the `work` of all, in multiplications, is worth it.
pub(super) fn share<J: Sync>(jobs: &[J], work: usize, one: impl Fn(&J) + Sync) {
    if work < SERIAL_BELOW {
        return jobs.iter().for_each(one);
    }
    // Parts of about a hundred microseconds: enough to share out, too few to be felt.
    let parts = (work / SERIAL_BELOW / 4).clamp(rayon::current_num_threads(), jobs.len().max(1));
    jobs.par_chunks(jobs.len().div_ceil(parts))
        .for_each(|jobs| jobs.iter().for_each(&one));
}

/// The products of one weight, for callers that hold tensors.
pub(crate) fn product(x: &[f32], matrix: &Arc<PackedMatrix>) -> Vec<f32> {
    let rows = x.len() / matrix.inputs.max(1);
    let mut out = vec![0f32; rows * matrix.outputs];
    let product = Product {
        matrix,
        // SAFETY: `multiply` shares out columns, and `out` is read only when it has returned.
        out: unsafe { Output::shared(&mut out, matrix.outputs) },
        accumulate: false,
    };
    let x = Rows {
        data: x,
        stride: matrix.inputs,
    };
    multiply(x, rows, &[product]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{Turned, multiply_turned};

    fn values(n: usize, seed: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 31 + seed * 17) % 23) as f32 / 8.0 - 1.4).collect()
    }

    fn check(rows: usize, outputs: usize, inputs: usize) {
        let (x, w) = (values(rows * inputs, 1), values(outputs * inputs, 2));
        let packed = Arc::new(PackedMatrix::pack(&w, outputs, inputs));
        assert_eq!(packed.unpack(), w);
        let got = product(&x, &packed);
        let grad = values(rows * outputs, 3);
        let mut dx = vec![0f32; rows * inputs];
        multiply_turned(
            &[Turned {
                grad: &grad,
                matrix: &packed,
            }],
            &mut dx,
            false,
        );
        for r in 0..rows {
            for o in 0..outputs {
                let want: f64 = (0..inputs)
                    .map(|i| f64::from(x[r * inputs + i] * w[o * inputs + i]))
                    .sum();
                let got = f64::from(got[r * outputs + o]);
                assert!(
                    (got - want).abs() < 1e-3,
                    "{rows}x{outputs}x{inputs} at {r}, {o}: {got}, want {want}"
                );
            }
            for i in 0..inputs {
                let want: f64 = (0..outputs)
                    .map(|o| f64::from(grad[r * outputs + o] * w[o * inputs + i]))
                    .sum();
                let got = f64::from(dx[r * inputs + i]);
                assert!(
                    (got - want).abs() < 1e-3,
                    "gradient {rows}x{outputs}x{inputs} at {r}, {i}: {got}, want {want}"
                );
            }
        }
    }

    #[test]
    fn products_and_gradients_of_every_odd_size() {
        for (rows, outputs, inputs) in [
            (1, 1, 1),
            (1, 16, 8),
            (5, 17, 3),
            (7, 40, 400),
            (200, 33, 20),
            (6, 16, 769),
        ] {
            check(rows, outputs, inputs);
        }
    }

    #[test]
    fn large_products_are_shared_out_and_add_up() {
        check(70, 90, 130);
        let packed = PackedMatrix::pack(&values(64 * 64, 2), 64, 64);
        let x = values(64 * 64, 1);
        let rows = Rows { data: &x, stride: 64 };
        let mut twice = vec![0f32; 64 * 64];
        for accumulate in [false, true] {
            // SAFETY: read only when `multiply` has returned.
            let out = unsafe { Output::shared(&mut twice, 64) };
            multiply(
                rows,
                64,
                &[Product {
                    matrix: &packed,
                    out,
                    accumulate,
                }],
            );
        }
        let once = product(&x, &Arc::new(packed));
        assert!(twice.iter().zip(&once).all(|(t, o)| (t - 2.0 * o).abs() < 1e-4));
    }
}
