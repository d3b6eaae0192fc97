//! Instruction files: JSONL, Alpaca's array, FastChat's conversations, OpenAI's batch input.

use std::path::Path;

use lengthwise_core::{ChatMessage, Prompt, RequestId};
use serde::Deserialize;
use serde_json::Value;

use super::FileError;
use super::records::{Record, Records, SeenIds, id_of};

/// The body of an OpenAI batch line, as far as it changes the answer.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
pub struct BatchBody {
    /// The model that was asked for; answered under the same name.
    #[serde(default)]
    pub model: String,
    /// The conversation.
    #[serde(default)]
    pub messages: Vec<ChatMessage>,
    /// Cap on the answer.
    #[serde(alias = "max_completion_tokens")]
    pub max_tokens: Option<u32>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Nucleus sampling.
    pub top_p: Option<f32>,
    /// Sampling seed.
    pub seed: Option<u64>,
}

/// One instruction.
#[derive(Debug, Clone, PartialEq)]
pub struct InstructionRecord {
    /// Unique in its file.
    pub id: RequestId,
    /// What is asked.
    pub prompt: Prompt,
    /// Settings of an OpenAI batch line; `None` in the other formats.
    pub batch: Option<BatchBody>,
}

impl InstructionRecord {
    /// The instruction as one text: of a conversation the last turn of the user.
    pub fn instruction(&self) -> &str {
        match &self.prompt {
            Prompt::Instruction(text) => text,
            Prompt::Chat(messages) => messages
                .iter()
                .rev()
                .find(|m| m.role == "user")
                .map_or("", |m| m.content.as_str()),
        }
    }
}

/// Reads instructions in any of the formats, told apart record by record.
///
/// # Errors
/// The file is missing, empty or malformed; a record has no instruction, or an id that was used before.
pub fn read_instructions(path: &Path) -> Result<Vec<InstructionRecord>, FileError> {
    let records = Records::read(path)?;
    let mut seen = SeenIds::default();
    let mut instructions = Vec::with_capacity(records.records.len());
    for record in &records.records {
        let instruction = parse(record).map_err(|reason| records.bad(record, reason))?;
        if instruction.prompt.is_blank() {
            return Err(records.bad(record, "the instruction is empty"));
        }
        seen.add(&records, record, &instruction.id)?;
        instructions.push(instruction);
    }
    Ok(instructions)
}

fn parse(record: &Record) -> Result<InstructionRecord, String> {
    let value = &record.value;
    if value.get("custom_id").is_some() {
        return parse_batch(value);
    }
    // Alpaca's array has no ids: the place in it is the id, as in the published lengths.
    let id = match value.get("id") {
        Some(id) => id_of(id).ok_or("id must be a text or a number")?,
        None => record.index.to_string().into(),
    };
    let prompt = if let Some(turns) = value.get("conversations") {
        Prompt::Chat(conversation(turns)?)
    } else if let Some(messages) = value.get("messages") {
        let messages: Vec<ChatMessage> =
            serde_json::from_value(messages.clone()).map_err(|err| format!("messages: {err}"))?;
        Prompt::Chat(before_the_answer(messages))
    } else {
        let text = value.get("instruction").ok_or("there is no \"instruction\"")?;
        let text = text.as_str().ok_or("\"instruction\" is not a text")?;
        match value
            .get("input")
            .and_then(Value::as_str)
            .filter(|i| !i.trim().is_empty())
        {
            Some(input) => Prompt::Instruction(format!("{text}\n{input}")),
            None => Prompt::Instruction(text.to_owned()),
        }
    };
    Ok(InstructionRecord {
        id,
        prompt,
        batch: None,
    })
}

fn parse_batch(value: &Value) -> Result<InstructionRecord, String> {
    let id = id_of(&value["custom_id"]).ok_or("custom_id must be a text")?;
    let url = value["url"].as_str().unwrap_or_default();
    if !url.ends_with("/chat/completions") {
        return Err(format!("url is \"{url}\", only /v1/chat/completions is answered"));
    }
    let body: BatchBody = serde_json::from_value(value["body"].clone()).map_err(|err| format!("body: {err}"))?;
    Ok(InstructionRecord {
        id,
        prompt: Prompt::Chat(body.messages.clone()),
        batch: Some(body),
    })
}

/// FastChat's turns, up to the last one of the model.
fn conversation(turns: &Value) -> Result<Vec<ChatMessage>, String> {
    let turns = turns.as_array().ok_or("\"conversations\" is not an array")?;
    let message = |turn: &Value| {
        let role = match turn["from"].as_str() {
            Some("human" | "user") => "user",
            Some("gpt" | "assistant") => "assistant",
            Some("system") => "system",
            other => return Err(format!("a turn is from {other:?}, not from human or gpt")),
        };
        let content = turn["value"].as_str().ok_or("a turn has no \"value\"")?.to_owned();
        Ok(ChatMessage {
            role: role.to_owned(),
            content,
        })
    };
    Ok(before_the_answer(
        turns.iter().map(message).collect::<Result<_, String>>()?,
    ))
}

fn before_the_answer(mut messages: Vec<ChatMessage>) -> Vec<ChatMessage> {
    while messages.last().is_some_and(|m| m.role == "assistant") {
        messages.pop();
    }
    messages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<InstructionRecord>, String> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("in.jsonl");
        std::fs::write(&path, text).expect("written");
        read_instructions(&path).map_err(|err| err.to_string())
    }

    #[test]
    fn every_format_is_read() {
        let jsonl =
            "{\"id\": 7, \"instruction\": \"a\", \"input\": \"b\"}\n\n{\"id\": \"x\", \"instruction\": \"c\"}\n";
        let got = read(jsonl).expect("JSONL");
        assert_eq!((got[0].id.as_str(), got[0].instruction()), ("7", "a\nb"));
        let got = read(r#"[{"instruction": "a", "input": "", "output": "z"}]"#).expect("Alpaca");
        assert_eq!((got[0].id.as_str(), got[0].instruction()), ("0", "a"));
        let chat =
            r#"[{"id": "c", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}]"#;
        let got = read(chat).expect("FastChat");
        assert_eq!(got[0].prompt, Prompt::Chat(vec![ChatMessage::user("q")]));
        let batch = r#"{"custom_id": "b", "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": "q"}], "max_tokens": 9}}"#;
        let got = read(&batch.replace('\n', " ")).expect("OpenAI batch");
        assert_eq!(got[0].batch.as_ref().and_then(|b| b.max_tokens), Some(9));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let good = "{\"id\": \"a\", \"instruction\": \"x\"}\n";
        let cases = [
            (String::new(), "is empty"),
            (format!("{good}{{\"id\": "), "line 2: malformed JSON"),
            (format!("{good}{good}"), "line 2: id \"a\" was already used in line 1"),
            (
                format!("{good}{{\"id\": \"b\"}}"),
                "line 2: there is no \"instruction\"",
            ),
            (
                format!("{good}{{\"id\": \"b\", \"instruction\": \" \"}}"),
                "line 2: the instruction is empty",
            ),
        ];
        for (text, want) in cases {
            let err = read(&text).expect_err("malformed");
            assert!(err.contains(want), "{err}, want {want}");
        }
        let err = read_instructions(Path::new("/nowhere/in.jsonl"))
            .expect_err("missing")
            .to_string();
        assert!(err.contains("/nowhere/in.jsonl"), "{err}");
    }
}
