//! The training loss.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::{floats, has_kernel, to_floats, vector};

/// `-Σ log softmax(logits)[target] / divisor` over the rows, in f32: with the number of rows as `divisor` it is the
/// mean, with another it is one micro-batch's part of a larger mean.
///
/// - `logits`: `[n, v]`; `targets`: one class per row
///
/// Returns a scalar.
pub fn cross_entropy(logits: &Tensor, targets: &[u32], divisor: f64) -> Result<Tensor> {
    let (rows, classes) = logits.dims2()?;
    if rows != targets.len() || targets.iter().any(|&t| t as usize >= classes) {
        candle_core::bail!(
            "cross-entropy: {} targets below {classes} wanted for {rows} rows",
            targets.len()
        );
    }
    if !has_kernel(logits) {
        return stock(logits, targets, divisor);
    }
    logits.contiguous()?.apply_op1(CrossEntropy {
        targets: targets.into(),
        divisor: divisor as f32,
    })
}

fn stock(logits: &Tensor, targets: &[u32], divisor: f64) -> Result<Tensor> {
    let targets = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let log_p = candle_nn::ops::log_softmax(&logits.to_dtype(candle_core::DType::F32)?, 1)?;
    log_p.gather(&targets, 1)?.sum_all()?.affine(-1.0 / divisor, 0.0)
}

struct CrossEntropy {
    targets: Arc<[u32]>,
    divisor: f32,
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross-entropy"
    }

    fn cpu_fwd(&self, logits: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, classes) = layout.shape().dims2()?;
        let logits = floats(logits, layout, self.name())?;
        let mut scratch = vec![0f32; classes];
        let mut loss = 0f64;
        for (row, &target) in logits.chunks_exact(classes).zip(self.targets.iter()) {
            scratch.copy_from_slice(row);
            let (largest, sum) = vector::softmax(&mut scratch);
            loss += f64::from(largest) + f64::from(sum).ln() - f64::from(row[target as usize]);
        }
        Ok((
            CpuStorage::F32(vec![(loss / f64::from(self.divisor)) as f32]),
            Shape::from(()),
        ))
    }

    fn bwd(&self, logits: &Tensor, _loss: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (_, classes) = logits.dims2()?;
        let scale = grad.to_scalar::<f32>()? / self.divisor;
        let mut grads = to_floats(logits)?;
        for (row, &target) in grads.chunks_exact_mut(classes).zip(self.targets.iter()) {
            vector::softmax(row);
            row[target as usize] -= 1.0;
            row.iter_mut().for_each(|g| *g *= scale);
        }
        Ok(Some(Tensor::from_vec(grads, logits.shape(), logits.device())?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_same_op, random};
    use super::*;

    #[test]
    fn kernel_equals_the_composition() -> Result<()> {
        let logits = (random(&[3, 11], 1)? * 8.0)?;
        let run = |f: fn(&Tensor, &[u32], f64) -> Result<Tensor>| move |t: &[Tensor]| f(&t[0], &[10, 0, 4], 2.0);
        assert_same_op(&[logits], run(cross_entropy), run(stock), 1e-5)
    }

    #[test]
    fn a_target_outside_the_vocabulary_is_refused() -> Result<()> {
        assert!(cross_entropy(&random(&[1, 4], 1)?, &[4], 1.0).is_err());
        Ok(())
    }
}
