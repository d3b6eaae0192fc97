//! JSONL and JSON arrays as a list of records, each with its place for messages.

use std::collections::HashMap;
use std::path::Path;

use lengthwise_core::RequestId;
use serde_json::Value;

use super::{FileError, io};

/// One record and where it stands.
#[derive(Debug)]
pub(super) struct Record {
    /// `line 3`, or `line 3 (element 2)` in an array.
    pub at: String,
    /// Its place in an array, from 0; `None` in JSONL.
    pub element: Option<usize>,
    pub value: Value,
}

/// The records of a file: a JSON array's elements, or one per line.
#[derive(Debug)]
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
        if records.is_empty() {
            return Err(FileError::Empty { path: path.to_owned() });
        }
        match records.iter().find(|r| !r.value.is_object()) {
            Some(record) => Err(bad(path, &record.at, "not a JSON object")),
            None => Ok(Self { path, records }),
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

/// serde_json's words; its line is left out because it counts from the start of what it was given.
fn malformed(err: &serde_json::Error) -> String {
    let text = err.to_string();
    let words = text.rsplit_once(" at line ").map_or(text.as_str(), |(words, _)| words);
    format!("malformed JSON: {words} (column {})", err.column())
}

fn array(path: &Path, text: &str) -> Result<Vec<Record>, FileError> {
    let values: Vec<Value> =
        serde_json::from_str(text).map_err(|err| bad(path, &format!("line {}", err.line()), malformed(&err)))?;
    let places = element_lines(text);
    let record = |(element, (value, line)): (usize, (Value, usize))| Record {
        at: format!("line {line} (element {})", element + 1),
        element: Some(element),
        value,
    };
    Ok(values.into_iter().zip(places).enumerate().map(record).collect())
}

/// The line that each element of a JSON array begins in. `text` is known to be well-formed.
fn element_lines(text: &str) -> Vec<usize> {
    let (mut line, mut depth, mut awaited) = (1, 0, false);
    let (mut in_string, mut escaped) = (false, false);
    let mut lines = Vec::new();
    for byte in text.bytes() {
        if in_string {
            // A string of well-formed JSON has no line end in it.
            in_string = escaped || byte != b'"';
            escaped = !escaped && byte == b'\\';
            continue;
        }
        if awaited && depth == 1 && !byte.is_ascii_whitespace() && byte != b']' {
            lines.push(line);
            awaited = false;
        }
        match byte {
            b'\n' => line += 1,
            b'"' => in_string = true,
            b'[' | b'{' => {
                depth += 1;
                awaited |= depth == 1;
            }
            b']' | b'}' => depth -= 1,
            b',' if depth == 1 => awaited = true,
            _ => {}
        }
    }
    lines
}

fn lines(path: &Path, text: &str) -> Result<Vec<Record>, FileError> {
    let filled = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let record = |(line, text): (usize, &str)| {
        let at = format!("line {}", line + 1);
        match serde_json::from_str(text) {
            Ok(value) => Ok(Record {
                at,
                element: None,
                value,
            }),
            Err(err) => Err(bad(path, &at, malformed(&err))),
        }
    };
    filled.map(record).collect()
}

/// The text of an id, which may be a whole number: others have no one way to be written.
pub(super) fn id_of(value: &Value) -> Option<RequestId> {
    match value {
        Value::String(text) if !text.is_empty() => Some(text.as_str().into()),
        Value::Number(number) if !number.is_f64() => Some(number.to_string().into()),
        _ => None,
    }
}

/// The id of a record that must have one.
pub(super) fn required_id(value: &Value) -> Result<RequestId, &'static str> {
    let id = value.get("id").ok_or("there is no \"id\"")?;
    id_of(id).ok_or("\"id\" must be a text or a whole number")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_is_placed_by_the_line_it_begins_in() {
        // Brackets, commas and quotes inside strings are text.
        let text = "[\n{\"a\": \"],[\\\"{\"},\n\n {\"b\":\n[1, 2]}, {\"c\": \"\\\\\"}\n]";
        assert_eq!(element_lines(text), [2, 4, 5]);
        assert_eq!(element_lines("[ ]"), Vec::<usize>::new());
    }

    #[test]
    fn what_cannot_be_read_is_placed() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("in");
        let cases: [(&[u8], &str); 6] = [
            (b"{\"id\": 1}\n{\"id\": \xff}\n", "line 2: not UTF-8"),
            (
                b"{\"id\": 1}\n\n{\"id\": }\n",
                "line 3: malformed JSON: expected value (column 8)",
            ),
            (
                b"[{\"id\": 1},\n {\"id\" 2}]",
                "line 2: malformed JSON: expected `:` (column 8)",
            ),
            (b"[{\"id\": 1},\n 2]", "line 2 (element 2): not a JSON object"),
            (b"7\n", "line 1: not a JSON object"),
            (b" \n", "is empty"),
        ];
        for (bytes, want) in cases {
            std::fs::write(&path, bytes)?;
            let err = Records::read(&path).expect_err("unreadable").to_string();
            assert!(err.contains(want) && err.contains("in"), "{err}, want {want}");
            assert!(!err.contains('\n'), "{err}");
        }
        Ok(())
    }
}
