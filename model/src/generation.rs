//! `generation_config.json`: how a model's makers want it sampled.

use std::path::Path;

use lengthwise_core::SamplingParams;
use serde_json::Value;

use crate::ModelError;

const FILE: &str = "generation_config.json";

/// The file's content, null where there is none.
///
/// # Errors
/// It is malformed.
pub(crate) fn read(folder: &Path) -> Result<Value, ModelError> {
    let path = folder.join(FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).map_err(|err| bad(folder, err.to_string())),
        Err(_) => Ok(Value::Null),
    }
}

/// How tokens are drawn where the user says nothing: as transformers does, so without `do_sample` the most likely one
/// is taken whatever else the file says. With it, what the file leaves out is temperature 1 and nothing cut off.
///
/// # Errors
/// The file is malformed, or a value cannot be.
pub(crate) fn sampling(folder: &Path) -> Result<SamplingParams, ModelError> {
    let file = read(folder)?;
    if file["do_sample"] != Value::Bool(true) {
        return Ok(SamplingParams::GREEDY);
    }
    let number = |name: &str, default: f64, allowed: fn(f64) -> bool| {
        let value = if file[name].is_null() {
            Some(default)
        } else {
            file[name].as_f64()
        };
        let value = value.filter(|v| allowed(*v));
        value.ok_or_else(|| bad(folder, format!("{name} is {}, which cannot be", file[name])))
    };
    Ok(SamplingParams {
        temperature: number("temperature", 1.0, |t| t >= 0.0)? as f32,
        top_p: number("top_p", 1.0, |p| SamplingParams::allows_top_p(p as f32))? as f32,
        top_k: number("top_k", 0.0, |k| k >= 0.0 && k <= f64::from(u32::MAX))? as u32,
        seed: 0,
    })
}

fn bad(folder: &Path, reason: String) -> ModelError {
    ModelError::BadFile {
        path: folder.join(FILE),
        reason,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<SamplingParams, String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join(FILE), text).expect("writable");
        sampling(folder.path()).map_err(|err| err.to_string())
    }

    #[test]
    fn a_model_that_does_not_sample_takes_the_most_likely_token() -> anyhow::Result<()> {
        assert_eq!(sampling(tempfile::tempdir()?.path())?, SamplingParams::GREEDY);
        // As Vicuna v1.5 has it: a temperature without do_sample is not in force.
        for text in [
            r#"{"temperature": 0.9, "top_p": 0.6}"#,
            r#"{"do_sample": false, "temperature": 0.9}"#,
        ] {
            assert_eq!(of(text), Ok(SamplingParams::GREEDY));
        }
        Ok(())
    }

    #[test]
    fn what_a_sampling_model_leaves_out_cuts_nothing_off() {
        let with = |temperature, top_p, top_k| {
            Ok(SamplingParams {
                temperature,
                top_k,
                top_p,
                seed: 0,
            })
        };
        assert_eq!(of(r#"{"do_sample": true}"#), with(1.0, 1.0, 0));
        assert_eq!(
            of(r#"{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": null}"#),
            with(0.6, 0.9, 0)
        );
        assert_eq!(of(r#"{"do_sample": true, "top_k": 20}"#), with(1.0, 1.0, 20));
    }

    #[test]
    fn a_value_that_cannot_be_is_named_with_its_file() {
        for (text, value) in [
            (r#"{"do_sample": true, "temperature": -1}"#, "temperature is -1"),
            (r#"{"do_sample": true, "top_p": 0}"#, "top_p is 0"),
            (r#"{"do_sample": true, "top_k": "many"}"#, "top_k is \"many\""),
            ("{", "EOF"),
        ] {
            let err = of(text).expect_err(text);
            assert!(err.contains(value) && err.contains("generation_config.json: "), "{err}");
        }
    }
}
