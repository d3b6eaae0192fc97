use super::*;
use crate::cpu::backward::multiply_turned_with;
use crate::cpu::{Turned, multiply_turned};

fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 31 + seed * 17) % 23) as f32 / 8.0 - 1.4).collect()
}

fn check(rows: usize, outputs: usize, inputs: usize) {
    let (x, w) = (values(rows * inputs, 1), values(outputs * inputs, 2));
    let packed = PackedMatrix::pack(&w, outputs, inputs);
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
            None,
        );
    }
    let once = product(&x, &packed);
    assert!(twice.iter().zip(&once).all(|(t, o)| (t - 2.0 * o).abs() < 1e-4));
}

#[test]
fn an_eight_bit_weight_multiplies_as_the_numbers_it_stands_for() {
    for (rows, outputs, inputs) in [(1, 17, 3), (1, 130, 400), (5, 33, 64), (7, 40, 400), (200, 64, 769)] {
        let exact = PackedMatrix::pack(&values(outputs * inputs, 2), outputs, inputs);
        let small = exact.quantized();
        let same = PackedMatrix::pack(&small.unpack(), outputs, inputs);
        let (x, grad) = (values(rows * inputs, 1), values(rows * outputs, 3));
        assert_eq!(product(&x, &small), product(&x, &same), "{rows}x{outputs}x{inputs}");
        let backward = |matrix: &PackedMatrix| {
            let mut dx = vec![0f32; rows * inputs];
            multiply_turned(&[Turned { grad: &grad, matrix }], &mut dx, false);
            dx
        };
        assert_eq!(backward(&small), backward(&same));
        let panels = outputs.div_ceil(LANES) * inputs.div_ceil(32);
        assert_eq!(small.bytes(), panels * LANES * (32 + 4));
    }
}

/// The bits of a product with certain instructions, and those of its gradient.
fn bits(
    instructions: Instructions,
    (x, grad): (&[f32], &[f32]),
    matrix: &PackedMatrix,
    accumulate: bool,
) -> (Vec<u32>, Vec<u32>) {
    let (outputs, inputs) = matrix.shape();
    let rows = x.len() / inputs;
    let (mut out, mut dx) = (values(rows * outputs, 4), values(rows * inputs, 5));
    let product = Product {
        matrix,
        // SAFETY: read only when the product is there.
        out: unsafe { Output::shared(&mut out, outputs) },
        accumulate,
    };
    let x = Rows {
        data: x,
        stride: inputs,
    };
    multiply_with(instructions, x, rows, Wanted::Each(&[product]), None);
    multiply_turned_with(
        instructions,
        &[Turned { grad, matrix }],
        (rows, inputs),
        &mut dx,
        accumulate,
    );
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
    (bits(out), bits(dx))
}

#[test]
fn all_instructions_give_the_same_bits_and_a_row_those_that_it_has_alone() {
    // Every height of a tile and one and two tiles more, whole and narrow panels, one and several blocks of inputs.
    let heights = (1..=17).chain([28, 29, 64, 131]);
    let shapes = [(16, 8), (17, 40), (63, 256), (80, 300), (130, 600)];
    for (rows, (outputs, inputs)) in heights.flat_map(|rows| shapes.map(|shape| (rows, shape))) {
        // Thirds, so that every sum is rounded.
        let third = |values: Vec<f32>| values.into_iter().map(|v| v / 3.0).collect::<Vec<_>>();
        let (x, grad) = (third(values(rows * inputs, 1)), third(values(rows * outputs, 3)));
        let exact = PackedMatrix::pack(&third(values(outputs * inputs, 2)), outputs, inputs);
        for (matrix, accumulate) in [(&exact, false), (&exact, true), (&exact.quantized(), true)] {
            let want = bits(Instructions::Portable, (&x, &grad), matrix, accumulate);
            for &instructions in Instructions::all() {
                let got = bits(instructions, (&x, &grad), matrix, accumulate);
                assert!(got == want, "{rows}x{outputs}x{inputs} with {instructions:?}");
            }
            let (row, first) = (rows - 1, (rows - 1) * inputs);
            if !accumulate {
                let one = (&x[first..], &grad[row * outputs..]);
                let (out, dx) = bits(Instructions::best(), one, matrix, false);
                assert!(
                    out == want.0[row * outputs..] && dx == want.1[first..],
                    "row {row} alone"
                );
            }
        }
    }
}

#[test]
fn a_gated_product_is_the_activation_of_two_whatever_is_asked_for_meanwhile() {
    for (rows, outputs, inputs) in [(1, 16, 8), (3, 33, 300), (16, 130, 40), (200, 47, 20)] {
        let weight = |seed| PackedMatrix::pack(&values(outputs * inputs, seed), outputs, inputs);
        let (exact, next) = ([weight(2), weight(3)], PackedMatrix::pack(&values(48 * 5, 4), 48, 5));
        let small = exact.each_ref().map(PackedMatrix::quantized);
        let x = values(rows * inputs, 1);
        let x = Rows {
            data: &x,
            stride: inputs,
        };
        for matrices in [exact, small] {
            let [mut gate, mut up] = [7, 8].map(|seed| values(rows * outputs, seed));
            let mut want = [gate.clone(), up.clone()];
            // What is added to what is there already, as a bias is.
            for accumulate in [false, true] {
                let product = |matrix, out: &mut Vec<f32>| Product {
                    matrix,
                    // SAFETY: read only when the product is there.
                    out: unsafe { Output::shared(out, outputs) },
                    accumulate,
                };
                let both = [product(&matrices[0], &mut gate), product(&matrices[1], &mut up)];
                multiply_gated(x, rows, &both, Some(&next));
                let [first, second] = &mut want;
                multiply(
                    x,
                    rows,
                    &[product(&matrices[0], first), product(&matrices[1], second)],
                    None,
                );
                ops::swiglu_in_place(first, second);
                assert_eq!((&gate, &up), (&*first, &*second), "{rows}x{outputs}x{inputs}");
            }
        }
    }
}
