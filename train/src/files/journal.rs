//! An output that grows while a long job runs, survives a kill, and is written in input order at the end.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use super::atomic::is_stream;
use super::lock::lock_file;
use super::{FileError, beside, folder_of, io, write_atomic};

/// Lines are on the disk after at most this long of writing.
const SYNC_EVERY: Duration = Duration::from_secs(2);

/// `<output>.partial`: a line with the job's settings, then one line per finished item in the order they finished.
/// [`Journal::finish`] turns it into the output. One process at a time holds it.
#[derive(Debug)]
pub struct Journal {
    output: PathBuf,
    partial: PathBuf,
    file: File,
    /// Bytes of whole lines.
    len: u64,
    synced: Instant,
}

impl Journal {
    /// Opens the journal of `output`, or begins one. Returns the lines of items that an earlier run finished; one
    /// that a crash cut short is dropped.
    ///
    /// # Errors
    /// `output` is complete already, the journal was begun with other settings, or another process holds it.
    pub fn open(output: &Path, settings: &str) -> Result<(Self, Vec<String>), FileError> {
        if is_stream(output) {
            let reason = "it is no file, and what is finished is kept beside a file until all is: name one";
            return Err(refuse(output, reason));
        }
        let partial = beside(output, ".partial");
        if output.exists() && !partial.exists() {
            return Err(complete(output));
        }
        std::fs::create_dir_all(folder_of(output)).map_err(io(folder_of(output)))?;
        let mut file = lock_file(&partial)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io(&partial))?;
        if bytes.is_empty() && output.exists() {
            // Its holder finished between our look at the output and our lock: this file is a new one.
            std::fs::remove_file(&partial).map_err(io(&partial))?;
            return Err(complete(output));
        }
        let (whole, mut lines) = whole_lines(&bytes);
        if whole < bytes.len() {
            tracing::warn!(
                "{}: dropped a line that was cut short ({} bytes); its request is done again",
                partial.display(),
                bytes.len() - whole
            );
        }
        let mut journal = Self {
            output: output.to_owned(),
            partial,
            file,
            len: whole as u64,
            synced: Instant::now(),
        };
        journal.cut()?;
        journal.check_settings(&mut lines, settings)?;
        Ok((journal, lines))
    }

    /// Where the lines stand.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Takes the settings off the lines of the journal; begins one without items anew.
    fn check_settings(&mut self, lines: &mut Vec<String>, settings: &str) -> Result<(), FileError> {
        let begun = (!lines.is_empty()).then(|| lines.remove(0));
        match begun {
            Some(begun) if begun == settings => Ok(()),
            Some(begun) if !lines.is_empty() => {
                let differences = differences(&begun, settings);
                let reason =
                    format!("it was begun with other settings{differences}; repeat them, or remove it to begin anew");
                Err(refuse(&self.partial, reason))
            }
            // Nothing was finished under the old settings (they were wrong, say), so nothing holds to them.
            _ => {
                self.len = 0;
                self.cut()?;
                self.push(settings)
            }
        }
    }

    /// Adds a finished item; `line` is without its line end and has none in it.
    ///
    /// # Errors
    /// The disk is full, say.
    pub fn push(&mut self, line: &str) -> Result<(), FileError> {
        debug_assert!(!line.contains('\n'), "an item is one line");
        // One write per line: a kill leaves whole lines and at most one cut short.
        let bytes = format!("{line}\n").into_bytes();
        if let Err(source) = self.file.write_all(&bytes) {
            // Half a line would spoil the next one. The first error is the one to tell.
            let _ = self.cut();
            return Err(io(&self.partial)(source));
        }
        self.len += bytes.len() as u64;
        if self.synced.elapsed() >= SYNC_EVERY {
            self.file.sync_data().map_err(io(&self.partial))?;
            self.synced = Instant::now();
        }
        Ok(())
    }

    /// Writes the output, given whole in input order, and drops the journal.
    ///
    /// # Errors
    /// The folder cannot be written, or the output has appeared meanwhile with other content.
    pub fn finish(self, text: &str) -> Result<(), FileError> {
        match std::fs::read(&self.output) {
            // An earlier run was killed after it wrote the output.
            Ok(there) if there == text.as_bytes() => {}
            Ok(_) => {
                let kept = self.partial.display();
                let reason = format!("it appeared during the run, with other content; what was finished is in {kept}");
                return Err(refuse(&self.output, reason));
            }
            Err(err) if err.kind() == ErrorKind::NotFound => write_atomic(&self.output, text)?,
            Err(source) => return Err(io(&self.output)(source)),
        }
        match std::fs::remove_file(&self.partial) {
            Err(err) if err.kind() != ErrorKind::NotFound => Err(io(&self.partial)(err)),
            _ => Ok(()),
        }
    }

    /// Drops what stands after the whole lines and goes on there.
    fn cut(&mut self) -> Result<(), FileError> {
        let cut = self.file.set_len(self.len);
        cut.and_then(|()| self.file.seek(SeekFrom::Start(self.len)))
            .map(|_| ())
            .map_err(io(&self.partial))
    }
}

fn refuse(path: &Path, reason: impl Into<String>) -> FileError {
    FileError::Output {
        path: path.to_owned(),
        reason: reason.into(),
    }
}

fn complete(output: &Path) -> FileError {
    refuse(output, "it exists already; remove it or choose another output")
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

/// What is not the same in two lines of settings: ` (seed 1, now 2)`; nothing where they are no JSON objects.
pub(crate) fn differences(begun: &str, now: &str) -> String {
    let object = |text: &str| serde_json::from_str::<Map<String, Value>>(text).ok();
    let (Some(begun), Some(now)) = (object(begun), object(now)) else {
        return String::new();
    };
    let shown = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
    let new = now.keys().filter(|key| !begun.contains_key(*key));
    let changed = begun.keys().chain(new).filter(|key| begun.get(*key) != now.get(*key));
    let text = changed.map(|key| format!("{key} {}, now {}", shown(begun.get(key)), shown(now.get(key))));
    match text.collect::<Vec<_>>().join("; ") {
        text if text.is_empty() => text,
        text => format!(" ({text})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_second_process_and_other_settings_are_refused() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let output = dir.path().join("out.jsonl");
        let (mut journal, _) = Journal::open(&output, "{\"seed\":1,\"model\":\"m\"}")?;
        journal.push("item")?;
        let err = Journal::open(&output, "a").expect_err("locked").to_string();
        assert!(err.contains("another process"), "{err}");
        drop(journal);
        let err = Journal::open(&output, "{\"seed\":2,\"model\":\"m\"}").expect_err("other settings");
        assert!(
            err.to_string().contains("other settings (seed 1, now 2); repeat"),
            "{err}"
        );
        let (journal, _) = Journal::open(&output, "{\"seed\":1,\"model\":\"m\"}")?;
        journal.finish("done\n")?;
        let err = Journal::open(&output, "a").expect_err("complete").to_string();
        assert!(err.contains("exists already"), "{err}");
        assert!(!dir.path().join("out.jsonl.partial").exists());
        Ok(())
    }

    #[test]
    fn settings_hold_from_the_first_finished_item() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let output = dir.path().join("out.jsonl");
        drop(Journal::open(&output, "a longer line of settings")?);
        let (mut journal, _) = Journal::open(&output, "b")?;
        journal.push("item")?;
        drop(journal);
        assert_eq!(
            std::fs::read_to_string(dir.path().join("out.jsonl.partial"))?,
            "b\nitem\n"
        );
        Ok(())
    }

    #[test]
    fn a_kill_between_output_and_removal_of_the_journal_is_mended() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let output = dir.path().join("out.jsonl");
        let (mut journal, _) = Journal::open(&output, "a")?;
        journal.push("item")?;
        drop(journal);
        std::fs::write(&output, "item\n")?;
        let (journal, kept) = Journal::open(&output, "a")?;
        assert_eq!(kept, ["item"]);
        // A file of somebody else is not written over.
        journal.finish("other\n").expect_err("other content");
        assert_eq!(std::fs::read_to_string(&output)?, "item\n");
        let (journal, _) = Journal::open(&output, "a")?;
        journal.finish("item\n")?;
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
