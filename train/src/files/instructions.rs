//! Instruction files: JSONL, Alpaca's array, FastChat's conversations, OpenAI's batch input.

use std::path::Path;

use lengthwise_core::{ChatMessage, Prompt, RequestId};
use serde_json::Value;

use super::FileError;
use super::batch::{BatchBody, message, parse_batch};
use super::records::{Record, Records, SeenIds, required_id};

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
    /// The whole conversation, where there is more to it than [`InstructionRecord::instruction`]: earlier turns, or a
    /// system message. Else nothing.
    pub fn conversation(&self) -> &[ChatMessage] {
        match &self.prompt {
            Prompt::Chat(messages) if messages.len() > 1 => messages,
            _ => &[],
        }
    }

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
    let id = match (value.get("id"), record.element) {
        // Alpaca's array has no ids: the place in it is the id, as in the published lengths.
        (None, Some(element)) => element.to_string().into(),
        _ => required_id(value)?,
    };
    let prompt = if let Some(turns) = value.get("conversations") {
        chat(conversation(turns)?)?
    } else if let Some(messages) = value.get("messages") {
        let messages = messages.as_array().ok_or("\"messages\" is not an array")?;
        chat(before_the_answer(
            messages.iter().map(message).collect::<Result<_, _>>()?,
        ))?
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

fn chat(messages: Vec<ChatMessage>) -> Result<Prompt, String> {
    Prompt::chat(messages).map_err(|err| err.to_string())
}

/// FastChat's turns, up to the last one of the model.
fn conversation(turns: &Value) -> Result<Vec<ChatMessage>, String> {
    let turns = turns.as_array().ok_or("\"conversations\" is not an array")?;
    let message = |turn: &Value| {
        let role = match turn["from"].as_str() {
            Some("human" | "user") => "user",
            Some("gpt" | "assistant") => "assistant",
            Some("system") => "system",
            Some(other) => return Err(format!("a turn is from \"{other}\", not from human or gpt")),
            None => return Err("a turn has no \"from\"".to_owned()),
        };
        let content = turn["value"].as_str().ok_or("a turn has no \"value\"")?.to_owned();
        ChatMessage::new(role, content).map_err(|err| err.to_string())
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
        assert!(got[0].conversation().is_empty());
        let turn = |who: &str| format!(r#"{{"from": "{who}", "value": "q"}}"#);
        let turns = [turn("human"), turn("gpt"), turn("human")].join(", ");
        let got = read(&format!(r#"[{{"id": "c", "conversations": [{turns}]}}]"#)).expect("two questions");
        assert_eq!(got[0].conversation().len(), 3);
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
            ("{\"instruction\": \"x\"}".to_owned(), "line 1: there is no \"id\""),
            (
                format!("{good}{{\"id\": null, \"instruction\": \"x\"}}"),
                "line 2: \"id\" must be a text or a whole number",
            ),
            (
                "[{\"id\": 1, \"instruction\": \"x\"},\n{\"instruction\": \"y\"}]".to_owned(),
                "line 2 (element 2): id \"1\" was already used in line 1 (element 1)",
            ),
            (
                format!("{good}{{\"id\": \"b\", \"conversations\": [{{\"from\": \"gpt\", \"value\": \"x\"}}]}}"),
                "line 2: the conversation has no message of the user",
            ),
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
