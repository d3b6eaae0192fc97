//! JSONL and JSON arrays as a list of records, each with its place for messages.

use std::collections::HashMap;
use std::path::Path;

use lengthwise_core::RequestId;
use serde_json::Value;

use super::{FileError, io};

/// One record and where it stands.
pub(super) struct Record {
    pub at: String,
    /// From 0.
    pub index: usize,
    pub value: Value,
}

/// The records of a file: a JSON array's elements, or one per line.
pub(super) struct Records<'a> {
    pub path: &'a Path,
    pub records: Vec<Record>,
}

impl<'a> Records<'a> {
    pub fn read(path: &'a Path) -> Result<Self, FileError> {
        let bytes = std::fs::read(path).map_err(io(path))?;
        let text = match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(err) => {
                let valid = err.utf8_error().valid_up_to();
                let line = err.as_bytes()[..valid].iter().filter(|b| **b == b'\n').count() + 1;
                return Err(bad(path, &format!("line {line}"), "not UTF-8"));
            }
        };
        let text = text.trim_start_matches('\u{feff}');
        let records = match text.trim_start().chars().next() {
            None => return Err(FileError::Empty { path: path.to_owned() }),
            Some('[') => array(path, text)?,
            Some(_) => lines(path, text)?,
        };
        match records.is_empty() {
            true => Err(FileError::Empty { path: path.to_owned() }),
            false => Ok(Self { path, records }),
        }
    }

    /// A record is wrong.
    pub fn bad(&self, record: &Record, reason: impl Into<String>) -> FileError {
        bad(self.path, &record.at, reason)
    }
}

fn bad(path: &Path, at: &str, reason: impl Into<String>) -> FileError {
    FileError::Record {
        path: path.to_owned(),
        at: at.to_owned(),
        reason: reason.into(),
    }
}

fn array(path: &Path, text: &str) -> Result<Vec<Record>, FileError> {
    let values: Vec<Value> = serde_json::from_str(text)
        .map_err(|err| bad(path, &format!("line {}", err.line()), format!("malformed JSON: {err}")))?;
    let record = |(index, value)| Record {
        at: format!("element {}", index + 1),
        index,
        value,
    };
    Ok(values.into_iter().enumerate().map(record).collect())
}

fn lines(path: &Path, text: &str) -> Result<Vec<Record>, FileError> {
    let filled = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let record = |(index, (line, text)): (usize, (usize, &str))| {
        let at = format!("line {}", line + 1);
        match serde_json::from_str(text) {
            Ok(value) => Ok(Record { at, index, value }),
            Err(err) => Err(bad(path, &at, format!("malformed JSON: {err}"))),
        }
    };
    filled.enumerate().map(record).collect()
}

/// The text of an id, which may be a number.
pub(super) fn id_of(value: &Value) -> Option<RequestId> {
    match value {
        Value::String(text) if !text.is_empty() => Some(text.as_str().into()),
        Value::Number(number) => Some(number.to_string().into()),
        _ => None,
    }
}

/// Sees to it that no id occurs twice.
#[derive(Default)]
pub(super) struct SeenIds(HashMap<RequestId, String>);

impl SeenIds {
    pub fn add(&mut self, records: &Records, record: &Record, id: &RequestId) -> Result<(), FileError> {
        match self.0.insert(id.clone(), record.at.clone()) {
            Some(first) => Err(records.bad(record, format!("id \"{id}\" was already used in {first}"))),
            None => Ok(()),
        }
    }
}
