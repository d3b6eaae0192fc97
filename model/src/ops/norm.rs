//! Root-mean-square normalisation.

use candle_core::{CpuStorage, CustomOp2, DType, Layout, Result, Shape, Tensor};

use super::{floats, has_kernel, to_floats, vector};

/// `x / sqrt(mean(x²) + eps) * w` over the last dimension, computed in f32.
///
/// - `x`: `[.., h]`; `w`: `[h]`
pub(crate) fn rms_norm(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    if !has_kernel(x) {
        return rms_norm_stock(x, w, eps);
    }
    let x = x.contiguous()?;
    let op = RmsNorm { eps: eps as f32 };
    if x.track_op() || w.track_op() {
        x.apply_op2(w, op)
    } else {
        x.apply_op2_no_bwd(w, &op)
    }
}

fn rms_norm_stock(x: &Tensor, w: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let mean = wide.sqr()?.mean_keepdim(candle_core::D::Minus1)?;
    let unit = wide.broadcast_div(&(mean + eps)?.sqrt()?)?;
    unit.to_dtype(x.dtype())?.broadcast_mul(w)
}

struct RmsNorm {
    eps: f32,
}

fn inverse_rms(row: &[f32], eps: f32) -> f32 {
    1.0 / (vector::dot(row, row) / row.len() as f32 + eps).sqrt()
}

/// One row of [`rms_norm`]; all of the same length.
pub(crate) fn rms_norm_row(row: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let inverse = inverse_rms(row, eps);
    for ((o, x), w) in out.iter_mut().zip(row).zip(w) {
        *o = x * inverse * w;
    }
}

/// [`rms_norm_row`] where it lies.
pub(crate) fn rms_norm_in_place(row: &mut [f32], w: &[f32], eps: f32) {
    let inverse = inverse_rms(row, eps);
    for (x, w) in row.iter_mut().zip(w) {
        *x *= inverse * w;
    }
}

/// Adds to `dx` the gradient of a row of [`rms_norm_row`], whose output has the gradient `grad`.
///
/// With u = x / rms: dx = (g w - u mean(g w u)) / rms.
pub(crate) fn rms_norm_grad_row(row: &[f32], w: &[f32], eps: f32, grad: &[f32], dx: &mut [f32]) {
    let inverse = inverse_rms(row, eps);
    let ((x8, x_rest), (w8, w_rest), (g8, g_rest)) = (row.as_chunks::<8>(), w.as_chunks::<8>(), grad.as_chunks::<8>());
    let mut lanes = [0f32; 8];
    for ((x, w), g) in x8.iter().zip(w8).zip(g8) {
        for i in 0..8 {
            lanes[i] += x[i] * w[i] * g[i];
        }
    }
    let rest: f32 = x_rest.iter().zip(w_rest).zip(g_rest).map(|((x, w), g)| x * w * g).sum();
    let along = (vector::sum(&lanes) + rest) * inverse * inverse / row.len() as f32;
    for (((dx, x), w), g) in dx.iter_mut().zip(row).zip(w).zip(grad) {
        *dx += (g * w - x * along) * inverse;
    }
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, w: &CpuStorage, lw: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, w) = (floats(x, lx, self.name())?, floats(w, lw, self.name())?);
        let mut out = vec![0f32; x.len()];
        for (row, out) in x.chunks_exact(w.len()).zip(out.chunks_exact_mut(w.len())) {
            rms_norm_row(row, w, self.eps, out);
        }
        Ok((CpuStorage::F32(out), lx.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (shape, device) = (x.shape(), x.device());
        let (x, scale, grad) = (to_floats(x)?, to_floats(w)?, to_floats(grad)?);
        let h = scale.len();
        let mut dx = vec![0f32; x.len()];
        let rows = x.chunks_exact(h).zip(grad.chunks_exact(h));
        for ((x, g), dx) in rows.clone().zip(dx.chunks_exact_mut(h)) {
            rms_norm_grad_row(x, &scale, self.eps, g, dx);
        }
        let dw = if w.track_op() {
            let mut dw = vec![0f32; h];
            for (x, g) in rows {
                let inverse = inverse_rms(x, self.eps);
                for ((dw, x), g) in dw.iter_mut().zip(x).zip(g) {
                    *dw += g * x * inverse;
                }
            }
            Some(Tensor::from_vec(dw, h, device)?)
        } else {
            None
        };
        Ok((Some(Tensor::from_vec(dx, shape, device)?), dw))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_same_op, random};
    use super::*;

    #[test]
    fn kernel_equals_the_composition() -> Result<()> {
        let inputs = [random(&[5, 3, 12], 1)?, random(&[12], 2)?];
        assert_same_op(
            &inputs,
            |t| rms_norm(&t[0], &t[1], 1e-5),
            |t| rms_norm_stock(&t[0], &t[1], 1e-5),
            1e-5,
        )
    }
}
