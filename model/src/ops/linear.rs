//! Linear layers, frozen or trained.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CudaStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use std::sync::Arc;

use super::{floats, host_floats};
use crate::cpu::{self, PackedMatrix, Turned, multiply_turned};

/// `x wᵀ + bias`.
///
/// - `x`: `[t, i]`; `w`: `[o, i]`; `bias`: `[o]`
///
/// Returns `[t, o]`. A `w` that is a variable gets its gradient; one that is not costs none: candle would compute
/// and keep the full gradient of a frozen weight (13 GB for a 7B model).
pub(crate) fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = if w.is_variable() {
        x.matmul(&w.t()?)?
    } else if x.track_op() {
        x.apply_op2(w, Frozen)?
    } else {
        x.apply_op2_no_bwd(w, &Frozen)?
    };
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// `x wᵀ` for a frozen weight in panels, which gets no gradient.
///
/// - `x`: `[t, inputs]`; returns `[t, outputs]`
pub(crate) fn packed_linear(x: &Tensor, w: &Arc<PackedMatrix>) -> Result<Tensor> {
    let x = x.contiguous()?;
    let op = PackedLinear { w: w.clone() };
    if x.track_op() {
        x.apply_op1(op)
    } else {
        x.apply_op1_no_bwd(&op)
    }
}

struct PackedLinear {
    w: Arc<PackedMatrix>,
}

impl CustomOp1 for PackedLinear {
    fn name(&self) -> &'static str {
        "packed-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (rows, inner) = layout.shape().dims2()?;
        let (outputs, inputs) = self.w.shape();
        if inner != inputs {
            candle_core::bail!("linear: input has {inner} features, the weight takes {inputs}");
        }
        let y = cpu::product(floats(x, layout, self.name())?, &self.w);
        Ok((CpuStorage::F32(y), Shape::from((rows, outputs))))
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let grad = grad.contiguous()?;
        let product = Turned {
            grad: &host_floats(&grad)?,
            matrix: &self.w,
        };
        let mut dx = vec![0f32; x.elem_count()];
        multiply_turned(&[product], &mut dx, false);
        Ok(Some(Tensor::from_vec(dx, x.shape(), x.device())?))
    }
}

/// Batch, rows, columns and inner size of a product, as candle's backends take them.
type ProductSizes = (usize, usize, usize, usize);

struct Frozen;

impl Frozen {
    /// The product's sizes, the layout of `wᵀ` and the shape of the result.
    fn sizes(x: &Layout, w: &Layout) -> Result<(ProductSizes, Layout, Shape)> {
        let (rows, inner) = x.shape().dims2()?;
        let (columns, w_inner) = w.shape().dims2()?;
        if inner != w_inner {
            candle_core::bail!("linear: input has {inner} features, the weight takes {w_inner}");
        }
        Ok((
            (1, rows, columns, inner),
            w.transpose(0, 1)?,
            Shape::from((rows, columns)),
        ))
    }
}

impl CustomOp2 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (sizes, lw, shape) = Self::sizes(lx, lw)?;
        Ok((x.matmul(w, sizes, lx, &lw)?, shape))
    }

    fn cuda_fwd(&self, x: &CudaStorage, lx: &Layout, w: &CudaStorage, lw: &Layout) -> Result<(CudaStorage, Shape)> {
        let (sizes, lw, shape) = Self::sizes(lx, lw)?;
        Ok((x.matmul(w, sizes, lx, &lw)?, shape))
    }

    fn bwd(&self, _x: &Tensor, w: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(grad.matmul(w)?), None))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, random};
    use super::super::to_floats;
    use super::*;
    use candle_core::Var;

    #[test]
    fn frozen_and_trained_agree_and_only_the_trained_weight_has_a_gradient() -> Result<()> {
        let x = Var::from_tensor(&random(&[3, 4], 1)?)?;
        let frozen = random(&[5, 4], 2)?;
        let trained = Var::from_tensor(&frozen)?;
        let a = linear(x.as_tensor(), &frozen, None)?;
        let b = linear(x.as_tensor(), trained.as_tensor(), None)?;
        assert_close(&a, &b, 1e-6)?;
        let (ga, gb) = (a.sqr()?.sum_all()?.backward()?, b.sqr()?.sum_all()?.backward()?);
        let grad = |g: &candle_core::backprop::GradStore| g.get(x.as_tensor()).cloned().expect("x has a gradient");
        assert_close(&grad(&ga), &grad(&gb), 1e-5)?;
        assert!(ga.get(&frozen).is_none());
        let packed = Arc::new(PackedMatrix::pack(&to_floats(&frozen)?, 5, 4));
        let c = packed_linear(x.as_tensor(), &packed)?;
        assert_close(&c, &b, 1e-6)?;
        assert_close(&grad(&c.sqr()?.sum_all()?.backward()?), &grad(&gb), 1e-5)?;
        assert!(gb.get(trained.as_tensor()).is_some());
        Ok(())
    }
}
