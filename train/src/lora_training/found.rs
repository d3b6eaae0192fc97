//! What an output folder holds before a run.

use std::path::Path;

use lengthwise_model::LengthHead;

use super::checkpoint::{self, Checkpoint, RunState};
use super::{LoraTrainingError, TrainRun};
use crate::files::{differences, lock_folder};

/// What a run finds in its output folder.
pub(super) enum Found {
    /// Nothing to go on from.
    Nothing,
    /// An unfinished run with the same settings and data.
    Checkpoint(Box<Checkpoint>),
    /// A finished run with the same settings and data.
    Finished(RunState),
}

/// Whether a run can have its folder: nobody else does, and without `resume` it holds nothing that training would replace.
/// [`super::train`] checks it too; whoever has a large model to load asks before.
///
/// # Errors
/// Another process trains there, there is an adapter, or a run that did not end.
pub fn check_output(output: &Path, resume: bool) -> Result<(), LoraTrainingError> {
    if output.is_dir() {
        drop(lock_folder(output)?);
    }
    refuse_what_is_there(output, resume)
}

/// Without `resume`: nothing that training would replace may be there.
pub(super) fn refuse_what_is_there(output: &Path, resume: bool) -> Result<(), LoraTrainingError> {
    let path = || output.to_owned();
    if resume {
        return Ok(());
    }
    if checkpoint::newest(output).is_some() {
        return Err(LoraTrainingError::Unfinished { path: path() });
    }
    match holds_adapter(output) {
        true => Err(LoraTrainingError::Occupied { path: path() }),
        false => Ok(()),
    }
}

fn holds_adapter(folder: &Path) -> bool {
    folder.join("adapter_config.json").exists() || LengthHead::is_in(folder)
}

/// Looks for what a run with these settings and data can go on from.
pub(super) fn look(run: &TrainRun, fingerprint: &str) -> Result<Found, LoraTrainingError> {
    if !run.resume {
        return Ok(Found::Nothing);
    }
    if let Some(path) = checkpoint::newest(&run.output) {
        let saved = checkpoint::load(&path, &run.model.network)?;
        check_same(&path, &saved.state, fingerprint)?;
        return Ok(Found::Checkpoint(Box::new(saved)));
    }
    if holds_adapter(&run.output) {
        let path = run.output.clone();
        let Some(state) = checkpoint::recorded(&path)? else {
            return Err(LoraTrainingError::Occupied { path });
        };
        check_same(&path, &state, fingerprint)?;
        return Ok(Found::Finished(state));
    }
    tracing::warn!(
        "{} holds no checkpoint: training begins at the first step",
        run.output.display()
    );
    Ok(Found::Nothing)
}

fn check_same(path: &Path, state: &RunState, fingerprint: &str) -> Result<(), LoraTrainingError> {
    if state.fingerprint == fingerprint {
        return Ok(());
    }
    Err(LoraTrainingError::OtherRun {
        path: path.to_owned(),
        differences: differences(&state.fingerprint, fingerprint),
    })
}
