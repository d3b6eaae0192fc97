//! Kernels that work row by row.

use super::*;
use crate::gpu::kernels::LowRank;
use crate::ops;

#[test]
fn embedding_takes_tokens_and_those_that_only_the_device_has() -> Result<()> {
    on_each_device(|gpu, device| {
        for (dtype, _) in DTYPES {
            let table = values(&[5, 24], 1, dtype, device)?;
            let (tokens, drawn) = (words(&[4, 0x8000_0001, 0], device)?, words(&[9, 2], device)?);
            let out = zeros(&[3, 24], dtype, device)?;
            let [o, t, k, d] = addresses(gpu, [&out, &table, &tokens, &drawn])?;
            // SAFETY: the tensors have the shapes that the kernel reads and writes.
            unsafe { kernels(gpu, dtype).embed(o, t, k, d, 3, 24)? };
            let want = read(&table)?.index_select(&Tensor::new(&[4u32, 2, 0], &Device::Cpu)?, 0)?;
            assert_close(&read(&out)?, &want, 0.0)?;
        }
        Ok(())
    })
}

#[test]
fn gathered_rows_are_those_that_were_named() -> Result<()> {
    on_each_device(|gpu, device| {
        // More than a block's threads load at once, and no multiple of 16 bytes.
        for (dtype, width) in [(DType::BF16, 2056), (DType::F32, 3), (DType::F32, 258)] {
            let x = values(&[4, width], 2, dtype, device)?;
            let (wanted, out) = (words(&[3, 1], device)?, zeros(&[2, width], dtype, device)?);
            let [o, x_at, w] = addresses(gpu, [&out, &x, &wanted])?;
            // SAFETY: the tensors have the shapes that the kernel reads and writes.
            unsafe { kernels(gpu, dtype).gather_rows(o, x_at, w, 2, width)? };
            assert_close(
                &read(&out)?,
                &read(&x)?.index_select(&Tensor::new(&[3u32, 1], &Device::Cpu)?, 0)?,
                0.0,
            )?;
        }
        Ok(())
    })
}

#[test]
fn rms_norm_is_that_of_the_cpu() -> Result<()> {
    on_each_device(|gpu, device| {
        for (dtype, tolerance) in DTYPES {
            // Less than a block's threads load at once, and more.
            for width in [40, 2104] {
                let (x, w) = (
                    values(&[3, width], 3, dtype, device)?,
                    values(&[width], 4, dtype, device)?,
                );
                let out = zeros(&[3, width], dtype, device)?;
                let [o, x_at, w_at] = addresses(gpu, [&out, &x, &w])?;
                // SAFETY: the tensors have the shapes that the kernel reads and writes.
                unsafe { kernels(gpu, dtype).rms_norm(o, x_at, w_at, 3, width, 1e-5)? };
                assert_close(
                    &read(&out)?,
                    &ops::rms_norm(&read(&x)?, &read(&w)?, 1e-5)?,
                    2.0 * tolerance,
                )?;
            }
        }
        Ok(())
    })
}

#[test]
fn swiglu_is_that_of_the_cpu() -> Result<()> {
    on_each_device(|gpu, device| {
        for (dtype, tolerance) in DTYPES {
            for width in [16, 2056] {
                let gate_up = values(&[3, 2 * width], 5, dtype, device)?;
                let out = zeros(&[3, width], dtype, device)?;
                let [o, g] = addresses(gpu, [&out, &gate_up])?;
                // SAFETY: the tensors have the shapes that the kernel reads and writes.
                unsafe { kernels(gpu, dtype).swiglu(o, g, 3, width)? };
                let both = read(&gate_up)?;
                let part = |start| both.narrow(1, start, width)?.contiguous();
                assert_close(&read(&out)?, &ops::swiglu(&part(0)?, &part(width)?)?, tolerance)?;
            }
        }
        Ok(())
    })
}

#[test]
fn the_low_rank_term_is_added_to_rows_with_the_adapter_alone() -> Result<()> {
    const ROWS: usize = 6;
    on_each_device(|gpu, device| {
        for (dtype, tolerance) in DTYPES {
            // Ranks within, at and past what a block takes at once; the output is a part of wider rows.
            for (rank, inputs, outputs, stride) in [(3, 40, 24, 32), (8, 300, 16, 16), (11, 16, 300, 304)] {
                let x = values(&[ROWS, inputs], 6, dtype, device)?;
                let (a, b) = (
                    values(&[rank, inputs], 7, DType::F32, device)?,
                    values(&[outputs, rank], 8, DType::F32, device)?,
                );
                let scales = [2f32, 0.0, 2.0, 2.0, 0.0, 0.5];
                let scale = Tensor::new(&scales, device)?;
                let before = values(&[ROWS, stride], 9, dtype, device)?;
                let (out, low) = (before.copy()?, zeros(&[ROWS, rank], DType::F32, device)?);
                let [o, x_at, a, b_at, low_at, s] = addresses(gpu, [&out, &x, &a, &b, &low, &scale])?;
                let term = LowRank {
                    a,
                    b: b_at,
                    rank,
                    inputs,
                    outputs,
                    out_stride: stride,
                };
                // SAFETY: the tensors have the shapes that the kernels read and write.
                unsafe { kernels(gpu, dtype).add_low_rank(o, x_at, low_at, s, ROWS, &term)? };
                let a = values(&[rank, inputs], 7, DType::F32, &Device::Cpu)?;
                let term = read(&x)?.matmul(&a.t()?)?.matmul(&read(&b)?.t()?)?;
                let term = term.broadcast_mul(&Tensor::new(&scales, &Device::Cpu)?.unsqueeze(1)?)?;
                let term = term.pad_with_zeros(1, 0, stride - outputs)?;
                // Sums of up to 300 products of values of about 1.
                assert_close(&read(&out)?, &(read(&before)? + term)?, 40.0 * tolerance)?;
            }
        }
        Ok(())
    })
}

/// The addresses of several tensors.
pub(super) fn addresses<const N: usize>(gpu: &Gpu, tensors: [&Tensor; N]) -> Result<[Address; N]> {
    let mut addresses = [0; N];
    for (address, tensor) in addresses.iter_mut().zip(tensors) {
        *address = gpu.address(tensor)?;
    }
    Ok(addresses)
}
