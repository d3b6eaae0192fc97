//! The head's loss, gradients and files.

use std::fs;

use candle_core::{Device, Tensor};

use super::{LengthBins, LengthHead, LengthHeadConfig};
use crate::{Adapter, LoraConfig};

fn config(max_tokens: u32) -> LengthHeadConfig {
    LengthHeadConfig {
        bins: LengthBins::new(max_tokens),
        asks_length: true,
        smoothing: 0.05,
        samples: 4,
        temperature: 1.25,
        point_probability: 0.8,
    }
}

/// A head of three bins on two hidden values.
fn small() -> anyhow::Result<LengthHead> {
    let mut head = LengthHead::init(config(3), 2, &[0.5, 0.25, 0.25], &Device::Cpu)?;
    head.weight = Tensor::new(&[[1f32, 0.], [0., 1.], [0., 0.]], &Device::Cpu)?;
    head.bias = Tensor::new(&[0f32, 0., 1.], &Device::Cpu)?;
    Ok(head)
}

#[test]
fn the_loss_is_the_cross_entropy_of_the_soft_labels() -> anyhow::Result<()> {
    let hidden = Tensor::new(&[[2f32, 1.], [0., 0.]], &Device::Cpu)?;
    let labels = Tensor::new(&[[0.5f32, 0.5, 0.], [0., 0., 1.]], &Device::Cpu)?;
    // Logits (2, 1, 1) and (0, 0, 1): -(0.5 · 2 + 0.5 · 1) + ln(e² + 2e), and -1 + ln(2 + e), over 2.
    let e = std::f64::consts::E;
    let want = (-1.5 + (e * e + 2.0 * e).ln() - 1.0 + (2.0 + e).ln()) / 2.0;
    let got = f64::from(small()?.loss(&hidden, &labels, 2.0)?.to_scalar::<f32>()?);
    assert!((got - want).abs() < 1e-6, "{got}, want {want}");
    Ok(())
}

#[test]
fn a_new_head_says_the_marginal() -> anyhow::Result<()> {
    let head = LengthHead::init(config(3), 2, &[0.5, 0.25, 0.25], &Device::Cpu)?;
    let logits = head
        .logits(&Tensor::new(&[[7f32, -3.]], &Device::Cpu)?)?
        .to_vec2::<f32>()?;
    // At the temperature 1; the floor for empty bins moves it by less than a hundredth.
    let f = super::LengthDistribution::from_logits(&head.config.bins, &logits[0], 1.0).expect("finite");
    for (got, want) in f.probabilities().into_iter().zip([0.5, 0.25, 0.25]) {
        assert!((got - want).abs() < 0.01, "{got}, want {want}");
    }
    Ok(())
}

#[test]
fn the_gradient_reaches_the_adapter_and_the_head() -> anyhow::Result<()> {
    let llama = crate::testing::network(&crate::testing::config())?;
    let adapter = Adapter::init(llama.config(), LoraConfig::default(), 5, &Device::Cpu)?;
    let head = LengthHead::init(config(20), llama.config().hidden_size, &[0.05; 20], &Device::Cpu)?;
    // What is zero at the start gets values, or no gradient would pass it.
    for (name, tensor) in adapter.tensors().into_iter().chain(head.tensors()) {
        if name.contains("lora_B") || name == super::WEIGHT {
            let values = crate::ops::testing::random(tensor.dims(), name.len() as u64)?;
            tensor.slice_set(&(values * 0.2)?, 0, 0)?;
        }
    }
    let hidden = llama.last_hidden(&[&[3, 9, 4], &[6, 2, 8, 30]], Some(&adapter), None)?;
    let labels: Vec<f32> = [3, 17]
        .iter()
        .flat_map(|&l| head.config.bins.soft_label(&[l], 0.1))
        .collect();
    let labels = Tensor::from_vec(labels, (2, head.config.bins.len()), &Device::Cpu)?;
    let grads = head.loss(&hidden, &labels, 2.0)?.backward()?;
    for (name, tensor) in adapter.tensors().into_iter().chain(head.tensors()) {
        let grad = grads.get(&tensor).unwrap_or_else(|| panic!("{name} has no gradient"));
        assert!(grad.abs()?.sum_all()?.to_scalar::<f32>()? > 0.0, "{name}'s is zero");
    }
    Ok(())
}

#[test]
fn the_last_hidden_state_gives_the_last_logits() -> anyhow::Result<()> {
    // A sequence alone and packed behind another has the same hidden state.
    let llama = crate::testing::network(&crate::testing::config())?;
    let packed = llama.last_hidden(&[&[3, 9, 4], &[6, 2]], None, None)?;
    let alone = llama.last_hidden(&[&[6, 2]], None, None)?;
    crate::ops::testing::assert_close(&packed.narrow(0, 1, 1)?, &alone, 1e-5)?;
    Ok(())
}

#[test]
fn a_head_is_read_as_it_was_written() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    assert!(!LengthHead::is_in(dir.path()));
    let head = small()?;
    head.save(dir.path())?;
    assert!(LengthHead::is_in(dir.path()));
    let read = LengthHead::load(dir.path(), 2, &Device::Cpu)?;
    assert_eq!(read.config, head.config);
    for (name, tensor) in head.tensors() {
        crate::ops::testing::assert_close(&read.tensors()[&name], &tensor, 0.0)?;
    }
    LengthHead::remove(dir.path())?;
    assert!(!LengthHead::is_in(dir.path()));
    Ok(())
}

#[test]
fn a_damaged_head_is_named_in_one_line() -> anyhow::Result<()> {
    let edit = |from: &'static str, to: &'static str| move |text: String| text.replace(from, to);
    type Edit = Box<dyn Fn(String) -> String>;
    let cases: [(Edit, &str); 6] = [
        (Box::new(edit("\"linear\"", "\"forest\"")), "kind \"forest\""),
        (Box::new(edit("\"version\": 1", "\"version\": 9")), "version 9"),
        (
            Box::new(edit("\"hidden_size\": 2", "\"hidden_size\": 3")),
            "another model",
        ),
        (Box::new(edit("1.25", "-1.0")), "temperature"),
        (Box::new(|text| text.replace("    2,\n", "    9,\n")), "ascending"),
        (Box::new(|text| text[..text.len() / 2].to_owned()), "malformed"),
    ];
    for (edit, want) in cases {
        let dir = tempfile::tempdir()?;
        small()?.save(dir.path())?;
        let path = dir.path().join("length_head.json");
        fs::write(&path, edit(fs::read_to_string(&path)?))?;
        expect_error(dir.path(), want);
    }
    let dir = tempfile::tempdir()?;
    small()?.save(dir.path())?;
    let path = dir.path().join("length_head.safetensors");
    let bytes = fs::read(&path)?;
    fs::write(&path, &bytes[..bytes.len() - 5])?;
    expect_error(dir.path(), "cannot be read");
    fs::remove_file(&path)?;
    expect_error(dir.path(), "length_head.safetensors");
    let mut head = small()?;
    head.bias = Tensor::new(&[0f32, f32::NAN, 0.], &Device::Cpu)?;
    head.save(dir.path())?;
    expect_error(dir.path(), "not finite");
    head.bias = Tensor::new(&[0f32, 1.], &Device::Cpu)?;
    head.save(dir.path())?;
    expect_error(dir.path(), "length_head.bias is [2]");
    Ok(())
}

fn expect_error(folder: &std::path::Path, want: &str) {
    let err = LengthHead::load(folder, 2, &Device::Cpu).expect_err(want).to_string();
    assert!(err.contains(want) && err.lines().count() == 1, "{err}, want {want}");
}
