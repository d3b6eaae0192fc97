//! Gradients by parameter name, summed over micro-batches.

use std::collections::BTreeMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor};

/// Gradients of one optimiser step, in f32.
#[derive(Debug, Default)]
pub struct Gradients(BTreeMap<String, Tensor>);

impl Gradients {
    /// Adds a micro-batch's gradients of `parameters`.
    ///
    /// # Errors
    /// The device failed.
    pub fn add(&mut self, parameters: &BTreeMap<String, Tensor>, grads: &GradStore) -> Result<()> {
        for (name, parameter) in parameters {
            let Some(grad) = grads.get(parameter) else { continue };
            self.add_one(name.clone(), grad.to_dtype(DType::F32)?.detach())?;
        }
        Ok(())
    }

    /// Adds the gradients of another part of the step.
    ///
    /// # Errors
    /// The device failed.
    pub fn merge(&mut self, other: Self) -> Result<()> {
        other
            .0
            .into_iter()
            .try_for_each(|(name, grad)| self.add_one(name, grad))
    }

    fn add_one(&mut self, name: String, grad: Tensor) -> Result<()> {
        let sum = match self.0.get(&name) {
            Some(before) => (before + grad)?,
            None => grad,
        };
        self.0.insert(name, sum);
        Ok(())
    }

    /// The gradient of a parameter; `None` where nothing reached it.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.0.get(name)
    }

    /// Scales all gradients so that their joint norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_`
    /// does; 0 only measures.
    ///
    /// Returns the norm before.
    ///
    /// # Errors
    /// The device failed.
    pub fn clip(&mut self, max_norm: f64) -> Result<f64> {
        let norm = self.norm()?;
        let scale = max_norm / (norm + 1e-6);
        if max_norm > 0.0 && scale < 1.0 {
            for grad in self.0.values_mut() {
                *grad = (&*grad * scale)?;
            }
        }
        Ok(norm)
    }

    /// The joint norm. A GPU is waited for once, not once per gradient.
    fn norm(&self) -> Result<f64> {
        let squares: Vec<Tensor> = self
            .0
            .values()
            .map(|grad| grad.sqr()?.sum_all())
            .collect::<Result<_>>()?;
        if squares.is_empty() {
            return Ok(0.0);
        }
        let squares = Tensor::stack(&squares, 0)?.to_vec1::<f32>()?;
        Ok(squares.into_iter().map(f64::from).sum::<f64>().sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    #[test]
    fn clipping_bounds_the_joint_norm() -> Result<()> {
        let var = Var::from_tensor(&Tensor::new(&[3f32, 4.], &Device::Cpu)?)?;
        let parameters = BTreeMap::from([("w".to_owned(), var.as_tensor().clone())]);
        let mut grads = Gradients::default();
        // The gradient of Σ w² / 2 is w, twice: (6, 8), norm 10.
        for _ in 0..2 {
            grads.add(&parameters, &(var.sqr()?.sum_all()? * 0.5)?.backward()?)?;
        }
        assert_eq!(grads.clip(0.0)?, 10.0);
        assert_eq!(grads.clip(5.0)?, 10.0);
        let clipped = grads.get("w").expect("it has one").to_vec1::<f32>()?;
        assert!(
            (clipped[0] - 3.0).abs() < 1e-5 && (clipped[1] - 4.0).abs() < 1e-5,
            "{clipped:?}"
        );
        Ok(())
    }
}
