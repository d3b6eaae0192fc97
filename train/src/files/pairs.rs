//! `pairs.jsonl`: instructions with the length that is to be predicted.

use std::path::Path;
use std::str::FromStr;

use lengthwise_core::RequestId;
use lengthwise_model::LENGTH_QUESTION;
use serde::{Deserialize, Serialize};

use super::FileError;
use super::records::{Records, SeenIds};

/// An instruction and its label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// The instruction's id.
    pub id: RequestId,
    /// The instruction.
    pub instruction: String,
    /// The length to predict, in tokens.
    pub label: u32,
    /// The lengths that the label was made of.
    #[serde(default)]
    pub lengths: Vec<u32>,
}

/// In which form pairs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PairFormat {
    /// `{"id", "instruction", "label", "lengths"}`.
    Pairs,
    /// `{"messages": […]}` with the length question asked and answered: read by PEFT's trainers, axolotl and
    /// LLaMA-Factory.
    Chat,
}

impl FromStr for PairFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "pairs" => Ok(Self::Pairs),
            "chat" => Ok(Self::Chat),
            _ => Err(format!("no format is called \"{text}\"; there are pairs, chat")),
        }
    }
}

/// A pair as one line of a file.
pub fn pair_line(pair: &Pair, format: PairFormat) -> String {
    let line = match format {
        PairFormat::Pairs => serde_json::to_string(pair),
        PairFormat::Chat => serde_json::to_string(&serde_json::json!({
            "messages": [
                {"role": "user", "content": format!("{}{LENGTH_QUESTION}", pair.instruction)},
                {"role": "assistant", "content": pair.label.to_string()},
            ],
        })),
    };
    line.expect("plain data is serialisable") + "\n"
}

/// Reads `pairs.jsonl`.
///
/// # Errors
/// The file is missing, empty or malformed, or an id was used before.
pub fn read_pairs(path: &Path) -> Result<Vec<Pair>, FileError> {
    let records = Records::read(path)?;
    let mut seen = SeenIds::default();
    let mut pairs = Vec::with_capacity(records.records.len());
    for record in &records.records {
        let pair: Pair =
            serde_json::from_value(record.value.clone()).map_err(|err| records.bad(record, err.to_string()))?;
        if pair.instruction.trim().is_empty() {
            return Err(records.bad(record, "the instruction is empty"));
        }
        seen.add(&records, record, &pair.id)?;
        pairs.push(pair);
    }
    Ok(pairs)
}
