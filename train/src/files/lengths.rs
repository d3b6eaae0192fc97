//! `lengths.jsonl`: how long a model's sampled answers to each instruction were.

use std::path::Path;

use lengthwise_core::{ChatMessage, FinishReason, RequestId};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::FileError;
use super::records::{Record, Records, SeenIds, required_id};

/// One sampled answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// The temperature it was drawn at.
    pub temperature: f32,
    /// Its generated tokens, the end-of-sequence token counted.
    pub tokens: u32,
    /// Why it ended.
    pub finish: FinishReason,
    /// Its text, where it was kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

impl Sample {
    /// Whether it was drawn at this temperature.
    pub fn is_at(&self, temperature: f32) -> bool {
        (self.temperature - temperature).abs() < 1e-6
    }
}

/// An instruction and its samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LengthRecord {
    /// The instruction's id.
    pub id: RequestId,
    /// The instruction; the published lengths come without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instruction: Option<String>,
    /// The whole conversation, where the instruction is its last question and not all of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<ChatMessage>,
    /// In the order of collection.
    pub samples: Vec<Sample>,
}

impl LengthRecord {
    /// The largest length of its samples.
    pub fn largest(&self) -> u32 {
        self.samples.iter().map(|s| s.tokens).max().unwrap_or(0)
    }

    /// The first sample at a temperature.
    pub fn at_temperature(&self, temperature: f32) -> Option<&Sample> {
        self.samples.iter().find(|s| s.is_at(temperature))
    }
}

/// The published lengths say nothing of how an answer ended; they were sampled with this cap.
const PUBLISHED_CAP: u32 = 512;

/// Reads our JSONL, or the published array with `L_t0.0` and its siblings.
///
/// # Errors
/// The file is missing, empty or malformed; a record has no samples, or an id that was used before.
pub fn read_lengths(path: &Path) -> Result<Vec<LengthRecord>, FileError> {
    let records = Records::read(path)?;
    let mut seen = SeenIds::default();
    let mut lengths = Vec::with_capacity(records.records.len());
    for record in &records.records {
        let length = parse(record).map_err(|reason| records.bad(record, reason))?;
        if length.samples.is_empty() {
            return Err(records.bad(record, "there are no samples"));
        }
        seen.add(&records, record, &length.id)?;
        lengths.push(length);
    }
    Ok(lengths)
}

fn parse(record: &Record) -> Result<LengthRecord, String> {
    let object = record.value.as_object().ok_or("not a JSON object")?;
    let id = required_id(&record.value)?;
    if object.contains_key("samples") {
        let mut value = record.value.clone();
        value["id"] = Value::String(id.to_string());
        return serde_json::from_value(value).map_err(|err| err.to_string());
    }
    let mut samples = Vec::new();
    for (key, value) in object {
        // L_gt, the data set's own answer, is no sample of the model.
        let Some(temperature) = key
            .strip_prefix("L_t")
            .and_then(|t| t.parse().ok())
            .filter(|t: &f32| t.is_finite())
        else {
            continue;
        };
        let tokens = value.as_u64().and_then(|n| u32::try_from(n).ok());
        let tokens = tokens.ok_or_else(|| format!("\"{key}\" is {value}, not a number of tokens"))?;
        samples.push(Sample {
            temperature,
            tokens,
            finish: match tokens >= PUBLISHED_CAP {
                true => FinishReason::Length,
                false => FinishReason::Stop,
            },
            text: None,
        });
    }
    samples.sort_by(|a, b| a.temperature.total_cmp(&b.temperature));
    Ok(LengthRecord {
        id,
        instruction: None,
        messages: Vec::new(),
        samples,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_array_is_read() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("lengths.json");
        std::fs::write(&path, r#"[{"id": "5", "L_gt": 900, "L_t0.7": 512, "L_t0.0": 115}]"#)?;
        let got = read_lengths(&path)?;
        assert_eq!(got[0].samples.iter().map(|s| s.tokens).collect::<Vec<_>>(), [115, 512]);
        assert_eq!(got[0].largest(), 512);
        assert_eq!(got[0].at_temperature(0.7).map(|s| s.finish), Some(FinishReason::Length));
        assert_eq!(got[0].at_temperature(0.0).map(|s| s.finish), Some(FinishReason::Stop));
        assert_eq!(got[0].at_temperature(0.3), None);
        Ok(())
    }

    #[test]
    fn a_number_is_an_id_too() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("lengths.jsonl");
        let sample = r#"{"temperature": 0.3, "tokens": 9, "finish": "length", "text": "x"}"#;
        std::fs::write(&path, format!("{{\"id\": 5, \"samples\": [{sample}]}}\n"))?;
        let got = read_lengths(&path)?;
        assert_eq!(
            (got[0].id.as_str(), got[0].samples[0].text.as_deref()),
            ("5", Some("x"))
        );
        assert_eq!(
            (got[0].samples[0].tokens, got[0].samples[0].finish),
            (9, FinishReason::Length)
        );
        Ok(())
    }

    #[test]
    fn a_record_without_samples_is_refused() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("lengths.jsonl");
        std::fs::write(&path, "{\"id\": \"5\", \"samples\": []}\n")?;
        let err = read_lengths(&path).expect_err("no samples").to_string();
        assert!(err.contains("line 1: there are no samples"), "{err}");
        Ok(())
    }
}
