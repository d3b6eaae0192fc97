//! What tells a predictor from others: answers that are kept hold its predictions, and do not go on with another's.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::Context;
use lengthwise_core::fixed_hash;
use lengthwise_model::LoadedModel;
use lengthwise_predictor::RemotePredictor;
use lengthwise_scheduler::Strategy;

use crate::predictions::{PredictionArgs, Source};

/// Who predicts the lengths that `strategy` goes by, in words. Neither an address nor the name of a file or folder is part
/// of it: a server may come up on another port, and an adapter be trained anew.
///
/// # Errors
/// A file cannot be read, or no predictor answers.
pub fn predicted_by(strategy: Strategy, args: &PredictionArgs) -> anyhow::Result<String> {
    Ok(match args.source(strategy) {
        Source::Nobody => "nobody".to_owned(),
        Source::Model => "the model itself".to_owned(),
        Source::File(path) => format!("a --predictions file ({})", of_files(&[path])?),
        Source::Server(url) => of_server(url)?,
        Source::Adapter(folder) => format!("an --adapter ({})", of_adapter(folder)?),
        Source::Unnamed => "the cap".to_owned(),
    })
}

/// Of a running predictor, in words.
fn of_server(url: &str) -> anyhow::Result<String> {
    let remote = RemotePredictor::connect(url)?;
    let info = remote.model_info();
    Ok(match info.fingerprint.as_str() {
        // An older server, or another implementation: what it says of itself has to do.
        "" => format!(
            "a --predictor ({} {} {} {})",
            info.method, info.model, info.adapter, info.max_new_tokens
        ),
        fingerprint => format!("a --predictor ({} {fingerprint})", info.method),
    })
}

/// Of a server's predictor that runs `model`, with the adapter or as it is.
pub fn of_local(model: &LoadedModel, adapter: Option<&Path>, cap: u32) -> anyhow::Result<String> {
    let network = &model.network;
    let (dtype, quantization) = (network.dtype().as_str(), format!("{:?}", network.quantization()));
    let adapter = adapter.map(of_adapter).transpose()?;
    Ok(hex(fixed_hash(&(&model.name, dtype, quantization, adapter, cap))))
}

/// Of a server's predictor that always says the same.
pub fn of_constant(tokens: u32, cap: u32) -> String {
    hex(fixed_hash(&(tokens, cap)))
}

/// Of what an adapter's folder holds that a prediction depends on.
fn of_adapter(folder: &Path) -> anyhow::Result<String> {
    of_files(&[
        &folder.join("adapter_config.json"),
        &folder.join("adapter_model.safetensors"),
        &folder.join("length_head.json"),
        &folder.join("length_head.safetensors"),
    ])
}

/// Of the content of files, those that are not there included.
fn of_files(paths: &[&Path]) -> anyhow::Result<String> {
    let content = |path: &&Path| match std::fs::read(path) {
        Ok(bytes) => Ok(Some(fixed_hash(&bytes))),
        Err(err) if err.kind() == ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err).with_context(|| path.display().to_string()),
    };
    let contents = paths.iter().map(content).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(hex(fixed_hash(&contents)))
}

fn hex(hash: u64) -> String {
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> PredictionArgs {
        PredictionArgs {
            predictor: None,
            adapter: None,
            predictions: None,
            admit_quantile: 0.9,
        }
    }

    #[test]
    fn an_adapter_is_known_by_what_it_says_wherever_it_lies() -> anyhow::Result<()> {
        let folders = [tempfile::tempdir()?, tempfile::tempdir()?];
        let by = |folder: &tempfile::TempDir| {
            let adapter = Some(folder.path().to_owned());
            predicted_by(Strategy::Continuous, &PredictionArgs { adapter, ..source() })
        };
        for folder in &folders {
            std::fs::write(folder.path().join("adapter_model.safetensors"), "a")?;
        }
        assert_eq!(by(&folders[0])?, by(&folders[1])?);
        // The curve of its training predicts nothing, a head does.
        std::fs::write(folders[1].path().join("loss.jsonl"), "{}")?;
        assert_eq!(by(&folders[0])?, by(&folders[1])?);
        std::fs::write(folders[1].path().join("length_head.json"), "{}")?;
        assert_ne!(by(&folders[0])?, by(&folders[1])?);
        Ok(())
    }

    #[test]
    fn strategies_that_ask_no_predictor_are_not_told_apart_by_it() -> anyhow::Result<()> {
        let unreachable = || PredictionArgs {
            predictor: Some("http://127.0.0.1:1".to_owned()),
            ..source()
        };
        for strategy in [Strategy::Vanilla, Strategy::Po] {
            assert_eq!(
                predicted_by(strategy, &unreachable())?,
                predicted_by(strategy, &source())?
            );
        }
        assert_eq!(predicted_by(Strategy::Continuous, &source())?, "the cap");
        predicted_by(Strategy::Continuous, &unreachable()).expect_err("nobody answers");
        Ok(())
    }
}
