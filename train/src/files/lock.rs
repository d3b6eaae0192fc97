//! One process at a time: locks on files and folders, which end with the process that holds them.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;

use super::{FileError, io};

/// Opens a file, made where it is missing, that no other process has open this way.
///
/// # Errors
/// Another process holds it, or it cannot be opened.
pub(crate) fn lock_file(path: &Path) -> Result<File, FileError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    hold(options.open(path).map_err(io(path))?, path)
}

/// Makes a folder where it is missing, and holds it as long as what is returned lives. Nothing is left in it.
///
/// # Errors
/// Another process holds it, or it cannot be made.
pub(crate) fn lock_folder(path: &Path) -> Result<File, FileError> {
    std::fs::create_dir_all(path).map_err(io(path))?;
    hold(File::open(path).map_err(io(path))?, path)
}

fn hold(file: File, path: &Path) -> Result<File, FileError> {
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(FileError::Output {
            path: path.to_owned(),
            reason: "another process is writing it".to_owned(),
        }),
        Err(TryLockError::Error(source)) => Err(io(path)(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_held_by_one_and_free_once_that_has_ended() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("new/out");
        let held = lock_folder(&path)?;
        let err = lock_folder(&path).expect_err("held").to_string();
        assert!(err.ends_with("out: another process is writing it"), "{err}");
        drop(held);
        lock_folder(&path)?;
        assert_eq!(std::fs::read_dir(&path)?.count(), 0);
        Ok(())
    }
}
