//! The files that Lengthwise reads and writes.

mod answers;
mod batch;
mod instructions;
mod journal;
mod lengths;
mod pairs;
mod records;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

pub use answers::{Answer, answer_line, prediction_line, read_predictions};
pub use batch::BatchBody;
pub use instructions::{InstructionRecord, read_instructions};
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

/// Writes a file beside its name (`.tmp`) and renames it, so that nobody ever sees half of it, not even after a power
/// failure.
///
/// # Errors
/// The folder cannot be written.
pub fn write_atomic(path: &Path, content: impl AsRef<[u8]>) -> Result<(), FileError> {
    let content = content.as_ref();
    let folder = folder_of(path);
    std::fs::create_dir_all(folder).map_err(io(folder))?;
    if std::fs::metadata(path).is_ok_and(|there| !there.is_file()) {
        // A rename would put a file in the place of /dev/null or a pipe.
        return std::fs::write(path, content).map_err(io(path));
    }
    let tmp = beside(path, ".tmp");
    let write = || {
        let mut file = File::create(&tmp)?;
        file.write_all(content)?;
        file.sync_all()
    };
    let written = write()
        .map_err(io(&tmp))
        .and_then(|()| std::fs::rename(&tmp, path).map_err(io(path)));
    if written.is_err() {
        // Half a file helps nobody; the first error is the one to tell.
        let _ = std::fs::remove_file(&tmp);
        return written;
    }
    // The new name is on the disk once its folder is. Not every system lets a folder be opened.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("new/out.jsonl");
        write_atomic(&path, "first\n")?;
        write_atomic(&path, "second\n")?;
        assert_eq!(std::fs::read_to_string(&path)?, "second\n");
        assert_eq!(std::fs::read_dir(dir.path().join("new"))?.count(), 1);
        // A folder in the way is an error and stays.
        write_atomic(&dir.path().join("new"), "x").expect_err("a folder");
        assert!(path.exists());
        Ok(())
    }
}
