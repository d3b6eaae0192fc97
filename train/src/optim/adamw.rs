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
    /// The first and second moments, f32: those of all parameters one behind the other, in the order of their names, so that
    /// a step is a few operations however many parameters there are.
    moments: [Tensor; 2],
    steps: usize,
}

impl AdamW {
    /// For variables by name.
    ///
    /// # Errors
    /// There are none, or the device failed.
    pub fn new(parameters: BTreeMap<String, Tensor>, config: AdamWConfig) -> Result<Self> {
        let zeros = |p: &Tensor| Tensor::zeros(p.shape(), DType::F32, p.device());
        let zeros = flat(parameters.values().map(zeros))?;
        Ok(Self {
            config,
            parameters,
            moments: [zeros.clone(), zeros],
            steps: 0,
        })
    }

    /// One step along `grads`.
    ///
    /// # Errors
    /// A parameter has no gradient, or the device failed.
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
        let grad = flat(self.parameters.keys().map(|name| match grads.get(name) {
            Some(grad) => Ok(grad.clone()),
            None => candle_core::bail!("no gradient reached {name}"),
        }))?;
        let [m, v] = &mut self.moments;
        *m = ((&*m * beta1)? + (&grad * (1.0 - beta1))?)?;
        *v = ((&*v * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
        let denominator = ((v.sqrt()? * (1.0 / bias2.sqrt()))? + eps)?;
        let update = (m.div(&denominator)? * (learning_rate / bias1))?;
        let before = flat(self.parameters.values().map(|p| Ok(p.detach())))?;
        let after = ((before * (1.0 - learning_rate * weight_decay))? - update)?;
        for (parameter, part) in self.parameters.values().zip(self.parts(&after)) {
            Var::from_tensor(parameter)?.set(&part?)?;
        }
        Ok(())
    }

    /// What each parameter has of `all`, which holds the like of every one.
    fn parts<'a>(&'a self, all: &'a Tensor) -> impl Iterator<Item = Result<Tensor>> + 'a {
        self.parameters.values().scan(0, |begin, parameter| {
            let length = parameter.elem_count();
            let part = all.narrow(0, *begin, length);
            *begin += length;
            Some(part.and_then(|part| part.reshape(parameter.shape())))
        })
    }

    /// The moments under `m.NAME` and `v.NAME`, and the steps done.
    ///
    /// # Errors
    /// The device failed.
    pub fn state(&self) -> Result<(HashMap<String, Tensor>, usize)> {
        let mut state = HashMap::new();
        for (letter, moments) in ["m", "v"].into_iter().zip(&self.moments) {
            for (name, moment) in self.parameters.keys().zip(self.parts(moments)) {
                state.insert(format!("{letter}.{name}"), moment?);
            }
        }
        Ok((state, self.steps))
    }

    /// Goes on from a state that [`AdamW::state`] gave.
    ///
    /// # Errors
    /// A moment is missing or of another shape.
    pub fn restore(&mut self, state: &HashMap<String, Tensor>, steps: usize) -> Result<()> {
        for (letter, moments) in ["m", "v"].into_iter().zip(&mut self.moments) {
            *moments = flat(self.parameters.iter().map(|(name, parameter)| {
                let key = format!("{letter}.{name}");
                match state.get(&key) {
                    Some(saved) if saved.shape() == parameter.shape() => Ok(saved.clone()),
                    _ => candle_core::bail!("optimiser state {key} is missing or of another shape"),
                }
            }))?;
        }
        self.steps = steps;
        Ok(())
    }
}

/// The elements of all tensors, one behind the other.
fn flat(tensors: impl Iterator<Item = Result<Tensor>>) -> Result<Tensor> {
    let tensors: Vec<Tensor> = tensors.map(|tensor| tensor?.flatten_all()).collect::<Result<_>>()?;
    Tensor::cat(&tensors, 0)
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
    fn each_parameter_steps_as_it_does_alone() -> Result<()> {
        let run = |names: &[&str]| -> Result<Vec<Vec<f32>>> {
            let var = |name: &&str| {
                let values: &[f32] = if **name == *"a" { &[1., -2., 3., 4.] } else { &[0.5, 7.] };
                let var = Var::from_tensor(&Tensor::new(values, &Device::Cpu)?.reshape((values.len() / 2, 2))?)?;
                Ok(((*name).to_owned(), var.as_tensor().clone()))
            };
            let parameters: BTreeMap<String, Tensor> = names.iter().map(var).collect::<Result<_>>()?;
            let mut adamw = AdamW::new(parameters.clone(), AdamWConfig::default())?;
            for _ in 0..3 {
                let mut grads = Gradients::default();
                for parameter in parameters.values() {
                    grads.add(&parameters, &parameter.powf(3.0)?.sum_all()?.backward()?)?;
                }
                adamw.step(&grads, 0.01)?;
            }
            let flat = |p: &Tensor| p.flatten_all()?.to_vec1();
            parameters.values().map(flat).collect()
        };
        assert_eq!(run(&["a", "b"])?, [run(&["a"])?, run(&["b"])?].concat());
        Ok(())
    }

    #[test]
    fn a_parameter_that_no_gradient_reaches_is_an_error() -> Result<()> {
        let var = Var::zeros(2, DType::F32, &Device::Cpu)?;
        let parameters = BTreeMap::from([("w".to_owned(), var.as_tensor().clone())]);
        let mut adamw = AdamW::new(parameters, AdamWConfig::default())?;
        let error = adamw.step(&Gradients::default(), 0.1).expect_err("w has none");
        assert!(error.to_string().contains("no gradient reached w"), "{error}");
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
                    let (state, steps) = adamw.state()?;
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
