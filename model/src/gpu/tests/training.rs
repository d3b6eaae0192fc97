//! Whole training passes on the emulator, and on a GPU where the build has one, against the CPU path.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};

use crate::lora::Dropout;
use crate::network::TrainPass;
use crate::testing::{adapter, adapter_from, weights};
use crate::{Adapter, Llama, ModelConfig, cross_entropy};

/// More than a tile of queries, one token, and a few.
const LENGTHS: [usize; 3] = [37, 1, 7];

/// Packed rows that carry loss, not in their order.
const READ: [u32; 6] = [36, 3, 44, 35, 37, 4];

fn base() -> ModelConfig {
    ModelConfig {
        head_dim: 16,
        hidden_size: 64,
        ..crate::testing::config()
    }
}

/// The models whose differences the kernels know.
fn configs() -> Vec<(&'static str, ModelConfig)> {
    let llama = base();
    let qwen2 = ModelConfig {
        attention_bias: true,
        ..base()
    };
    let qwen3 = ModelConfig {
        qk_norm: true,
        ..base()
    };
    let mistral = ModelConfig {
        sliding_window: Some(9),
        num_key_value_heads: 1,
        ..base()
    };
    vec![
        ("llama", llama),
        ("qwen2", qwen2),
        ("qwen3", qwen3),
        ("mistral", mistral),
    ]
}

/// Where the GPU path runs. A build with CUDA needs a GPU, unless LENGTHWISE_NO_GPU is set.
fn devices() -> Result<Vec<Device>> {
    let emulated = cfg!(feature = "kernel-emulation").then_some(Device::Cpu);
    #[cfg_attr(not(feature = "cuda"), allow(unused_mut))]
    let mut devices: Vec<Device> = emulated.into_iter().collect();
    #[cfg(feature = "cuda")]
    match Device::new_cuda_with_stream(0) {
        Ok(device) => devices.push(device),
        Err(err) if std::env::var_os("LENGTHWISE_NO_GPU").is_some() => eprintln!("not run on a GPU: {err}"),
        Err(err) => return Err(err.into()),
    }
    Ok(devices)
}

/// A network on the CPU path.
fn host(config: &ModelConfig) -> Result<Llama> {
    crate::testing::network(config)
}

/// The same network on the GPU path.
fn on_gpu(config: &ModelConfig, dtype: DType, device: &Device) -> Result<Llama> {
    let llama = Llama::new(config, &weights(config, dtype, device)?)?;
    #[cfg(feature = "kernel-emulation")]
    if device.is_cpu() {
        return Ok(llama.trained_on_emulator()?);
    }
    Ok(llama)
}

/// Loss and gradients of one pass.
struct Step {
    loss: f32,
    grads: BTreeMap<String, Tensor>,
}

#[derive(Clone, Copy, Default)]
struct Settings {
    dropout: f64,
    checkpointing: bool,
    /// The adapter begins within the sequences.
    activated: bool,
    /// All rows and not only [`READ`].
    every_row: bool,
}

impl Settings {
    /// The last sequence has these from its third token on; the others do not.
    fn invocation(self) -> &'static [u32] {
        if self.activated { &[38, 45] } else { &[] }
    }
}

fn step(llama: &Llama, adapter: &Adapter, settings: Settings) -> Result<Step> {
    let tokens: Vec<u32> = (0..45).map(|i| (i * 7 + i / 5) % 50).collect();
    let mut sequences = Vec::new();
    let mut rest = tokens.as_slice();
    for length in LENGTHS {
        let (sequence, later) = rest.split_at(length);
        sequences.push(sequence);
        rest = later;
    }
    let every: Vec<u32> = (0..45).collect();
    let read = if settings.every_row { &every[..] } else { &READ };
    let targets: Vec<u32> = read.iter().map(|row| (row * 11 + 5) % 50).collect();
    let dropout = Dropout::new(settings.dropout, 3);
    let pass = TrainPass::new(llama, Some(adapter), Some(&dropout), settings.checkpointing);
    let loss = cross_entropy(&pass.logits(&sequences, read)?, &targets, read.len() as f64)?;
    let (mut grads, factors) = (BTreeMap::new(), adapter.tensors());
    pass.backward(&loss, &mut |store: &GradStore| {
        for (name, factor) in &factors {
            if let Some(grad) = store.get(factor) {
                grads.insert(name.clone(), grad.detach().to_device(&Device::Cpu)?);
            }
        }
        Ok(())
    })?;
    for name in factors.keys() {
        ensure!(grads.contains_key(name), "{name} has no gradient");
    }
    Ok(Step {
        loss: loss.to_scalar()?,
        grads,
    })
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

/// Every gradient is within `tolerance` of the largest of its tensor, and that is not 0.
fn assert_near(got: &Step, want: &Step, tolerance: f32) -> Result<()> {
    ensure!(
        (got.loss - want.loss).abs() <= tolerance * want.loss,
        "loss {}, want {}",
        got.loss,
        want.loss
    );
    for (name, want) in &want.grads {
        let (got, want) = (floats(&got.grads[name])?, floats(want)?);
        let largest = want.iter().fold(0f32, |largest, w| largest.max(w.abs()));
        ensure!(largest > 1e-4, "{name}: gradients up to {largest}");
        for (g, w) in got.iter().zip(&want) {
            // `<=`, so that NaN fails.
            ensure!(
                (g - w).abs() <= tolerance * largest,
                "{name}: {g}, want {w}, of up to {largest}"
            );
        }
    }
    Ok(())
}

fn assert_same_bits(got: &Step, want: &Step) -> Result<()> {
    ensure!(got.loss.to_bits() == want.loss.to_bits(), "loss");
    for (name, want) in &want.grads {
        let bits = |tensor| Ok::<_, anyhow::Error>(floats(tensor)?.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        ensure!(bits(&got.grads[name])? == bits(want)?, "{name}");
    }
    Ok(())
}

/// The gradients of the CPU path and of the GPU path, each with an adapter of its own on `modules`.
fn assert_as_host(llama: &Llama, gpu: &Llama, modules: &str, settings: Settings, tolerance: f32) -> Result<()> {
    let want = step(llama, &adapter_from(llama, modules, settings.invocation())?, settings)?;
    let got = step(gpu, &adapter_from(gpu, modules, settings.invocation())?, settings)?;
    ensure!(gpu.training_slot().is_made(), "the kernels did not run");
    assert_near(&got, &want, tolerance)
}

#[test]
fn loss_and_every_gradient_are_those_of_the_cpu_path() -> Result<()> {
    for device in devices()? {
        for (name, config) in configs() {
            let (host, gpu) = (host(&config)?, on_gpu(&config, DType::F32, &device)?);
            let settings = Settings {
                every_row: name == "qwen3",
                ..Settings::default()
            };
            assert_as_host(&host, &gpu, "all-linear", settings, 1e-4).context(name)?;
        }
    }
    Ok(())
}

#[test]
fn any_choice_of_modules_gets_the_gradients_of_the_cpu_path() -> Result<()> {
    for device in devices()? {
        let (host, gpu) = (host(&base())?, on_gpu(&base(), DType::F32, &device)?);
        for modules in ["q_proj,v_proj", "k_proj", "down_proj", "o_proj,gate_proj"] {
            assert_as_host(&host, &gpu, modules, Settings::default(), 1e-4).context(modules)?;
        }
    }
    Ok(())
}

#[test]
fn an_adapter_that_begins_within_a_sequence_gets_the_gradients_of_the_cpu_path() -> Result<()> {
    for device in devices()? {
        let (host, gpu) = (host(&base())?, on_gpu(&base(), DType::F32, &device)?);
        // With every row the backward pass goes through all, else through those that the adapter changes.
        for (modules, checkpointing, every_row) in [
            ("all-linear", false, false),
            ("all-linear", true, true),
            ("q_proj,v_proj", true, false),
            ("k_proj,down_proj", false, false),
        ] {
            let settings = Settings {
                activated: true,
                checkpointing,
                every_row,
                ..Settings::default()
            };
            assert_as_host(&host, &gpu, modules, settings, 1e-4).context(modules)?;
        }
    }
    Ok(())
}

/// How far gradients are from others, and those's size: norms over all factors.
fn distance(got: &Step, want: &Step) -> Result<(f64, f64)> {
    let (mut distance, mut size) = (0.0, 0.0);
    for (name, want) in &want.grads {
        for (g, w) in floats(&got.grads[name])?.into_iter().zip(floats(want)?) {
            distance += f64::from(g - w).powi(2);
            size += f64::from(w).powi(2);
        }
    }
    Ok((distance.sqrt(), size.sqrt()))
}

#[test]
fn narrow_activations_cost_no_more_than_in_candles_operations() -> Result<()> {
    // Of the gradients' size, through two layers: 8 bits of fraction, and 11.
    for (dtype, most) in [(DType::BF16, 8e-2), (DType::F16, 1e-2)] {
        for device in devices()? {
            for (name, config) in configs() {
                let settings = Settings::default();
                let rounded = Llama::new(&config, &crate::testing::rounded_weights(&config, dtype)?)?;
                let exact = step(&rounded, &adapter(&rounded)?, settings)?;
                let composed = Llama::new(&config, &weights(&config, dtype, &Device::Cpu)?)?;
                let composed = step(&composed, &adapter(&composed)?, settings)?;
                let gpu = on_gpu(&config, dtype, &device)?;
                let got = step(&gpu, &adapter(&gpu)?, settings)?;
                let ((ours, size), (theirs, _)) = (distance(&got, &exact)?, distance(&composed, &exact)?);
                let (ours, theirs) = (ours / size, theirs / size);
                ensure!(
                    ours <= most && ours <= 1.5 * theirs,
                    "{name} in {}: {ours:.2e}, candle's operations {theirs:.2e}",
                    dtype.as_str()
                );
            }
        }
    }
    Ok(())
}

#[test]
fn checkpointing_and_a_second_run_change_no_bit() -> Result<()> {
    for device in devices()? {
        let gpu = on_gpu(&base(), DType::BF16, &device)?;
        let adapter = adapter(&gpu)?;
        let plain = Settings {
            dropout: 0.3,
            ..Settings::default()
        };
        let checkpointing = Settings {
            checkpointing: true,
            ..plain
        };
        let first = step(&gpu, &adapter, plain)?;
        assert_same_bits(&step(&gpu, &adapter, plain)?, &first).context("a second run")?;
        assert_same_bits(&step(&gpu, &adapter, checkpointing)?, &first).context("checkpointing")?;
    }
    Ok(())
}

/// What differs between the two orders lacks a barrier.
#[cfg(feature = "kernel-emulation")]
#[test]
fn the_order_of_a_blocks_threads_changes_no_bit() -> Result<()> {
    use crate::gpu::emulated::EmulatedGpu;
    use crate::gpu::{Gpu, TrainingDevice};
    for dtype in [DType::F32, DType::BF16] {
        let gpu = on_gpu(&base(), dtype, &Device::Cpu)?;
        let adapter = adapter(&gpu)?;
        let forwards = step(&gpu, &adapter, Settings::default())?;
        let backwards = Gpu::Emulated(EmulatedGpu {
            backwards: true,
            ..EmulatedGpu::default()
        });
        gpu.training_slot().set(TrainingDevice::new(backwards, &gpu)?);
        assert_same_bits(&step(&gpu, &adapter, Settings::default())?, &forwards)?;
    }
    Ok(())
}

/// With dropout there is no other path that drops the same: the gradient must foretell how the loss changes.
#[test]
fn with_dropout_the_loss_changes_as_the_gradients_say() -> Result<()> {
    let every = devices()?
        .into_iter()
        .flat_map(|device| [(device.clone(), false), (device, true)]);
    for (device, activated) in every {
        let gpu = on_gpu(&base(), DType::F32, &device)?;
        let without = Settings {
            activated,
            ..Settings::default()
        };
        let settings = Settings {
            dropout: 0.3,
            ..without
        };
        let adapter = adapter_from(&gpu, "all-linear", settings.invocation())?;
        let at = step(&gpu, &adapter, settings)?;
        let without = step(&gpu, &adapter, without)?;
        assert!((at.loss - without.loss).abs() > 1e-4, "nothing is dropped");
        // Along the gradient, by a step small enough for the curvature and large enough for f32.
        let squares = at.grads.values().map(|g| g.sqr()?.sum_all()?.to_scalar::<f32>());
        let square: f32 = squares.sum::<candle_core::Result<f32>>()?;
        let size = 1e-2 / square.sqrt();
        let moved = |by: f32| -> Result<f32> {
            let other = adapter.trainable()?;
            for (name, factor) in other.tensors() {
                let value = (&factor + (at.grads[&name].to_device(&device)? * f64::from(by))?)?;
                Var::from_tensor(&factor)?.set(&value)?;
            }
            Ok(step(&gpu, &other, settings)?.loss)
        };
        let slope = (moved(size)? - moved(-size)?) / (2.0 * size);
        assert!((slope / square - 1.0).abs() < 2e-2, "slope {slope}, want {square}");
    }
    Ok(())
}

#[test]
fn the_memory_goes_when_nobody_trains_any_more() -> Result<()> {
    for device in devices()? {
        let gpu = on_gpu(&base(), DType::F32, &device)?;
        let adapter = adapter(&gpu)?;
        let memory = gpu.training_memory();
        step(&gpu, &adapter, Settings::default())?;
        assert!(gpu.training_slot().is_made());
        drop(memory);
        assert!(!gpu.training_slot().is_made());
        step(&gpu, &adapter, Settings::default())?;
    }
    Ok(())
}

#[test]
fn a_merged_network_trains_on_its_own_weights() -> Result<()> {
    for device in devices()? {
        let gpu = on_gpu(&base(), DType::F32, &device)?;
        let changed = adapter(&gpu)?;
        step(&gpu, &changed, Settings::default())?;
        let host = host(&base())?;
        let host = host.merged(&adapter(&host)?)?;
        assert_as_host(&host, &gpu.merged(&changed)?, "all-linear", Settings::default(), 1e-4)?;
    }
    Ok(())
}

#[test]
fn evaluation_without_gradients_gives_the_same_hidden_states() -> Result<()> {
    for device in devices()? {
        let (host, gpu) = (host(&base())?, on_gpu(&base(), DType::F32, &device)?);
        let sequences: [&[u32]; 2] = [&[3, 9, 4, 1, 7], &[6, 2]];
        let want = host.last_hidden(&sequences, Some(&adapter(&host)?.frozen()?), None)?;
        let got = gpu.last_hidden(&sequences, Some(&adapter(&gpu)?.frozen()?), None)?;
        crate::ops::testing::assert_close(&got.to_device(&Device::Cpu)?, &want, 1e-4)?;
    }
    Ok(())
}
