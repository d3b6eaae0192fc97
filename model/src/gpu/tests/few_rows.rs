//! Products of few rows: against plain ones, and to the bit among each other.

use super::rows::addresses;
use super::tensor_cores::no_bank_conflicts;
use super::*;
use crate::gpu::kernels::{Epilogue, FewRowsTile, Outputs, Product};

/// Those of 16 bits.
fn halves() -> impl Iterator<Item = (DType, f32)> {
    DTYPES.into_iter().filter(|(dtype, _)| dtype.size_in_bytes() == 2)
}

/// Every way that the kernel has.
fn tiles() -> impl Iterator<Item = FewRowsTile> {
    [Outputs::Sixteen, Outputs::ThirtyTwo]
        .into_iter()
        .flat_map(|outputs| [false, true].map(|x_kept| FewRowsTile { outputs, x_kept }))
}

/// `out` after a product of `x` and `w`; gated, `w` is gate and up.
fn multiply(
    gpu: &Gpu,
    x: &Tensor,
    w: &Tensor,
    out: &Tensor,
    epilogue: Epilogue,
    tile: FewRowsTile,
) -> Result<Vec<Vec<f32>>> {
    let [out_at, x_at, w_at] = addresses(gpu, [out, x, w])?;
    let (rows, inputs) = x.dims2()?;
    let product = Product {
        out: out_at,
        x: x_at,
        w: w_at,
        rows,
        outputs: out.dim(1)?,
        inputs,
        epilogue,
    };
    // SAFETY: the tensors have the shapes that the kernel reads and writes.
    unsafe { kernels(gpu, x.dtype()).few_rows(&product, tile)? };
    read(out)?.to_vec2()
}

#[test]
fn products_of_few_rows_are_those_of_the_cpu() -> Result<()> {
    on_each_device(|gpu, device| {
        for (dtype, tolerance) in halves() {
            // Rows, outputs and inputs within, at and past what a block, a warp and a step take; two to six tiles a block.
            for (rows, outputs, inputs) in [(1, 64, 32), (8, 200, 264), (11, 136, 520), (16, 96, 256), (29, 50, 72)] {
                let x = values(&[rows, inputs], 1, dtype, device)?;
                let w = values(&[outputs, inputs], 2, dtype, device)?;
                let want = read(&x)?.matmul(&read(&w)?.t()?)?;
                let tolerance = tolerance * (inputs as f32).sqrt();
                for tile in tiles() {
                    let got = zeros(&[rows, outputs], dtype, device)?;
                    multiply(gpu, &x, &w, &got, Epilogue::Store, tile)?;
                    assert_close(&read(&got)?, &want, tolerance)?;
                    // Added to what is there, once.
                    let before = values(&[rows, outputs], 3, dtype, device)?;
                    let got = before.copy()?;
                    multiply(gpu, &x, &w, &got, Epilogue::Add, tile)?;
                    assert_close(&read(&got)?, &(&want + read(&before)?)?, tolerance)?;
                    // Sums that are not rounded: in both, products of two such values are exact.
                    let got = zeros(&[rows, outputs], DType::F32, device)?;
                    multiply(gpu, &x, &w, &got, Epilogue::F32, tile)?;
                    assert_close(&read(&got)?, &want, 1e-5 * inputs as f32)?;
                    no_bank_conflicts(gpu);
                }
            }
        }
        Ok(())
    })
}

/// On the emulator alone: a GPU's kernel ahead ends when it likes.
#[cfg(feature = "kernel-emulation")]
#[test]
fn nothing_but_the_weight_is_read_before_the_kernel_ahead_has_ended() -> Result<()> {
    on_each_device(|gpu, device| {
        #[cfg_attr(not(feature = "cuda"), allow(irrefutable_let_patterns))]
        let Gpu::Emulated(emulated) = gpu else {
            return Ok(());
        };
        let w = values(&[40, 96], 9, DType::BF16, device)?;
        let (x, before) = (
            values(&[4, 96], 8, DType::BF16, device)?,
            values(&[4, 40], 10, DType::BF16, device)?,
        );
        for tile in tiles() {
            let want = multiply(gpu, &x, &w, &before.copy()?, Epilogue::Add, tile)?;
            // Both that it reads besides are there when it has waited, and not before.
            for late in [&x, &before] {
                let (x, out) = (x.copy()?, before.copy()?);
                let place = if std::ptr::eq(late, &before) { &out } else { &x };
                let bits = late.flatten_all()?.to_vec1::<half::bf16>()?;
                let bytes = bits.iter().flat_map(|x| x.to_le_bytes()).collect();
                *emulated.late.borrow_mut() = Some((gpu.address(place)?, bytes));
                place.slice_set(&Tensor::full(half::bf16::NAN, place.dims(), device)?, 0, 0)?;
                assert_eq!(multiply(gpu, &x, &w, &out, Epilogue::Add, tile)?, want);
            }
        }
        Ok(())
    })
}

#[test]
fn gated_products_are_those_of_gate_and_up_activated() -> Result<()> {
    on_each_device(|gpu, device| {
        for (dtype, _) in halves() {
            for (rows, width, inputs) in [(3, 16, 40), (16, 100, 264), (20, 24, 96)] {
                let x = values(&[rows, inputs], 4, dtype, device)?;
                let w = values(&[2 * width, inputs], 5, dtype, device)?;
                for tile in tiles() {
                    let both = zeros(&[rows, 2 * width], dtype, device)?;
                    multiply(gpu, &x, &w, &both, Epilogue::Store, tile)?;
                    // The kernel of the activation reads 16 bytes at once: each part at such a place.
                    let padded = width.next_multiple_of(8);
                    let part = |start| both.narrow(1, start, width)?.pad_with_zeros(1, 0, padded - width);
                    let both = Tensor::cat(&[part(0)?, part(width)?], 1)?;
                    let want = zeros(&[rows, padded], dtype, device)?;
                    let [want_at, both_at] = addresses(gpu, [&want, &both])?;
                    // SAFETY: the tensors have the shapes that the kernel reads and writes.
                    unsafe { kernels(gpu, dtype).swiglu(want_at, both_at, rows, padded)? };
                    let got = zeros(&[rows, width], dtype, device)?;
                    multiply(gpu, &x, &w, &got, Epilogue::Gated, tile)?;
                    assert_close(&read(&got)?, &read(&want)?.narrow(1, 0, width)?.contiguous()?, 0.0)?;
                }
            }
        }
        Ok(())
    })
}

#[test]
fn a_row_has_the_same_sums_in_every_batch_and_tile() -> Result<()> {
    on_each_device(|gpu, device| {
        let (outputs, inputs) = (72, 1096);
        let w = values(&[outputs, inputs], 6, DType::BF16, device)?;
        let x = values(&[32, inputs], 7, DType::BF16, device)?;
        let sums = |first: usize, rows: usize, tile| {
            let x = x.narrow(0, first, rows)?.contiguous()?;
            multiply(
                gpu,
                &x.copy()?,
                &w,
                &zeros(&[rows, outputs], DType::F32, device)?,
                Epilogue::F32,
                tile,
            )
        };
        let one = FewRowsTile {
            outputs: Outputs::Sixteen,
            x_kept: false,
        };
        let alone = sums(19, 1, one)?;
        for tile in tiles() {
            assert_eq!(sums(0, 32, tile)?[19], alone[0]);
            assert_eq!(sums(15, 12, tile)?[4], alone[0]);
            assert_eq!(sums(19, 1, tile)?[0], alone[0]);
        }
        Ok(())
    })
}
