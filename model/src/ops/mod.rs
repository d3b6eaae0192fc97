//! The operations of the network that candle's own would do without a gradient, or slowly.
//!
//! Each has a CPU kernel for f32 with its own backward, and a composition of candle's ops that runs for every
//! dtype and device and is the reference of its test.

mod attention;
mod cross_entropy;
mod linear;
mod matrix;
mod norm;
mod paged_attention;
mod rope;
mod swiglu;
pub(crate) mod vector;

#[cfg(test)]
pub(crate) use attention::attend_stock;
pub(crate) use attention::{AttentionShape, packed_attention};
pub use cross_entropy::cross_entropy;
pub(crate) use linear::{linear, packed_linear};
pub(crate) use matrix::gemm_transposed;
pub(crate) use norm::{rms_norm, rms_norm_grad_row, rms_norm_in_place, rms_norm_row};
pub(crate) use paged_attention::{CachedRow, paged_attention, write_rows};
pub(crate) use rope::{RopeTable, rope};
pub(crate) use swiglu::{swiglu, swiglu_grad_in_place, swiglu_in_place};

use std::ops::Deref;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor, bail};

/// Whether the CPU kernels of this module take `x`: f32 in main memory.
pub(crate) fn has_kernel(x: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32
}

/// The elements of a contiguous f32 operand of a kernel.
pub(crate) fn floats<'a>(storage: &'a CpuStorage, layout: &Layout, op: &str) -> Result<&'a [f32]> {
    let CpuStorage::F32(data) = storage else {
        bail!("{op}: expected f32");
    };
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => bail!("{op}: expected a contiguous operand"),
    }
}

/// A contiguous f32 tensor in main memory, read where it lies; nothing may write it meanwhile.
pub(crate) fn host_floats(x: &Tensor) -> Result<impl Deref<Target = [f32]> + '_> {
    let (storage, layout) = x.storage_and_layout();
    let Some(range) = layout.contiguous_offsets() else {
        bail!("expected a contiguous tensor");
    };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(_)) => Ok(Floats { storage, range }),
        _ => bail!("expected f32 in main memory"),
    }
}

struct Floats<G> {
    storage: G,
    range: (usize, usize),
}

impl<G: Deref<Target = Storage>> Deref for Floats<G> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.storage {
            Storage::Cpu(CpuStorage::F32(data)) => &data[self.range.0..self.range.1],
            _ => &[],
        }
    }
}

/// The elements of a contiguous f32 tensor, copied: for the backward passes, which see tensors, not storage.
fn to_floats(x: &Tensor) -> Result<Vec<f32>> {
    x.flatten_all()?.to_vec1::<f32>()
}

#[cfg(test)]
pub(crate) mod testing {
    //! What the tests of the kernels share.
    use candle_core::{Device, Result, Tensor, Var};
    use rand::{Rng, SeedableRng};

    /// Seeded values between -1 and 1.
    pub fn random(shape: &[usize], seed: u64) -> Result<Tensor> {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
        let data: Vec<f32> = (0..shape.iter().product())
            .map(|_| rng.random_range(-1.0..1.0))
            .collect();
        Tensor::from_vec(data, shape, &Device::Cpu)
    }

    /// Every element of `got` is within `tol` of `want`; NaN fails.
    pub fn assert_close(got: &Tensor, want: &Tensor, tol: f32) -> Result<()> {
        assert_eq!(got.dims(), want.dims());
        let (got, want) = (super::to_floats(got)?, super::to_floats(want)?);
        for (i, (g, w)) in got.iter().zip(&want).enumerate() {
            assert!((g - w).abs() <= tol, "element {i}: {g}, want {w} within {tol:e}");
        }
        Ok(())
    }

    /// Output and the gradient of every input of `kernel` equal those of `reference`.
    pub fn assert_same_op(
        inputs: &[Tensor],
        kernel: impl Fn(&[Tensor]) -> Result<Tensor>,
        reference: impl Fn(&[Tensor]) -> Result<Tensor>,
        tol: f32,
    ) -> Result<()> {
        let vars: Vec<Var> = inputs.iter().map(Var::from_tensor).collect::<Result<_>>()?;
        let tensors: Vec<Tensor> = vars.iter().map(|v| v.as_tensor().clone()).collect();
        let got = kernel(&tensors)?;
        let want = reference(&tensors)?;
        assert_close(&got, &want, tol)?;
        let weights = random(got.dims(), 99)?;
        let got_grads = (got * &weights)?.sum_all()?.backward()?;
        let want_grads = (want * &weights)?.sum_all()?.backward()?;
        for (i, tensor) in tensors.iter().enumerate() {
            let got = got_grads
                .get(tensor)
                .unwrap_or_else(|| panic!("input {i} has no gradient"));
            let want = want_grads.get(tensor).expect("the reference has every gradient");
            assert_close(got, want, tol)?;
        }
        Ok(())
    }
}
