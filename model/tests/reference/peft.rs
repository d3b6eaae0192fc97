//! The other direction: an adapter written here gives the same logits in PEFT.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use lengthwise_model::{Adapter, Llama, LoraConfig};

use crate::support::{Reference, fixture, model, tensors};

/// Needs torch, transformers and PEFT in the Python that LENGTHWISE_PYTHON names, python3 by default.
#[test]
#[ignore = "needs Python with torch, transformers and PEFT"]
fn an_adapter_written_here_gives_the_same_logits_in_peft() -> Result<()> {
    let llama = model("llama")?;
    // The last adapter begins with the third token of the longest row; rows without such tokens go without it.
    let rows = Reference::read("llama")?.rows;
    let longest = rows.iter().max_by_key(|row| row.len()).context("no rows")?;
    let invocation = longest[2..4].to_vec();
    for (targets, use_rslora, invocation_tokens) in [
        ("q_proj,v_proj", false, vec![]),
        ("all-linear", true, vec![]),
        ("all-linear", false, invocation),
    ] {
        let config = LoraConfig {
            r: 3,
            lora_alpha: 7.0,
            use_rslora,
            target_modules: targets.parse().map_err(anyhow::Error::msg)?,
            invocation_tokens,
            ..LoraConfig::default()
        };
        let adapter = Adapter::init(llama.config(), config, 1, &Device::Cpu)?;
        for (name, factor) in adapter.tensors() {
            // B is zero at the start: an adapter that changes nothing would compare equal.
            if name.contains("lora_B") {
                let values: Vec<f32> = (0..factor.elem_count())
                    .map(|i| ((i * 7 % 11) as f32 - 5.0) * 0.05)
                    .collect();
                factor.slice_set(&Tensor::from_vec(values, factor.shape(), &Device::Cpu)?, 0, 0)?;
            }
        }
        let folder = tempfile::tempdir()?;
        adapter.save(folder.path(), "llama")?;
        let dump = folder.path().join("dump.safetensors");
        write_dump(&llama, &adapter, &dump)?;
        let python = std::env::var("LENGTHWISE_PYTHON").unwrap_or_else(|_| "python3".to_owned());
        let status = Command::new(&python)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/check_peft.py"))
            .args([fixture("llama").as_path(), folder.path(), &dump])
            .status()
            .with_context(|| python.clone())?;
        ensure!(status.success(), "{targets}: PEFT gives other logits");
    }
    Ok(())
}

/// The logits of the fixture's rows, as check_peft.py reads them.
fn write_dump(llama: &Llama, adapter: &Adapter, path: &Path) -> Result<()> {
    let fixture = tensors("llama/reference.safetensors")?;
    let reference = Reference::read("llama")?;
    let rows: Vec<&[u32]> = reference.rows.iter().map(Vec::as_slice).collect();
    let wanted: Vec<u32> = (0..reference.logits.dim(0)? as u32).collect();
    let logits = llama.forward_train(&rows, &wanted, Some(adapter), None)?.detach();
    let dump = HashMap::from([
        ("tokens", fixture["tokens"].clone()),
        ("lengths", fixture["lengths"].clone()),
        ("logits", logits),
    ]);
    Ok(candle_core::safetensors::save(&dump, path)?)
}
