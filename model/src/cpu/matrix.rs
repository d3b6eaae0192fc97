//! Frozen weights in panels, and the products with them.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::columns::{INNER_BLOCK, columns, lane, panel};
use super::panel::{Group, LANES, Lane, Output, Rows, TILE_ROWS, WIDE_PANELS};
use super::quantized::Q8Block;

/// A frozen weight `[outputs, inputs]`, laid out as products read it: panels of sixteen outputs one behind the other,
/// each `[inputs, 16]`, the last filled up with zeros.
pub(crate) struct PackedMatrix {
    panels: Panels,
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

/// All panels of a matrix.
enum Panels {
    F32(Vec<Lane>),
    Q8(Vec<Q8Block>),
}

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
            panels: Panels::F32(panels),
            outputs,
            inputs,
        }
    }

    /// The nearest 8-bit weight.
    pub fn quantized(&self) -> Self {
        let blocks = |p: usize| {
            self.with_lanes(p, (0, self.inputs), |lanes| {
                lanes.chunks(Q8Block::ROWS).map(Q8Block::nearest).collect::<Vec<_>>()
            })
        };
        let panels: Vec<Vec<Q8Block>> = (0..self.outputs.div_ceil(LANES)).into_par_iter().map(blocks).collect();
        Self {
            panels: Panels::Q8(panels.concat()),
            outputs: self.outputs,
            inputs: self.inputs,
        }
    }

    /// Whether the weights have 8 bits.
    pub fn is_quantized(&self) -> bool {
        matches!(self.panels, Panels::Q8(_))
    }

    /// Bytes that the weights take.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(lanes) => size_of_val(lanes.as_slice()),
            Panels::Q8(blocks) => size_of_val(blocks.as_slice()),
        }
    }

    /// The weight again, `[outputs, inputs]`, row by row.
    pub fn unpack(&self) -> Vec<f32> {
        let mut weight = vec![0f32; self.outputs * self.inputs];
        for (p, rows) in weight.chunks_mut((LANES * self.inputs).max(1)).enumerate() {
            self.with_lanes(p, (0, self.inputs), |lanes| {
                for (j, row) in rows.chunks_exact_mut(self.inputs).enumerate() {
                    row.iter_mut().zip(lanes).for_each(|(out, lane)| *out = lane.0[j]);
                }
            });
        }
        weight
    }

    /// `(outputs, inputs)`.
    pub fn shape(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    /// Calls `f` with `count` rows of panel `p`, from `first` on, in f32.
    pub(super) fn with_lanes<T>(&self, p: usize, (first, count): (usize, usize), f: impl FnOnce(&[Lane]) -> T) -> T {
        match &self.panels {
            Panels::F32(lanes) => f(&lanes[p * self.inputs..][first..first + count]),
            Panels::Q8(blocks) => {
                let panel = panel(blocks, self.inputs, p);
                f(&(first..first + count).map(|i| lane(panel, i)).collect::<Vec<_>>())
            }
        }
    }

    /// The columns of `panels` (at most [`WIDE_PANELS`]) for `rows` rows from `first` on.
    fn columns(&self, x: Rows, rows: (usize, usize), panels: Range<usize>, product: &Product, wide: &mut [Lane]) {
        match &self.panels {
            Panels::F32(lanes) => columns((lanes, self.inputs), x, rows, panels, product, None),
            Panels::Q8(blocks) => columns((blocks, self.inputs), x, rows, panels, product, Some(wide)),
        }
    }
}

impl std::fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PackedMatrix [{}, {}]", self.outputs, self.inputs)
    }
}

/// All of `products` with the same rows, shared out among the threads by panels.
///
/// - `x`: `[rows, inputs]` of every matrix
pub(crate) fn multiply(x: Rows, rows: usize, products: &[Product]) {
    let work: usize = products.iter().map(|p| rows * p.matrix.outputs * p.matrix.inputs).sum();
    let step = if rows == 1 { WIDE_PANELS } else { 1 };
    let mut jobs = Vec::new();
    for first in (0..rows).step_by(ROW_BLOCK) {
        for product in products {
            let panels = product.matrix.outputs.div_ceil(LANES);
            let ranges = (0..panels).step_by(step).map(|p| p..(p + step).min(panels));
            jobs.extend(ranges.map(|range| (first, product, range)));
        }
    }
    let run = |jobs: &[(usize, &Product, Range<usize>)]| {
        let mut wide = [Lane::ZERO; INNER_BLOCK];
        for (first, product, panels) in jobs {
            let height = (rows - first).min(ROW_BLOCK);
            product
                .matrix
                .columns(x, (*first, height), panels.clone(), product, &mut wide);
        }
    };
    share(&jobs, work, run);
}

/// Runs every job, on several threads where the `work` of all, in multiplications, is worth it.
pub(super) fn share<J: Sync>(jobs: &[J], work: usize, run: impl Fn(&[J]) + Send + Sync) {
    if work < SERIAL_BELOW {
        return run(jobs);
    }
    // Parts of about a hundred microseconds: enough to share out, too few to be felt.
    let parts = (work / SERIAL_BELOW / 4).clamp(rayon::current_num_threads(), jobs.len().max(1));
    jobs.par_chunks(jobs.len().div_ceil(parts)).for_each(run);
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

    #[test]
    fn an_eight_bit_weight_multiplies_as_the_numbers_it_stands_for() {
        for (rows, outputs, inputs) in [(1, 17, 3), (1, 130, 400), (5, 33, 64), (7, 40, 400), (200, 64, 769)] {
            let exact = PackedMatrix::pack(&values(outputs * inputs, 2), outputs, inputs);
            let small = Arc::new(exact.quantized());
            let same = Arc::new(PackedMatrix::pack(&small.unpack(), outputs, inputs));
            let (x, grad) = (values(rows * inputs, 1), values(rows * outputs, 3));
            assert_eq!(product(&x, &small), product(&x, &same), "{rows}x{outputs}x{inputs}");
            let backward = |matrix: &Arc<PackedMatrix>| {
                let mut dx = vec![0f32; rows * inputs];
                multiply_turned(&[Turned { grad: &grad, matrix }], &mut dx, false);
                dx
            };
            assert_eq!(backward(&small), backward(&same));
            let panels = outputs.div_ceil(LANES) * inputs.div_ceil(32);
            assert_eq!(small.bytes(), panels * LANES * (32 + 4));
        }
    }
}
