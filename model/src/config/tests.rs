//! Configs as they are found, and those that cannot be run.

use super::*;

#[test]
fn a_config_reads_back_as_it_was_written() {
    let config = crate::testing::config();
    assert_eq!(ModelConfig::from_json(&config.to_json()).expect("own output"), config);
}

#[test]
fn an_unsupported_architecture_is_named_with_those_that_are() {
    let err = ModelConfig::from_json(r#"{"model_type": "gpt2"}"#)
        .expect_err("unsupported")
        .to_string();
    assert!(err.contains("gpt2") && err.contains("llama, mistral"), "{err}");
}

/// A small config of `family` with more fields.
fn read(family: &str, fields: &str) -> Result<ModelConfig, ModelError> {
    ModelConfig::from_json(&format!(
        r#"{{"model_type": "{family}", "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2{fields}}}"#
    ))
}

#[test]
fn what_is_left_out_has_the_value_that_transformers_gives_it() -> anyhow::Result<()> {
    let config = read("llama", "")?;
    assert_eq!((config.num_key_value_heads, config.head_dim), (2, 4));
    assert_eq!((config.rope_theta, config.max_position_embeddings), (10_000.0, 2048));
    assert!(!config.attention_bias && !config.qk_norm && config.eos_token_ids.is_empty());
    assert!(read("qwen2", "")?.attention_bias);
    assert!(read("qwen3", "")?.qk_norm);
    Ok(())
}

#[test]
fn rope_is_read_in_its_old_and_new_place() -> anyhow::Result<()> {
    let old = read(
        "llama",
        r#", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}"#,
    )?;
    let new = r#", "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}"#;
    assert_eq!(read("llama", new)?, old);
    assert_eq!(
        (old.rope_theta, old.rope_scaling),
        (5e5, RopeScaling::Linear { factor: 4.0 })
    );
    let err = read("llama", r#", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}"#).expect_err("yarn");
    assert!(err.to_string().contains("yarn is not supported"), "{err}");
    let err = read("llama", r#", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}"#).expect_err("cut");
    assert!(err.to_string().contains("needs low_freq_factor"), "{err}");
    Ok(())
}

#[test]
fn qwen_windows_are_off_unless_switched_on_for_all_layers() -> anyhow::Result<()> {
    let window = r#", "sliding_window": 4"#;
    assert_eq!(read("mistral", window)?.sliding_window, Some(4));
    assert_eq!(read("qwen2", window)?.sliding_window, None);
    let on = r#", "sliding_window": 4, "use_sliding_window": true, "max_window_layers": "#;
    assert_eq!(read("qwen2", &format!("{on}0"))?.sliding_window, Some(4));
    assert_eq!(read("qwen2", &format!("{on}2"))?.sliding_window, None);
    assert!(read("qwen2", &format!("{on}1")).is_err());
    Ok(())
}

#[test]
fn what_the_network_cannot_run_is_refused() {
    for (fields, part) in [
        (r#", "hidden_act": "gelu""#, "gelu"),
        (r#", "mlp_bias": true"#, "mlp_bias"),
        (r#", "head_dim": 3"#, "must be even"),
        (r#", "num_key_value_heads": 0"#, "num_key_value_heads is 0"),
    ] {
        let err = read("llama", fields).expect_err(fields).to_string();
        assert!(err.contains(part), "{err}");
    }
    let err = ModelConfig::from_json(r#"{"model_type": "llama"}"#)
        .expect_err("no sizes")
        .to_string();
    assert!(err.contains("vocab_size"), "{err}");
}

#[test]
fn either_file_may_name_end_tokens_and_both_count() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut config = crate::testing::config();
    config.eos_token_ids = vec![7];
    std::fs::write(dir.path().join("config.json"), config.to_json())?;
    let generation = dir.path().join("generation_config.json");
    std::fs::write(&generation, r#"{"eos_token_id": [9, 7]}"#)?;
    assert_eq!(ModelConfig::from_folder(dir.path())?.eos_token_ids, [7, 9]);
    std::fs::write(&generation, r#"{"eos_token_id": null}"#)?;
    assert_eq!(ModelConfig::from_folder(dir.path())?.eos_token_ids, [7]);
    Ok(())
}

#[test]
fn an_error_names_the_file() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let err = ModelConfig::from_folder(dir.path()).expect_err("empty").to_string();
    assert!(err.contains("config.json: not a model folder"), "{err}");
    std::fs::write(dir.path().join("config.json"), "{")?;
    let err = ModelConfig::from_folder(dir.path()).expect_err("cut").to_string();
    assert!(
        err.contains("config.json: malformed") && err.contains(&*dir.path().to_string_lossy()),
        "{err}"
    );
    Ok(())
}

#[test]
fn heads_must_share_evenly() {
    let json = crate::testing::config()
        .to_json()
        .replace("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3");
    let err = ModelConfig::from_json(&json).expect_err("4 heads over 3").to_string();
    assert!(err.contains("cannot share 3"), "{err}");
}
