//! LoRA training: loss, gradients, and twenty steps of AdamW as PyTorch does them.

use std::collections::{BTreeMap, HashMap};

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use lengthwise_model::{Adapter, Llama, LoraConfig, cross_entropy};

use crate::support::{assert_close, cut, ids, tensor, tensors, trained};

/// The batch of the fixture: rows, packed positions whose logits count, and what they should say.
struct Batch {
    rows: Vec<Vec<u32>>,
    wanted: Vec<u32>,
    targets: Vec<u32>,
}

impl Batch {
    /// A label says what the logits one position before it should predict; -100 is not counted.
    fn read(fixture: &HashMap<String, Tensor>) -> Result<Self> {
        let (mut wanted, mut targets, mut start) = (Vec::new(), Vec::new(), 0);
        let labels = cut(fixture, "labels")?;
        for row in &labels {
            for (position, &label) in row.iter().enumerate().filter(|(_, label)| **label >= 0) {
                wanted.push(start + position as u32 - 1);
                targets.push(label as u32);
            }
            start += row.len() as u32;
        }
        let rows = ids(&cut(fixture, "tokens")?);
        Ok(Self { rows, wanted, targets })
    }

    fn loss(&self, llama: &Llama, adapter: &Adapter) -> Result<Tensor> {
        let rows: Vec<&[u32]> = self.rows.iter().map(Vec::as_slice).collect();
        let logits = llama.forward_train(&rows, &self.wanted, Some(adapter), None)?;
        Ok(cross_entropy(&logits, &self.targets, self.targets.len() as f64)?)
    }
}

/// A trainable adapter with the factors `PREFIX.initial.NAME`.
fn adapter(llama: &Llama, fixture: &HashMap<String, Tensor>, prefix: &str) -> Result<Adapter> {
    let config = LoraConfig {
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: 0.0,
        use_rslora: false,
        target_modules: "all-linear".parse().map_err(anyhow::Error::msg)?,
        invocation_tokens: Vec::new(),
    };
    let adapter = Adapter::init(llama.config(), config, 0, &Device::Cpu)?;
    for (name, factor) in adapter.tensors() {
        Var::from_tensor(&factor)?.set(tensor(fixture, &format!("{prefix}.initial.{name}"))?)?;
    }
    let start = format!("{prefix}.initial.");
    let recorded = fixture.keys().filter(|name| name.starts_with(&start)).count();
    ensure!(recorded == adapter.tensors().len(), "{recorded} factors are recorded");
    Ok(adapter)
}

/// `torch.optim.AdamW` without weight decay after `clip_grad_norm_`, in f64 and apart from the project's own.
#[derive(Default)]
struct TorchAdamW {
    moments: BTreeMap<String, Vec<(f64, f64)>>,
    steps: i32,
}

impl TorchAdamW {
    /// Returns the joint norm of the gradients before clipping.
    fn step(&mut self, factors: &BTreeMap<String, Tensor>, grads: &GradStore, max_norm: f64) -> Result<f64> {
        let (rate, beta1, beta2, eps) = (1e-2, 0.9, 0.999, 1e-8);
        let mut wide = BTreeMap::new();
        for (name, factor) in factors {
            let grad = grads.get(factor).with_context(|| format!("{name} has no gradient"))?;
            let grad: Vec<f32> = grad.flatten_all()?.to_vec1()?;
            wide.insert(name, grad.into_iter().map(f64::from).collect::<Vec<_>>());
        }
        let norm = wide.values().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let clip = (max_norm / (norm + 1e-6)).min(1.0);
        self.steps += 1;
        let (bias1, bias2) = (1.0 - f64::powi(beta1, self.steps), 1.0 - f64::powi(beta2, self.steps));
        for (name, factor) in factors {
            let moments = self.moments.entry(name.clone()).or_default();
            moments.resize(factor.elem_count(), (0.0, 0.0));
            let mut values: Vec<f32> = factor.flatten_all()?.to_vec1()?;
            for ((value, (m, v)), grad) in values.iter_mut().zip(moments).zip(&wide[name]) {
                let grad = grad * clip;
                *m = beta1 * *m + (1.0 - beta1) * grad;
                *v = beta2 * *v + (1.0 - beta2) * grad * grad;
                *value -= (rate / bias1 * *m / ((*v / bias2).sqrt() + eps)) as f32;
            }
            Var::from_tensor(factor)?.set(&Tensor::from_vec(values, factor.shape(), factor.device())?)?;
        }
        Ok(norm)
    }
}

fn check_gradients(prefix: &str) -> Result<()> {
    let (llama, fixture) = (trained("llama")?, tensors("lora_training.safetensors")?);
    let batch = Batch::read(&fixture)?;
    let adapter = adapter(&llama, &fixture, prefix)?;
    let loss = batch.loss(&llama, &adapter)?;
    let want = tensor(&fixture, &format!("{prefix}.losses"))?.get(0)?;
    assert_close(&loss, &want, 2e-5)?;
    let grads = loss.backward()?;
    for (name, factor) in adapter.tensors() {
        let grad = grads.get(&factor).with_context(|| format!("{name} has no gradient"))?;
        let want = tensor(&fixture, &format!("{prefix}.grad.{name}"))?;
        assert_close(grad, want, 1e-4).with_context(|| name.clone())?;
        let largest = want.abs()?.max_all()?.to_scalar::<f32>()?;
        // Behind a B of zeros nothing reaches A.
        let reached = !(prefix == "b_zero" && name.contains("lora_A"));
        ensure!((largest > 1e-2) == reached, "{name}: gradients up to {largest}");
    }
    Ok(())
}

fn check_training(prefix: &str) -> Result<()> {
    let (llama, fixture) = (trained("llama")?, tensors("lora_training.safetensors")?);
    let batch = Batch::read(&fixture)?;
    let adapter = adapter(&llama, &fixture, prefix)?;
    let factors = adapter.tensors();
    let losses = tensor(&fixture, &format!("{prefix}.losses"))?.to_vec1::<f32>()?;
    let norms = tensor(&fixture, &format!("{prefix}.grad_norms"))?.to_vec1::<f32>()?;
    let mut adamw = TorchAdamW::default();
    for (step, (want_loss, want_norm)) in losses.into_iter().zip(norms).enumerate() {
        let loss = batch.loss(&llama, &adapter)?;
        let norm = adamw.step(&factors, &loss.backward()?, 1.0)? as f32;
        let loss = loss.to_scalar::<f32>()?;
        ensure!(
            (loss - want_loss).abs() <= 1e-4,
            "step {step}: loss {loss}, want {want_loss}"
        );
        ensure!(
            (norm / want_norm - 1.0).abs() <= 1e-3,
            "step {step}: norm {norm}, want {want_norm}"
        );
    }
    for (name, factor) in &factors {
        let want = tensor(&fixture, &format!("{prefix}.final.{name}"))?;
        assert_close(factor, want, 1e-4).with_context(|| name.clone())?;
    }
    Ok(())
}

#[test]
fn loss_and_every_gradient_equal_peft() -> Result<()> {
    check_gradients("b_random")
}

#[test]
fn with_b_zero_only_b_gets_gradients_and_they_equal_peft() -> Result<()> {
    check_gradients("b_zero")
}

#[test]
fn twenty_steps_from_random_factors_end_where_peft_ends() -> Result<()> {
    check_training("b_random")
}

#[test]
fn twenty_steps_from_a_new_adapter_end_where_peft_ends() -> Result<()> {
    check_training("b_zero")
}
