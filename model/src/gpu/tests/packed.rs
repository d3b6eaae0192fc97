//! The kernels of a training pass, each against the CPU's.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::Var;

use super::rows::addresses;
use super::*;
use crate::gpu::kernels::{Drop, Factor, Packed, PackedGrads};
use crate::gpu::training::PassInputs;
use crate::ops::{self, AttentionShape};

/// Longer than a tile of either kind, and short ones.
const LENGTHS: [usize; 3] = [67, 1, 12];
const TOKENS: usize = 80;

/// Attention forward and backward of packed sequences, by the kernels.
struct Attended {
    out: Tensor,
    dq: Tensor,
    dkv: Tensor,
}

/// - `q`, `grad`: of the rows `read`; `kv`: keys and values side by side, of all
fn attend(gpu: &Gpu, [q, kv, grad]: [&Tensor; 3], read: &[u32], shape: AttentionShape) -> Result<Attended> {
    let (dtype, device) = (q.dtype(), q.device());
    let positions: Vec<u32> = LENGTHS.iter().flat_map(|&n| 0..n as u32).collect();
    let inputs = PassInputs::new(gpu, dtype, (&LENGTHS, &positions), (read, None), (1.0, None))?;
    let (out, dq) = (zeros(q.dims(), dtype, device)?, zeros(q.dims(), dtype, device)?);
    let dkv = zeros(kv.dims(), dtype, device)?;
    let sums = [read.len(), shape.heads];
    let (log_sums, deltas) = (zeros(&sums, DType::F32, device)?, zeros(&sums, DType::F32, device)?);
    let [q, k, grad, out_at, dq_at, dk] = addresses(gpu, [q, kv, grad, &out, &dq, &dkv])?;
    let [log_sums, deltas] = addresses(gpu, [&log_sums, &deltas])?;
    let values = (shape.kv_width() * dtype.size_in_bytes()) as u64;
    let packed = Packed {
        q,
        k,
        k_stride: 2 * shape.kv_width(),
        v: k + values,
        kv_stride: 2 * shape.kv_width(),
        query_positions: inputs.last.positions,
        positions: inputs.positions,
        query_tiles: inputs.last.query_tiles,
        key_tiles: inputs.last.key_tiles,
        queries: read.len(),
        shape,
    };
    let grads = PackedGrads {
        grad,
        out: out_at,
        log_sums,
        deltas,
        dq: dq_at,
        dk,
        dv: dk + values,
    };
    // SAFETY: the tensors have the shapes that the kernels read and write.
    unsafe {
        kernels(gpu, dtype).packed_forward(&packed, out_at, log_sums)?;
        kernels(gpu, dtype).packed_backward(&packed, &grads)?;
    }
    Ok(Attended {
        out: super::read(&out)?,
        dq: super::read(&dq)?,
        dkv: super::read(&dkv)?,
    })
}

/// Against the CPU's packed attention, on the same rounded values.
fn check_attention(gpu: &Gpu, device: &Device, (dtype, tolerance): (DType, f32), shape: AttentionShape) -> Result<()> {
    let all: Vec<u32> = (0..TOKENS as u32).collect();
    let some = [2, 3, 33, 65, 66, 67, 72];
    for read in [&all[..], &some] {
        let rows = Tensor::new(read, &Device::Cpu)?;
        let full = values(&[TOKENS, shape.q_width()], 30, dtype, device)?;
        let q = Var::from_tensor(&super::read(&full)?)?;
        let kv = values(&[TOKENS, 2 * shape.kv_width()], 31, dtype, device)?;
        let wide = Var::from_tensor(&super::read(&kv)?)?;
        let part = |start| wide.as_tensor().narrow(1, start, shape.kv_width())?.contiguous();
        let lengths: Arc<[usize]> = LENGTHS.as_slice().into();
        let (k, v) = (part(0)?, part(shape.kv_width())?);
        let want = ops::packed_attention(q.as_tensor(), &k, &v, &lengths, shape)?.index_select(&rows, 0)?;
        let grad = values(want.dims(), 32, dtype, device)?;
        let grads = (&want * super::read(&grad)?)?.sum_all()?.backward()?;
        let picked = full.index_select(&Tensor::new(read, device)?, 0)?;
        let got = attend(gpu, [&picked, &kv, &grad], read, shape)?;
        let of = |var: &Var| grads.get(var.as_tensor()).cloned().expect("it has a gradient");
        assert_close(&got.out, &want, tolerance)?;
        assert_close(&got.dq, &of(&q).index_select(&rows, 0)?, tolerance)?;
        // Sums over all queries that see a key.
        assert_close(&got.dkv, &of(&wide), 4.0 * tolerance)?;
    }
    Ok(())
}

#[test]
fn packed_attention_and_its_gradients_are_those_of_the_cpu() -> Result<()> {
    let shape = |heads, kv_heads, head_dim, window| AttentionShape {
        heads,
        kv_heads,
        head_dim,
        window,
    };
    on_each_device(|gpu, device| {
        for (dtype, tolerance) in DTYPES {
            let tolerance = (dtype, 2.0 * tolerance);
            // f16 is bf16's kernel with other products.
            let head_dims: &[usize] = match dtype {
                DType::F16 => &[80],
                _ => &[16, 32, 64, 80, 96, 128],
            };
            for &head_dim in head_dims {
                check_attention(gpu, device, tolerance, shape(2, 1, head_dim, None))?;
            }
            for window in [1, 33] {
                check_attention(gpu, device, tolerance, shape(2, 2, 16, Some(window)))?;
            }
        }
        for head_dim in [8, 12] {
            check_attention(gpu, device, (DType::F32, 1e-5), shape(2, 1, head_dim, Some(40)))?;
        }
        Ok(())
    })
}

#[test]
fn a_term_drops_the_same_inputs_forward_and_backward() -> Result<()> {
    on_each_device(|gpu, device| {
        for exactness in DTYPES {
            // A thread's ranks whole, whole and some more that are read one by one, or all so.
            for rank in [8, 12, 11] {
                check_term(gpu, device, exactness, rank)?;
            }
        }
        Ok(())
    })
}

fn check_term(gpu: &Gpu, device: &Device, (dtype, tolerance): (DType, f32), rank: usize) -> Result<()> {
    // More rows than one part of a sum has, and more columns than a block.
    let (rows, inputs, outputs, scale) = (130, 536, 16, 2.0);
    let drop = Drop::new(0.4, 9);
    let random = |shape: &[usize], seed, dtype| values(shape, seed, dtype, device);
    let (x, out) = (
        random(&[rows, inputs], 1, dtype)?,
        zeros(&[rows, outputs], dtype, device)?,
    );
    let (a, b) = (
        random(&[rank, inputs], 2, DType::F32)?,
        random(&[outputs, rank], 3, DType::F32)?,
    );
    let (grad, dx) = (
        random(&[rows, outputs], 4, dtype)?,
        zeros(&[rows, inputs], dtype, device)?,
    );
    let (da, db) = (
        zeros(&[rank, inputs], DType::F32, device)?,
        zeros(&[outputs, rank], DType::F32, device)?,
    );
    let (low, dlow) = (
        zeros(&[rows, rank], DType::F32, device)?,
        zeros(&[rows, rank], DType::F32, device)?,
    );
    // A third of the rows has no adapter.
    let scales: Vec<f32> = (0..rows).map(|row| if row % 3 == 1 { 0.0 } else { scale }).collect();
    let scales = Tensor::from_vec(scales, (rows, 1), device)?;
    let parts = zeros(&[2 * rank * inputs], DType::F32, device)?;
    let [x_at, out_at, a_at, b_at, grad_at, dx_at] = addresses(gpu, [&x, &out, &a, &b, &grad, &dx])?;
    let [da_at, db_at, low_at, dlow_at, parts_at] = addresses(gpu, [&da, &db, &low, &dlow, &parts])?;
    let [scales_at] = addresses(gpu, [&scales])?;
    let (fa, fb) = (Factor::a(a_at, rank, inputs), Factor::b(b_at, rank, outputs));
    // SAFETY: the tensors have the shapes that the kernels read and write.
    unsafe {
        let kernels = kernels(gpu, dtype);
        kernels.term_down(low_at, (x_at, inputs), rows, fa, scales_at, drop)?;
        kernels.term_up((out_at, outputs), low_at, rows, fb, Drop::NONE)?;
        kernels.term_down(dlow_at, (grad_at, outputs), rows, fb, scales_at, Drop::NONE)?;
        let (to_a, to_b) = (Factor::a(da_at, rank, inputs), Factor::b(db_at, rank, outputs));
        kernels.term_outer(to_b, parts_at, (grad_at, outputs), low_at, rows, Drop::NONE)?;
        kernels.term_outer(to_a, parts_at, (x_at, inputs), dlow_at, rows, drop)?;
        kernels.term_up((dx_at, inputs), dlow_at, rows, fa, drop)?;
    }
    let mask: Vec<f32> = (0..rows * inputs).map(|at| drop.factor(at)).collect();
    let dropped = mask.iter().filter(|m| **m == 0.0).count() as f64 / mask.len() as f64;
    assert!((dropped - 0.4).abs() < 0.03, "{dropped}");
    let mask = Tensor::from_vec(mask, (rows, inputs), &Device::Cpu)?;
    let mut vars = HashMap::new();
    for (name, tensor) in [("x", &x), ("a", &a), ("b", &b)] {
        vars.insert(name, Var::from_tensor(&read(tensor)?)?);
    }
    let low = (vars["x"].as_tensor() * &mask)?.matmul(&vars["a"].t()?)?;
    let want = low.matmul(&vars["b"].t()?)?.broadcast_mul(&read(&scales)?)?;
    let grads = (&want * read(&grad)?)?.sum_all()?.backward()?;
    // Sums of up to 536 products of values of a few units, of which only those in dtype are rounded.
    let of = |name: &str| grads.get(vars[name].as_tensor()).cloned().expect("it has a gradient");
    assert_close(&read(&out)?, &want, 40.0 * tolerance)?;
    assert_close(&read(&dx)?, &of("x"), 40.0 * tolerance)?;
    assert_close(&read(&da)?, &of("a"), 1e-3)?;
    assert_close(&read(&db)?, &of("b"), 1e-3)?;
    Ok(())
}
