//! Muon: momentum whose matrix is made orthogonal before each step.
//!
//! Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). It learns the
//! bundled model in a fraction of AdamW's steps.

use std::collections::BTreeMap;

use candle_core::{DType, Result, Tensor, Var};

use super::Gradients;

/// Settings of Muon.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MuonConfig {
    /// Decay of the momentum.
    pub momentum: f64,
    /// Share of a parameter taken off per step, times the learning rate.
    pub weight_decay: f64,
}

impl Default for MuonConfig {
    fn default() -> Self {
        Self {
            momentum: 0.95,
            weight_decay: 0.1,
        }
    }
}

/// The optimiser and its momentum, for matrices only.
pub struct Muon {
    config: MuonConfig,
    parameters: BTreeMap<String, Tensor>,
    momentum: BTreeMap<String, Tensor>,
}

impl Muon {
    /// For matrix variables by name.
    ///
    /// # Errors
    /// The device failed.
    pub fn new(parameters: BTreeMap<String, Tensor>, config: MuonConfig) -> Result<Self> {
        let zeros = |p: &Tensor| Tensor::zeros(p.shape(), DType::F32, p.device());
        let momentum = parameters
            .iter()
            .map(|(n, p)| Ok((n.clone(), zeros(p)?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            config,
            parameters,
            momentum,
        })
    }

    /// One step along `grads`; a parameter without a gradient stays.
    ///
    /// # Errors
    /// The device failed.
    pub fn step(&mut self, grads: &Gradients, learning_rate: f64) -> Result<()> {
        let MuonConfig {
            momentum: beta,
            weight_decay,
        } = self.config;
        for (name, parameter) in &self.parameters {
            let (Some(grad), Some(momentum)) = (grads.get(name), self.momentum.get_mut(name)) else {
                continue;
            };
            *momentum = ((&*momentum * beta)? + grad)?;
            let nesterov = (grad + (&*momentum * beta)?)?;
            let (rows, columns) = parameter.dims2()?;
            // Updates of the same size whatever the shape: sqrt(max(1, rows / columns)), as in the source.
            let scale = (rows as f64 / columns as f64).max(1.0).sqrt() * learning_rate;
            let update = (orthogonal(&nesterov)? * scale)?;
            let decayed = (parameter.detach() * (1.0 - learning_rate * weight_decay))?;
            Var::from_tensor(parameter)?.set(&(decayed - update)?)?;
        }
        Ok(())
    }
}

/// The nearest matrix whose singular values are all about 1, by five Newton-Schulz steps of degree five.
fn orthogonal(x: &Tensor) -> Result<Tensor> {
    const A: f64 = 3.4445;
    const B: f64 = -4.7750;
    const C: f64 = 2.0315;
    let (rows, columns) = x.dims2()?;
    let norm = f64::from(x.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt();
    let mut x = (x * (1.0 / (norm + 1e-7)))?;
    if rows > columns {
        x = x.t()?.contiguous()?;
    }
    for _ in 0..5 {
        let gram = x.matmul(&x.t()?)?;
        let polynomial = ((&gram * B)? + (gram.matmul(&gram)? * C)?)?;
        x = ((&x * A)? + polynomial.matmul(&x)?)?;
    }
    if rows > columns { x.t()?.contiguous() } else { Ok(x) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn singular_values_come_near_one() -> Result<()> {
        // diag(1, 2, 4): its orthogonal factor is the identity, which the polynomial meets within about 0.3.
        for shape in [(3, 3), (5, 3), (3, 5)] {
            let mut data = vec![0f32; shape.0 * shape.1];
            for (i, value) in [1., 2., 4.].into_iter().enumerate() {
                data[i * shape.1 + i] = value;
            }
            let got = orthogonal(&Tensor::from_vec(data, shape, &Device::Cpu)?)?.to_vec2::<f32>()?;
            for (i, row) in got.iter().enumerate() {
                for (j, value) in row.iter().enumerate() {
                    let want = if i == j && i < 3 { 1.0 } else { 0.0 };
                    assert!((value - want).abs() < 0.35, "({i}, {j}): {value}");
                }
            }
        }
        Ok(())
    }
}
