//! AdamW with decoupled weight decay (arXiv 1711.05101), step by step as `torch.optim.AdamW`.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Result, Tensor, Var};

use super::Gradients;

/// Settings of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Share of a parameter taken off per step, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
        }
    }
}

/// The optimiser and its state.
pub struct AdamW {
    config: AdamWConfig,
    parameters: BTreeMap<String, Tensor>,
    moments: BTreeMap<String, (Tensor, Tensor)>,
    steps: usize,
}

impl AdamW {
    /// For variables by name.
    ///
    /// # Errors
    /// The device failed.
    pub fn new(parameters: BTreeMap<String, Tensor>, config: AdamWConfig) -> Result<Self> {
        let mut moments = BTreeMap::new();
        for (name, parameter) in &parameters {
            let zeros = || Tensor::zeros(parameter.shape(), DType::F32, parameter.device());
            moments.insert(name.clone(), (zeros()?, zeros()?));
        }
        Ok(Self {
            config,
            parameters,
            moments,
            steps: 0,
        })
    }

    /// One step along `grads`; a parameter without a gradient stays.
    ///
    /// # Errors
    /// The device failed.
    pub fn step(&mut self, grads: &Gradients, learning_rate: f64) -> Result<()> {
        let AdamWConfig {
            beta1,
            beta2,
            eps,
            weight_decay,
        } = self.config;
        self.steps += 1;
        let bias1 = 1.0 - beta1.powi(self.steps as i32);
        let bias2 = 1.0 - beta2.powi(self.steps as i32);
        for (name, parameter) in &self.parameters {
            let (Some(grad), Some((m, v))) = (grads.get(name), self.moments.get_mut(name)) else {
                continue;
            };
            *m = ((&*m * beta1)? + (grad * (1.0 - beta1))?)?;
            *v = ((&*v * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
            let denominator = ((v.sqrt()? * (1.0 / bias2.sqrt()))? + eps)?;
            let update = (m.div(&denominator)? * (learning_rate / bias1))?;
            let decayed = (parameter.detach() * (1.0 - learning_rate * weight_decay))?;
            Var::from_tensor(parameter)?.set(&(decayed - update)?)?;
        }
        Ok(())
    }

    /// The moments under `m.NAME` and `v.NAME`, and the steps done.
    pub fn state(&self) -> (HashMap<String, Tensor>, usize) {
        let mut state = HashMap::new();
        for (name, (m, v)) in &self.moments {
            state.insert(format!("m.{name}"), m.clone());
            state.insert(format!("v.{name}"), v.clone());
        }
        (state, self.steps)
    }

    /// Goes on from a state that [`AdamW::state`] gave.
    ///
    /// # Errors
    /// A moment is missing or of another shape.
    pub fn restore(&mut self, state: &HashMap<String, Tensor>, steps: usize) -> Result<()> {
        for (name, (m, v)) in &mut self.moments {
            for (key, moment) in [(format!("m.{name}"), m), (format!("v.{name}"), v)] {
                match state.get(&key) {
                    Some(saved) if saved.shape() == moment.shape() => *moment = saved.clone(),
                    _ => candle_core::bail!("optimiser state {key} is missing or of another shape"),
                }
            }
        }
        self.steps = steps;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn the_first_step_is_the_learning_rate_against_the_sign() -> Result<()> {
        // m/(1-b1) = g and v/(1-b2) = g², so the first update is lr * g / |g|; decay takes lr * wd * w.
        let var = Var::from_tensor(&Tensor::new(&[2f32, -2.], &Device::Cpu)?)?;
        let parameters = BTreeMap::from([("w".to_owned(), var.as_tensor().clone())]);
        let config = AdamWConfig {
            weight_decay: 0.5,
            ..AdamWConfig::default()
        };
        let mut adamw = AdamW::new(parameters.clone(), config)?;
        let mut grads = Gradients::default();
        grads.add(&parameters, &var.sqr()?.sum_all()?.backward()?)?;
        adamw.step(&grads, 0.1)?;
        let got = var.to_vec1::<f32>()?;
        assert!((got[0] - 1.8).abs() < 1e-6 && (got[1] + 1.8).abs() < 1e-6, "{got:?}");
        Ok(())
    }

    #[test]
    fn a_restored_optimiser_steps_as_the_one_saved() -> Result<()> {
        let run = |stop: usize| -> Result<Vec<f32>> {
            let var = Var::from_tensor(&Tensor::new(&[1f32, 3.], &Device::Cpu)?)?;
            let parameters = BTreeMap::from([("w".to_owned(), var.as_tensor().clone())]);
            let mut adamw = AdamW::new(parameters.clone(), AdamWConfig::default())?;
            for step in 0..6 {
                if step == stop {
                    let (state, steps) = adamw.state();
                    adamw = AdamW::new(parameters.clone(), AdamWConfig::default())?;
                    adamw.restore(&state, steps)?;
                }
                let mut grads = Gradients::default();
                grads.add(&parameters, &var.powf(3.0)?.sum_all()?.backward()?)?;
                adamw.step(&grads, 0.01)?;
            }
            var.to_vec1()
        };
        assert_eq!(run(3)?, run(99)?);
        Ok(())
    }
}
