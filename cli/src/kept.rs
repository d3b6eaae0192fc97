//! Answers that `generate` keeps until it has all: each with a mark of its request, which tells it from another input's.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, bail};
use lengthwise_core::{RequestId, fixed_hash};
use lengthwise_train::files::InstructionRecord;

/// The marks of an input's requests.
pub struct Marks(HashMap<RequestId, u64>);

impl Marks {
    pub fn of(records: &[InstructionRecord]) -> Self {
        Self(records.iter().map(|record| (record.id.clone(), mark(record))).collect())
    }

    /// The line that keeps the answer to a request.
    ///
    /// # Errors
    /// The input has no such request.
    pub fn line(&self, id: &RequestId, answer: &str) -> anyhow::Result<String> {
        let mark = self
            .0
            .get(id)
            .with_context(|| format!("request {id} is not in the input"))?;
        Ok(format!("{mark:016x} {answer}"))
    }

    /// The answers of kept lines, by request.
    ///
    /// - `journal`: where they stand, behind a line of settings
    ///
    /// # Errors
    /// A line is damaged, or answers what the input does not ask.
    pub fn answers(&self, lines: &[String], journal: &Path) -> anyhow::Result<HashMap<RequestId, String>> {
        let path = journal.display();
        let answer = |(number, line): (usize, &String)| {
            let Some((mark, id, answer)) = parts(line) else {
                bail!(
                    "{path}: line {} is damaged: remove that line to answer its request again, or the file to begin anew",
                    number + 2
                );
            };
            if self.0.get(&id) != Some(&mark) {
                bail!(
                    "{path} holds the answer to request {id}, which the input has not, or not so: repeat the input that it \
                     belongs to, or remove it to begin anew"
                );
            }
            Ok((id, answer.to_owned()))
        };
        lines.iter().enumerate().map(answer).collect()
    }
}

/// Mark, request and answer of a line.
fn parts(line: &str) -> Option<(u64, RequestId, &str)> {
    let (mark, answer) = line.split_once(' ')?;
    let value: serde_json::Value = serde_json::from_str(answer).ok()?;
    let id = value["custom_id"].as_str().or(value["id"].as_str())?;
    Some((u64::from_str_radix(mark, 16).ok()?, RequestId::from(id), answer))
}

/// Of all that a request says of its answer.
fn mark(record: &InstructionRecord) -> u64 {
    fixed_hash(&format!("{:?} {:?}", record.prompt, record.batch))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lengthwise_core::Prompt;

    fn records(asked: &[(&str, &str)]) -> Vec<InstructionRecord> {
        let record = |(id, text): &(&str, &str)| InstructionRecord {
            id: (*id).into(),
            prompt: Prompt::Instruction((*text).to_owned()),
            batch: None,
        };
        asked.iter().map(record).collect()
    }

    #[test]
    fn answers_are_known_by_the_input_that_asked_for_them() -> anyhow::Result<()> {
        let journal = Path::new("out.jsonl.partial");
        let marks = Marks::of(&records(&[("1", "Count to five."), ("2", "Name a bird.")]));
        let lines = [marks.line(&"2".into(), r#"{"id":"2","response":"A swan."}"#)?];
        let kept = marks.answers(&lines, journal)?;
        assert_eq!(kept[&"2".into()], r#"{"id":"2","response":"A swan."}"#);
        for other in [
            &[("1", "Count to five."), ("2", "Name a fish.")][..],
            &[("1", "Count to five.")],
        ] {
            let err = Marks::of(&records(other))
                .answers(&lines, journal)
                .expect_err("another input");
            assert!(err.to_string().contains("holds the answer to request 2"), "{err}");
        }
        marks.line(&"3".into(), "{}").expect_err("nobody asked");
        Ok(())
    }

    #[test]
    fn a_damaged_line_is_named() -> anyhow::Result<()> {
        let marks = Marks::of(&records(&[("1", "a")]));
        let good = marks.line(&"1".into(), r#"{"id":"1"}"#)?;
        for damaged in ["", "12", r#"{"id":"1"}"#, "0000000000000001 {\"id\":"] {
            let err = marks
                .answers(&[good.clone(), damaged.to_owned()], Path::new("p"))
                .expect_err("damaged");
            assert!(err.to_string().starts_with("p: line 3 is damaged"), "{err}");
        }
        Ok(())
    }
}
