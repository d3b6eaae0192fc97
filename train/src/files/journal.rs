//! An output that grows while a long job runs, survives a kill, and is written in input order at the end.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{FileError, io, write_atomic};

/// Lines are on the disk after at most this long.
const SYNC_EVERY: Duration = Duration::from_secs(2);

/// `<output>.partial`: a line with the job's settings, then one line per finished item in the order they finished.
/// [`Journal::finish`] turns it into the output. One process at a time holds it.
#[derive(Debug)]
pub struct Journal {
    output: PathBuf,
    partial: PathBuf,
    file: File,
    synced: Instant,
}

impl Journal {
    /// Opens the journal of `output`, or begins one. Returns the lines of items that an earlier run finished; one
    /// that a crash cut short is dropped.
    ///
    /// # Errors
    /// `output` is complete already, the journal was begun with other settings, or another process holds it.
    pub fn open(output: &Path, settings: &str) -> Result<(Self, Vec<String>), FileError> {
        let refuse = |path: &Path, reason: &str| FileError::Output {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        if output.exists() {
            return Err(refuse(output, "it exists already; remove it or choose another output"));
        }
        if let Some(parent) = output.parent().filter(|p| !p.as_os_str().is_empty()) {
            std::fs::create_dir_all(parent).map_err(io(parent))?;
        }
        let mut partial = output.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let mut options = OpenOptions::new();
        let mut file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&partial)
            .map_err(io(&partial))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(refuse(&partial, "another process is writing it")),
            Err(TryLockError::Error(source)) => return Err(FileError::Io { path: partial, source }),
        }
        let text = std::fs::read(&partial).map_err(io(&partial))?;
        let (whole, lines) = whole_lines(&text);
        if whole < text.len() {
            tracing::warn!(
                "{}: dropped a line that was cut short; its request is done again",
                partial.display()
            );
            file.set_len(whole as u64).map_err(io(&partial))?;
        }
        file.seek(SeekFrom::End(0)).map_err(io(&partial))?;
        let mut journal = Self {
            output: output.to_owned(),
            partial,
            file,
            synced: Instant::now(),
        };
        let mut lines = lines.into_iter();
        match lines.next() {
            None => journal.push(settings)?,
            Some(begun) if begun == settings => {}
            Some(_) => {
                let reason = "it was begun with other settings; repeat them, or remove it to begin anew";
                return Err(refuse(&journal.partial, reason));
            }
        }
        Ok((journal, lines.collect()))
    }

    /// Adds a finished item; `line` is without its line end.
    ///
    /// # Errors
    /// The disk is full, say.
    pub fn push(&mut self, line: &str) -> Result<(), FileError> {
        // One write per line: a kill leaves whole lines and at most one cut short.
        self.file
            .write_all(format!("{line}\n").as_bytes())
            .map_err(io(&self.partial))?;
        if self.synced.elapsed() >= SYNC_EVERY {
            self.file.sync_data().map_err(io(&self.partial))?;
            self.synced = Instant::now();
        }
        Ok(())
    }

    /// Writes the output, given whole in input order, and drops the journal.
    ///
    /// # Errors
    /// The folder cannot be written.
    pub fn finish(self, text: &str) -> Result<(), FileError> {
        write_atomic(&self.output, text)?;
        std::fs::remove_file(&self.partial).map_err(io(&self.partial))
    }
}

/// The whole lines of a file and where they end. Bytes that are no UTF-8 can only be in a line that was cut.
fn whole_lines(bytes: &[u8]) -> (usize, Vec<String>) {
    let mut end = 0;
    let mut lines = Vec::new();
    for line in bytes.split_inclusive(|b| *b == b'\n') {
        let Some(body) = line.strip_suffix(b"\n").and_then(|l| std::str::from_utf8(l).ok()) else {
            break;
        };
        lines.push(body.to_owned());
        end += line.len();
    }
    (end, lines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_second_process_and_other_settings_are_refused() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let output = dir.path().join("out.jsonl");
        let (journal, _) = Journal::open(&output, "a")?;
        let err = Journal::open(&output, "a").expect_err("locked").to_string();
        assert!(err.contains("another process"), "{err}");
        drop(journal);
        let err = Journal::open(&output, "b").expect_err("other settings").to_string();
        assert!(err.contains("other settings"), "{err}");
        let (journal, _) = Journal::open(&output, "a")?;
        journal.finish("done\n")?;
        let err = Journal::open(&output, "a").expect_err("complete").to_string();
        assert!(err.contains("exists already"), "{err}");
        assert!(!dir.path().join("out.jsonl.partial").exists());
        Ok(())
    }

    proptest! {
        #[test]
        fn whatever_byte_it_is_cut_at_whole_lines_stay(
            items in prop::collection::vec("[a-zé{}\"]{0,12}", 0..8), cut in 0usize..120,
        ) {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let output = dir.path().join("out.jsonl");
            let partial = dir.path().join("out.jsonl.partial");
            let (mut journal, _) = Journal::open(&output, "settings").expect("new");
            for item in &items {
                journal.push(item).expect("written");
            }
            drop(journal);
            let mut bytes = std::fs::read(&partial).expect("there");
            bytes.truncate(cut);
            std::fs::write(&partial, &bytes).expect("written");
            let (mut journal, kept) = Journal::open(&output, "settings").expect("recovered");
            prop_assert!(items.starts_with(&kept));
            let whole = bytes.iter().filter(|b| **b == b'\n').count();
            prop_assert_eq!(kept.len(), whole.saturating_sub(1));
            journal.push("next").expect("written");
            drop(journal);
            let (_, again) = Journal::open(&output, "settings").expect("recovered");
            prop_assert_eq!(again.last().map(String::as_str), Some("next"));
            prop_assert_eq!(again.len(), kept.len() + 1);
        }
    }
}
