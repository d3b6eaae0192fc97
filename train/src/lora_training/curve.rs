//! `loss.jsonl`: one line per optimiser step.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{CurvePoint, LoraTrainingError};

/// The open curve of a run.
pub(super) struct Curve {
    path: PathBuf,
    file: File,
}

impl Curve {
    /// Keeps the first `steps` lines of an earlier run; what came after its checkpoint is done again.
    pub fn open(output: &Path, steps: usize) -> Result<Self, LoraTrainingError> {
        let path = output.join("loss.jsonl");
        let io = |source| LoraTrainingError::Io {
            path: path.clone(),
            source,
        };
        let old = if steps > 0 {
            std::fs::read_to_string(&path).map_err(io)?
        } else {
            String::new()
        };
        let kept: String = old.split_inclusive('\n').take(steps).collect();
        if kept.lines().count() < steps {
            let reason = format!(
                "it has {} lines, the checkpoint was made after {steps} steps",
                kept.lines().count()
            );
            return Err(LoraTrainingError::BadFile { path, reason });
        }
        std::fs::write(&path, kept).map_err(io)?;
        let file = OpenOptions::new().append(true).open(&path).map_err(io)?;
        Ok(Self { file, path })
    }

    pub fn push(&mut self, point: &CurvePoint) -> Result<(), LoraTrainingError> {
        let line = serde_json::to_string(point).expect("plain numbers are serialisable") + "\n";
        self.file
            .write_all(line.as_bytes())
            .map_err(|source| LoraTrainingError::Io {
                path: self.path.clone(),
                source,
            })
    }
}
