//! The gated activation of the feed-forward layers.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::{floats, has_kernel, to_floats, vector};

/// `silu(gate) * up`, element by element; both `[t, f]`.
pub(crate) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if !has_kernel(gate) {
        return candle_nn::ops::silu(gate)? * up;
    }
    if gate.track_op() || up.track_op() {
        gate.apply_op2(up, SwiGlu)
    } else {
        gate.apply_op2_no_bwd(up, &SwiGlu)
    }
}

/// `gate = silu(gate) * up`, element by element.
pub(crate) fn swiglu_in_place(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g * sigmoid(*g) * u;
    }
}

/// Replaces `gate` and `up` by their gradients, where `grad` is that of [`swiglu_in_place`]'s result.
pub(crate) fn swiglu_grad_in_place(gate: &mut [f32], up: &mut [f32], grad: &[f32]) {
    for ((gate, up), grad) in gate.iter_mut().zip(up).zip(grad) {
        let (g, s) = (*gate, sigmoid(*gate));
        *gate = grad * *up * s * (1.0 + g * (1.0 - s));
        *up = grad * g * s;
    }
}

struct SwiGlu;

#[inline(always)]
fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + vector::exp(-x))
}

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(&self, gate: &CpuStorage, lg: &Layout, up: &CpuStorage, lu: &Layout) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (floats(gate, lg, self.name())?, floats(up, lu, self.name())?);
        let mut out = gate.to_vec();
        swiglu_in_place(&mut out, up);
        Ok((CpuStorage::F32(out), lg.shape().clone()))
    }

    fn bwd(&self, gate: &Tensor, up: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (shape, device) = (gate.shape(), gate.device());
        let (mut gate, mut up, grad) = (to_floats(gate)?, to_floats(up)?, to_floats(grad)?);
        swiglu_grad_in_place(&mut gate, &mut up, &grad);
        let tensor = |data| Tensor::from_vec(data, shape, device).map(Some);
        Ok((tensor(gate)?, tensor(up)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_same_op, random};
    use super::*;

    #[test]
    fn kernel_equals_the_composition() -> Result<()> {
        let inputs = [(random(&[4, 9], 1)? * 6.0)?, random(&[4, 9], 2)?];
        assert_same_op(
            &inputs,
            |t| swiglu(&t[0], &t[1]),
            |t| candle_nn::ops::silu(&t[0])? * &t[1],
            1e-5,
        )
    }
}
