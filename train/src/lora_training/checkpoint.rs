//! Checkpoints: a folder per step, complete once it has its final name.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use lengthwise_model::{Llama, save_tensors};
use serde::{Deserialize, Serialize};

use super::LoraTrainingError;
use super::tuned::Tuned;
use crate::files::write_atomic;
use crate::optim::AdamW;

const PREFIX: &str = "checkpoint-";
/// Beside a finished adapter: the last [`RunState`] of its run.
const RECORD: &str = "training.json";

/// Where a run is, beside its tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct RunState {
    /// Optimiser steps done.
    pub step: usize,
    /// The best evaluation loss so far and its step.
    pub best: Option<(f64, usize)>,
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
    let entries = fs::read_dir(output).ok()?;
    let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix(PREFIX)?.parse::<usize>().ok();
    entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| step(p).is_some())
        .max_by_key(|p| step(p))
}

/// Writes a checkpoint beside and renames it, then drops older ones.
pub(super) fn save(
    output: &Path,
    base_model: &str,
    tuned: &Tuned,
    adamw: &AdamW,
    state: &RunState,
) -> Result<(), LoraTrainingError> {
    let beside = output.join("writing-checkpoint");
    let last = newest(output);
    let _ = fs::remove_dir_all(&beside);
    tuned.save(&beside, base_model)?;
    let (tensors, _) = adamw.state()?;
    save_tensors(&tensors, &beside.join("optimizer.safetensors"))?;
    fs::write(beside.join("state.json"), json(state)).map_err(io(&beside))?;
    let name = output.join(format!("{PREFIX}{}", state.step));
    let _ = fs::remove_dir_all(&name);
    fs::rename(&beside, &name).map_err(io(&name))?;
    match last.filter(|last| *last != name) {
        Some(last) => fs::remove_dir_all(&last).map_err(io(&last)),
        None => Ok(()),
    }
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
    match newest(output) {
        Some(last) => fs::remove_dir_all(&last).map_err(io(&last)),
        None => Ok(()),
    }
}
