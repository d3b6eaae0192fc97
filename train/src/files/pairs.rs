//! `pairs.jsonl`: instructions with the length that is to be predicted.

use std::path::Path;
use std::str::FromStr;

use lengthwise_core::{ChatMessage, Prompt, RequestId};
use lengthwise_model::LENGTH_QUESTION;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::FileError;
use super::records::{Records, SeenIds, required_id};

/// An instruction and its label.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pair {
    /// The instruction's id.
    pub id: RequestId,
    /// The instruction.
    pub instruction: String,
    /// The whole conversation, where the instruction is its last question and not all of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<ChatMessage>,
    /// The length to predict, in tokens.
    pub label: u32,
    /// The lengths that the label was made of.
    #[serde(default)]
    pub lengths: Vec<u32>,
}

impl Pair {
    /// What the lengths are of.
    pub fn prompt(&self) -> Prompt {
        match self.messages.as_slice() {
            [] => Prompt::Instruction(self.instruction.clone()),
            messages => Prompt::Chat(messages.to_vec()),
        }
    }
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
        PairFormat::Chat => {
            let mut messages = pair.prompt().with_suffix(LENGTH_QUESTION).messages();
            messages.push(ChatMessage::assistant(pair.label.to_string()));
            serde_json::to_string(&serde_json::json!({"messages": messages}))
        }
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
        if let Some(reason) = other_format(&record.value) {
            return Err(records.bad(record, reason));
        }
        let id = required_id(&record.value).map_err(|reason| records.bad(record, reason))?;
        let mut value = record.value.clone();
        value["id"] = id.to_string().into();
        let pair: Pair = serde_json::from_value(value).map_err(|err| records.bad(record, err.to_string()))?;
        if pair.instruction.trim().is_empty() {
            return Err(records.bad(record, "the instruction is empty"));
        }
        if !pair.messages.is_empty() {
            Prompt::chat(pair.messages.clone()).map_err(|err| records.bad(record, err.to_string()))?;
        }
        seen.add(&records, record, &pair.id)?;
        pairs.push(pair);
    }
    Ok(pairs)
}

/// What a record without a label is, where it is of another format that we know, and what makes pairs of it.
fn other_format(value: &Value) -> Option<&'static str> {
    let has = |field| value.get(field).is_some();
    if has("label") {
        return None;
    }
    if has("samples") {
        return Some("these are sampled lengths: `lengthwise label` makes pairs of them");
    }
    if has("messages") && !has("instruction") {
        return Some(
            "this is the chat format, for PEFT's trainers, axolotl and LLaMA-Factory: pairs come from `lengthwise label \
             --format pairs`",
        );
    }
    let is_instruction = ["conversations", "instruction", "custom_id"].into_iter().any(has);
    is_instruction.then_some(
        "there is no \"label\": `lengthwise collect` samples lengths of instructions, `lengthwise label` makes pairs of them",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> Pair {
        Pair {
            id: "5".into(),
            instruction: "say \"é\"".to_owned(),
            messages: Vec::new(),
            label: 150,
            lengths: vec![115, 126],
        }
    }

    #[test]
    fn a_pair_is_read_as_it_was_written() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("pairs.jsonl");
        let line = pair_line(&pair(), PairFormat::Pairs);
        assert_eq!(
            line,
            "{\"id\":\"5\",\"instruction\":\"say \\\"é\\\"\",\"label\":150,\"lengths\":[115,126]}\n"
        );
        std::fs::write(&path, line)?;
        assert_eq!(read_pairs(&path)?, [pair()]);
        std::fs::write(&path, "{\"id\": 5, \"instruction\": \"x\", \"label\": -1}\n")?;
        let err = read_pairs(&path).expect_err("no length").to_string();
        assert!(err.contains("line 1: invalid value: integer `-1`"), "{err}");
        Ok(())
    }

    #[test]
    fn a_conversation_stays_whole() -> anyhow::Result<()> {
        let messages = vec![
            ChatMessage::user("a"),
            ChatMessage::assistant("b"),
            ChatMessage::user("say \"é\""),
        ];
        let pair = Pair { messages, ..pair() };
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("pairs.jsonl");
        std::fs::write(&path, pair_line(&pair, PairFormat::Pairs))?;
        assert_eq!(read_pairs(&path)?, std::slice::from_ref(&pair));
        let value: serde_json::Value = serde_json::from_str(&pair_line(&pair, PairFormat::Chat))?;
        assert_eq!(value["messages"][1]["content"], "b");
        let question = value["messages"][2]["content"].as_str().unwrap_or_default();
        assert!(question.starts_with("say \"é\"\nDon't output"), "{question}");
        assert_eq!(value["messages"][3]["content"], "150");
        Ok(())
    }

    #[test]
    fn other_formats_are_known_and_say_what_makes_pairs_of_them() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("data");
        let turn = r#"{"from": "human", "value": "q"}"#;
        let cases = [
            (pair_line(&pair(), PairFormat::Chat), "line 1: this is the chat format"),
            (
                format!(r#"[{{"id": "a", "conversations": [{turn}]}}]"#),
                "`lengthwise collect`",
            ),
            (
                r#"[{"instruction": "a", "input": "", "output": "b"}]"#.to_owned(),
                "`lengthwise collect`",
            ),
            (
                r#"{"id": "a", "instruction": "b", "samples": []}"#.to_owned(),
                "these are sampled lengths: `lengthwise label`",
            ),
            (r#"{"instruction": "b", "label": 5}"#.to_owned(), "there is no \"id\""),
            (r#"{"x": 1}"#.to_owned(), "there is no \"id\""),
        ];
        for (text, want) in cases {
            std::fs::write(&path, text)?;
            let err = read_pairs(&path).expect_err("no pairs").to_string();
            assert!(err.contains(want) && !err.contains('\n'), "{err}, want {want}");
        }
        Ok(())
    }

    #[test]
    fn the_chat_form_asks_and_answers_the_length_question() {
        let line = pair_line(&pair(), PairFormat::Chat);
        let value: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        let question = value["messages"][0]["content"].as_str().expect("a text");
        assert!(
            question.starts_with("say \"é\"\nDon't output the response"),
            "{question}"
        );
        assert!(question.ends_with("Output one number only."), "{question}");
        assert_eq!(value["messages"][0]["role"], "user");
        assert_eq!(
            value["messages"][1],
            serde_json::json!({"role": "assistant", "content": "150"})
        );
        assert_eq!(value.as_object().map(|o| o.len()), Some(1));
    }
}
