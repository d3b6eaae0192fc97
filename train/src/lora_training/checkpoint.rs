//! Checkpoints: a folder per step, complete once it has its final name.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use lengthwise_model::{Llama, save_tensors};
use serde::{Deserialize, Serialize};

use super::tuned::Tuned;
use super::{CurvePoint, LoraTrainingError};
use crate::files::write_atomic;
use crate::optim::AdamW;

const PREFIX: &str = "checkpoint-";
/// Behind the step, where its evaluation is still to do. The checkpoint with it done does not replace this one, but comes
/// beside it before this one goes.
const UNEVALUATED: &str = "-unevaluated";
/// Beside a finished adapter: the last [`RunState`] of its run.
const RECORD: &str = "training.json";

/// Where a run is, beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct RunState {
    /// Optimiser steps done.
    pub step: usize,
    /// The best evaluation loss so far and its step.
    pub best: Option<(f64, usize)>,
    /// The last step, where the evaluation that is due after it was broken off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unevaluated: Option<CurvePoint>,
    /// Settings and data of the run, to be told from others: one JSON object as text, which no reading of its numbers
    /// changes.
    pub fingerprint: String,
}

/// A checkpoint that was read back.
pub(super) struct Checkpoint {
    pub state: RunState,
    pub tuned: Tuned,
    optimiser: HashMap<String, candle_core::Tensor>,
}

impl Checkpoint {
    pub fn restore(&self, adamw: &mut AdamW) -> Result<(), LoraTrainingError> {
        Ok(adamw.restore(&self.optimiser, self.state.step)?)
    }
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> LoraTrainingError {
    move |source| LoraTrainingError::Io {
        path: path.to_owned(),
        source,
    }
}

/// The newest complete checkpoint of an output folder.
pub(super) fn newest(output: &Path) -> Option<PathBuf> {
    all(output).max_by_key(|path| place(path))
}

/// Every complete checkpoint of an output folder.
fn all(output: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(output).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| place(path).is_some())
}

/// The step of a checkpoint and whether it was evaluated; `None` of anything else.
fn place(path: &Path) -> Option<(usize, bool)> {
    let name = path.file_name()?.to_str()?.strip_prefix(PREFIX)?;
    let unevaluated = name.strip_suffix(UNEVALUATED);
    Some((unevaluated.unwrap_or(name).parse().ok()?, unevaluated.is_none()))
}

/// Removes every checkpoint but one.
fn remove_others(output: &Path, kept: Option<&Path>) -> Result<(), LoraTrainingError> {
    let mut others = all(output).filter(|path| Some(path.as_path()) != kept);
    others.try_for_each(|path| fs::remove_dir_all(&path).map_err(io(&path)))
}

/// Writes a checkpoint beside and renames it, then drops older ones.
pub(super) fn save(
    output: &Path,
    base_model: &str,
    tuned: &Tuned,
    adamw: &AdamW,
    state: &RunState,
) -> Result<(), LoraTrainingError> {
    let ending = if state.unevaluated.is_some() { UNEVALUATED } else { "" };
    let name = output.join(format!("{PREFIX}{}{ending}", state.step));
    if state.unevaluated.is_some() && name.is_dir() {
        // It is what this run went on from, and nothing was done since.
        return Ok(());
    }
    let beside = output.join("writing-checkpoint");
    let _ = fs::remove_dir_all(&beside);
    tuned.save(&beside, base_model)?;
    let (tensors, _) = adamw.state()?;
    save_tensors(&tensors, &beside.join("optimizer.safetensors"))?;
    fs::write(beside.join("state.json"), json(state)).map_err(io(&beside))?;
    let _ = fs::remove_dir_all(&name);
    fs::rename(&beside, &name).map_err(io(&name))?;
    remove_others(output, Some(&name))
}

/// Reads a checkpoint back; what it trains are variables.
pub(super) fn load(folder: &Path, llama: &Llama) -> Result<Checkpoint, LoraTrainingError> {
    Ok(Checkpoint {
        state: read_state(&folder.join("state.json"))?,
        tuned: Tuned::load(folder, llama)?.trainable()?,
        optimiser: candle_core::safetensors::load(folder.join("optimizer.safetensors"), llama.device())?,
    })
}

fn json(state: &RunState) -> String {
    serde_json::to_string_pretty(state).expect("plain data is serialisable") + "\n"
}

fn read_state(path: &Path) -> Result<RunState, LoraTrainingError> {
    let text = fs::read_to_string(path).map_err(io(path))?;
    serde_json::from_str(&text).map_err(|err| LoraTrainingError::BadFile {
        path: path.to_owned(),
        reason: err.to_string(),
    })
}

/// Keeps, beside the adapter, how it was trained.
pub(super) fn record(output: &Path, state: &RunState) -> Result<(), LoraTrainingError> {
    Ok(write_atomic(&output.join(RECORD), json(state))?)
}

/// How the adapter of an output folder was trained; `None` where another program made it.
pub(super) fn recorded(output: &Path) -> Result<Option<RunState>, LoraTrainingError> {
    let path = output.join(RECORD);
    path.is_file().then(|| read_state(&path)).transpose()
}

/// Removes what only a resumed run needs.
pub(super) fn clear(output: &Path) -> Result<(), LoraTrainingError> {
    remove_others(output, None)
}
