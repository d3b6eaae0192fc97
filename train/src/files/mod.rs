//! The files that Lengthwise reads and writes.

mod answers;
mod atomic;
mod batch;
mod instructions;
mod journal;
mod lengths;
mod lock;
mod pairs;
mod records;

use std::path::{Path, PathBuf};

pub use answers::{Answer, answer_line, prediction_line, read_predictions};
pub use atomic::write_atomic;
pub use batch::BatchBody;
pub use instructions::{InstructionRecord, read_instructions};
pub use journal::Journal;
pub(crate) use journal::differences;
pub use lengths::{LengthRecord, Sample, read_lengths};
pub(crate) use lock::lock_folder;
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

/// A name beside `path`: its own with `ending` after it.
pub(crate) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// The folder that `path` stands in.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
