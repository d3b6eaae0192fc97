//! What a warp's lanes hold of the operands of a product on tensor cores, and how they load them: written down from the
//! PTX ISA's tables, so that a GPU and its emulator are measured by the same.

use half::{bf16, f16};

use super::rows::addresses;
use super::*;
use crate::gpu::work::{Arg, Launch};

const DTYPES: [DType; 2] = [DType::BF16, DType::F16];

fn bits(x: f32, dtype: DType) -> u32 {
    let bits = if dtype == DType::BF16 {
        bf16::from_f32(x).to_bits()
    } else {
        f16::from_f32(x).to_bits()
    };
    bits.into()
}

/// One warp of a probe.
fn probe(gpu: &Gpu, kernel: &str, dtype: DType, shared: u32, args: &[Arg]) -> Result<()> {
    let launch = Launch {
        kernel: &format!("{kernel}_{}", super::super::work::suffix(dtype)?),
        grid: [1, 1, 1],
        threads: 32,
        shared,
        args,
    };
    // SAFETY: each caller passes what the probe takes.
    unsafe { gpu.launch(&launch) }
}

/// `d + a b` of a warp's registers: `[32][4]`, `[32][4]` and `[32][2]`.
fn product(gpu: &Gpu, device: &Device, dtype: DType, d: &[f32], a: &[u32], b: &[u32]) -> Result<Vec<f32>> {
    let (d, a, b) = (Tensor::new(d, device)?, words(a, device)?, words(b, device)?);
    let [d_at, a_at, b_at] = addresses(gpu, [&d, &a, &b])?;
    let args = [Arg::Pointer(d_at), Arg::Pointer(a_at), Arg::Pointer(b_at)];
    probe(gpu, "probe_product", dtype, 0, &args)?;
    read(&d)?.to_vec1()
}

/// An element of the 16x8 matrix that every B below holds: exact in both dtypes.
fn b_at(k: usize, n: usize) -> f32 {
    k as f32 + n as f32 / 8.0
}

#[test]
fn a_product_takes_its_operands_where_the_ptx_isa_says() -> Result<()> {
    // Lane, register and half of an A, and the row and column that the tables give them.
    let a_places = [
        ((0, 0, 0), (0, 0)),
        ((18, 0, 1), (4, 5)),
        ((5, 1, 1), (9, 3)),
        ((5, 2, 0), (1, 10)),
        ((28, 2, 1), (7, 9)),
        ((31, 3, 1), (15, 15)),
    ];
    // Lane and number of a sum, and its row and column.
    let sums = [
        ((0, 0), (0, 0)),
        ((18, 1), (4, 5)),
        ((5, 2), (9, 2)),
        ((31, 3), (15, 7)),
        ((6, 3), (9, 5)),
    ];
    on_each_device(|gpu, device| {
        for dtype in DTYPES {
            // Lane 4 n + p has B[2 p, 2 p + 1][n], then B[2 p + 8, 2 p + 9][n].
            let b: Vec<u32> = (0..64)
                .map(|i| {
                    let (n, k) = (i / 8, i / 2 % 4 * 2 + i % 2 * 8);
                    bits(b_at(k + 1, n), dtype) << 16 | bits(b_at(k, n), dtype)
                })
                .collect();
            for ((lane, register, half), (row, k)) in a_places {
                let mut a = [0; 128];
                a[lane * 4 + register] = bits(2.0, dtype) << (16 * half);
                let d = product(gpu, device, dtype, &[0.5; 128], &a, &b)?;
                // Row `row` of the product is twice row k of B; the others are as they were.
                let in_row = |i: usize| i / 4 / 4 + i % 4 / 2 * 8 == row;
                assert_eq!(d.iter().filter(|x| **x != 0.5).count(), if k == 0 { 7 } else { 8 });
                for (i, got) in d.iter().enumerate() {
                    let n = i / 4 % 4 * 2 + i % 2;
                    let want = 0.5 + if in_row(i) { 2.0 * b_at(k, n) } else { 0.0 };
                    assert_eq!(*got, want, "A[{row}][{k}], sum {i}");
                }
            }
            // A full A: row r is r + 1 at column r, so sum (r, n) is (r + 1) B[r][n].
            let mut a = [0; 128];
            for row in 0..16 {
                let (lane, register) = (row % 8 * 4 + row % 8 / 2, row / 8 * 3);
                a[lane * 4 + register] |= bits(row as f32 + 1.0, dtype) << (row % 2 * 16);
            }
            let d = product(gpu, device, dtype, &[0.0; 128], &a, &b)?;
            for ((lane, sum), (row, n)) in sums {
                assert_eq!(d[lane * 4 + sum], (row + 1) as f32 * b_at(row, n), "sum ({row}, {n})");
            }
        }
        Ok(())
    })
}

#[test]
fn tiles_are_loaded_as_the_operands_that_products_take() -> Result<()> {
    const WIDTH: usize = 32;
    /// How far an element of a lane's register lies from where the load begins.
    type Place = fn(group: usize, pair: usize, register: usize) -> (usize, usize);
    // Lane 4 group + pair, the lower half; `false`: the upper half lies in the next row, not the next column.
    let loads: [(bool, Place); 4] = [
        (true, |group, pair, r| (group + r % 2 * 8, 2 * pair + r / 2 * 8)),
        (true, |group, pair, r| (group + r / 2 * 8, 2 * pair + r % 2 * 8)),
        (false, |group, pair, r| (2 * pair + r % 2 * 8, group + r / 2 * 8)),
        (false, |group, pair, r| (2 * pair + r / 2 * 8, group + r % 2 * 8)),
    ];
    on_each_device(|gpu, device| {
        for dtype in DTYPES {
            // Every element its own bits; none of them is a NaN.
            let from: Vec<u32> = (0..WIDTH * WIDTH / 2)
                .map(|i| (((2 * i + 1) << 16) | (2 * i)) as u32)
                .collect();
            let (from, out) = (words(&from, device)?, words(&[0; 512], device)?);
            let [from, out_at] = addresses(gpu, [&from, &out])?;
            let (row, column) = (16, 16);
            let args = [
                Arg::Pointer(out_at),
                Arg::Pointer(from),
                Arg::Int(row as i32),
                Arg::Int(column as i32),
            ];
            probe(gpu, "probe_tile", dtype, (2 * (WIDTH + 1) * WIDTH) as u32, &args)?;
            device.synchronize()?;
            let got = out.to_vec1::<u32>()?;
            for (load, (along, place)) in loads.iter().enumerate() {
                for lane in 0..32 {
                    for register in 0..4 {
                        let (r, c) = place(lane / 4, lane % 4, register);
                        let low = (row + r) * WIDTH + column + c;
                        let high = low + if *along { 1 } else { WIDTH };
                        let got = got[(load * 32 + lane) * 4 + register];
                        assert_eq!(
                            got,
                            (high << 16 | low) as u32,
                            "load {load}, lane {lane}, register {register}"
                        );
                    }
                }
            }
            no_bank_conflicts(gpu);
        }
        Ok(())
    })
}

/// No load of matrices had to wait for another's banks; the emulator counts them.
pub(super) fn no_bank_conflicts(gpu: &Gpu) {
    #[cfg(feature = "kernel-emulation")]
    #[cfg_attr(not(feature = "cuda"), allow(irrefutable_let_patterns))]
    if let Gpu::Emulated(gpu) = gpu {
        assert_eq!(gpu.bank_conflicts.get(), 0, "loads from shared banks");
    }
    #[cfg(not(feature = "kernel-emulation"))]
    let _ = gpu;
}
