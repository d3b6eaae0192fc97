//! Adapters that PEFT saved: logits, and merged as unmerged.

use anyhow::{Context, Result};
use candle_core::Device;
use lengthwise_model::{Adapter, Llama};
use serde_json::{Value, json};

use crate::support::{Reference, assert_cached, assert_uncached, fixture, model};

fn check_logits(llama: &Llama, adapter: Option<&Adapter>, reference: &Reference) -> Result<()> {
    assert_uncached(llama, adapter, reference)?;
    for chunk in [100, 5, 1] {
        assert_cached(llama, adapter, reference, &[0, 1, 2, 3], &[chunk; 4])?;
    }
    Ok(())
}

fn check(name: &str, scale: f64) -> Result<()> {
    let (llama, reference) = (model("llama")?, Reference::read(name)?);
    let adapter = Adapter::load(&fixture(name), llama.config(), &Device::Cpu)?;
    assert_eq!(adapter.config().scale(), scale);
    check_logits(&llama, Some(&adapter), &reference).context("unmerged")?;
    match adapter.config().invocation_tokens.is_empty() {
        true => check_logits(&llama.merged(&adapter)?, None, &reference).context("merged")?,
        false => assert!(llama.merged(&adapter).is_err(), "it changes a part alone"),
    }
    let error = assert_uncached(&llama, None, &reference).expect_err("the base model without the adapter");
    assert!(format!("{error:#}").contains("element"), "{error:#}");
    Ok(())
}

#[test]
fn an_adapter_of_q_and_v_equals_peft_unmerged_and_merged() -> Result<()> {
    check("llama_adapter", 8.0 / 4.0)
}

/// PEFT names the layers of an adapter made with `all-linear` by their full paths.
#[test]
fn a_rank_stabilised_adapter_of_all_linear_layers_equals_peft_unmerged_and_merged() -> Result<()> {
    check("llama_adapter_all_linear", 8.0 / 2.0)
}

/// PEFT's `alora_invocation_tokens`; the other rows have none of them, and are the base model's.
#[test]
fn an_adapter_that_begins_within_a_row_equals_peft() -> Result<()> {
    check("llama_adapter_activated", 8.0 / 4.0)
}

#[test]
fn an_adapter_of_peft_saved_here_reads_back_the_same() -> Result<()> {
    let llama = model("llama")?;
    for name in ["llama_adapter", "llama_adapter_all_linear", "llama_adapter_activated"] {
        let adapter = Adapter::load(&fixture(name), llama.config(), &Device::Cpu)?;
        let folder = tempfile::tempdir()?;
        adapter.save(folder.path(), "llama")?;
        let back = Adapter::load(folder.path(), llama.config(), &Device::Cpu)?;
        assert_eq!(back.config(), adapter.config());
        assert_uncached(&llama, Some(&back), &Reference::read(name)?)?;
    }
    Ok(())
}

/// What loading `llama_adapter_all_linear` says with its adapter_config.json changed.
fn refusal(change: impl Fn(&mut Value)) -> Result<String> {
    let (llama, from, to) = (
        model("llama")?,
        fixture("llama_adapter_all_linear"),
        tempfile::tempdir()?,
    );
    let weights = "adapter_model.safetensors";
    std::fs::copy(from.join(weights), to.path().join(weights))?;
    let mut config = serde_json::from_str(&std::fs::read_to_string(from.join("adapter_config.json"))?)?;
    change(&mut config);
    std::fs::write(to.path().join("adapter_config.json"), config.to_string())?;
    let error = Adapter::load(to.path(), llama.config(), &Device::Cpu).err();
    Ok(error.map(|error| error.to_string()).unwrap_or_default())
}

#[test]
fn what_would_be_computed_wrongly_is_refused_by_name() -> Result<()> {
    assert_eq!(refusal(|_| {})?, "");
    for (key, value) in [
        ("alpha_pattern", json!({"q_proj": 32})),
        ("use_qalora", json!(true)),
        ("use_dora", json!(true)),
    ] {
        let said = refusal(|config| config[key] = value.clone())?;
        assert!(said.contains(key) && said.contains("not supported"), "{key}: {said}");
    }
    let said = refusal(|config| config["target_modules"] = json!(["model.layers.0.self_attn.q_proj"]))?;
    assert!(said.contains("has no place in this model"), "{said}");
    Ok(())
}
