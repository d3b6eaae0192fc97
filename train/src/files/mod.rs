//! The files that Lengthwise reads and writes.

mod answers;
mod instructions;
mod journal;
mod lengths;
mod pairs;
mod records;

use std::path::{Path, PathBuf};

pub use answers::{Answer, AnswerFormat, answer_line, read_predictions};
pub use instructions::{BatchBody, InstructionRecord, read_instructions};
pub use journal::Journal;
pub use lengths::{LengthRecord, Sample, read_lengths};
pub use pairs::{Pair, PairFormat, pair_line, read_pairs};

/// What is wrong with a file.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is nothing in it.
    #[error("{} is empty", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A record is not what it should be.
    #[error("{}, {at}: {reason}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// `line 3` or `element 3`.
        at: String,
        /// What is wrong.
        reason: String,
    },
    /// An output that is there already, or made with other settings, or being written by another process.
    #[error("{}: {reason}", path.display())]
    Output {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
}

pub(crate) fn io(path: &Path) -> impl Fn(std::io::Error) -> FileError {
    move |source| FileError::Io {
        path: path.to_owned(),
        source,
    }
}

/// Writes a file beside its name and renames it, so that nobody ever sees half of it.
///
/// # Errors
/// The folder cannot be written.
pub fn write_atomic(path: &Path, text: &str) -> Result<(), FileError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".tmp");
    let beside = PathBuf::from(beside);
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(io(parent))?;
    }
    std::fs::write(&beside, text).map_err(io(&beside))?;
    std::fs::rename(&beside, path).map_err(io(path))
}
