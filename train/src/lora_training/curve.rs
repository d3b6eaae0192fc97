//! `loss.jsonl`: one line per optimiser step.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use super::{CurvePoint, LoraTrainingError};

/// The open curve of a run.
pub(super) struct Curve {
    path: PathBuf,
    file: File,
}

impl Curve {
    /// Keeps the lines of an earlier run's first `steps` steps; what came after its checkpoint is done again. Lines that
    /// are missing or damaged are no reason not to go on.
    pub fn open(output: &Path, steps: usize) -> Result<Self, LoraTrainingError> {
        let path = output.join("loss.jsonl");
        let io = |source| LoraTrainingError::Io {
            path: path.clone(),
            source,
        };
        let old = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(err) if err.kind() == ErrorKind::NotFound => String::new(),
            Err(err) => return Err(io(err)),
        };
        let kept = first_steps(&old, steps);
        let missing = steps.saturating_sub(kept.lines().count());
        if missing > 0 {
            tracing::warn!("{}: {missing} of the first {steps} steps are missing", path.display());
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

/// The whole lines of the first `steps` steps.
fn first_steps(curve: &str, steps: usize) -> String {
    let is_kept = |line: &&str| {
        let point = serde_json::from_str::<CurvePoint>(line);
        line.ends_with('\n') && point.is_ok_and(|point| point.step <= steps)
    };
    curve.split_inclusive('\n').filter(is_kept).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: usize) -> String {
        format!("{{\"step\":{step},\"epoch\":0.5,\"loss\":1.0,\"learning_rate\":0.1,\"grad_norm\":1.0}}\n")
    }

    #[test]
    fn a_curve_goes_on_with_what_there_is_of_it() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("loss.jsonl");
        // It was lost.
        Curve::open(dir.path(), 2)?;
        assert_eq!(std::fs::read_to_string(&path)?, "");
        // Steps behind the checkpoint and a line that was cut short go.
        std::fs::write(&path, line(2) + &line(3) + "{\"step\":1,\"ep")?;
        Curve::open(dir.path(), 2)?;
        assert_eq!(std::fs::read_to_string(&path)?, line(2));
        // A new run begins a new one.
        Curve::open(dir.path(), 0)?;
        assert_eq!(std::fs::read_to_string(&path)?, "");
        Ok(())
    }
}
