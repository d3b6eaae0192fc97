//! Answers that `generate` writes, and predictions that it reads.

use std::collections::HashMap;
use std::path::Path;

use lengthwise_core::{FinishReason, RequestId, Response};
use serde::Serialize;
use serde_json::json;

use super::FileError;
use super::instructions::InstructionRecord;
use super::records::{Records, SeenIds, id_of};

/// An answer with what was predicted for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// The request's id.
    pub id: RequestId,
    /// The text.
    pub text: String,
    /// Its tokens, the end-of-sequence token counted.
    pub tokens: u32,
    /// Why it ended.
    pub finish: FinishReason,
    /// The length that was predicted; `None` where nothing was.
    pub predicted_max_tokens: Option<u32>,
}

impl Answer {
    /// Joins a response with its prediction.
    pub fn new(response: Response, predicted_max_tokens: Option<u32>) -> Self {
        let Response {
            id,
            text,
            tokens,
            finish,
        } = response;
        Self {
            id,
            text,
            tokens,
            finish,
            predicted_max_tokens,
        }
    }
}

/// In which form an answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnswerFormat {
    /// `{"id", "text", "tokens", "finish", "predicted_max_tokens"}`.
    Plain,
    /// OpenAI's batch output.
    OpenAiBatch,
}

/// An answer as one line of a file: OpenAI's batch output where the request came as such, else our own.
pub fn answer_line(answer: &Answer, request: &InstructionRecord, prompt_tokens: usize) -> String {
    let line = match &request.batch {
        None => serde_json::to_string(answer),
        Some(body) => serde_json::to_string(&json!({
            "id": format!("batch_req_{}", answer.id),
            "custom_id": answer.id,
            "response": {
                "status_code": 200,
                "request_id": answer.id,
                "body": {
                    "id": format!("chatcmpl-{}", answer.id),
                    "object": "chat.completion",
                    "model": body.model,
                    "choices": [{
                        "index": 0,
                        "message": {"role": "assistant", "content": answer.text},
                        "finish_reason": answer.finish,
                    }],
                    "usage": {
                        "prompt_tokens": prompt_tokens,
                        "completion_tokens": answer.tokens,
                        "total_tokens": prompt_tokens + answer.tokens as usize,
                    },
                },
            },
            "error": null,
        })),
    };
    line.expect("plain data is serialisable") + "\n"
}

/// Reads predictions: `{"id", "max_tokens"}` line by line.
///
/// # Errors
/// The file is missing, empty or malformed, or an id was used before.
pub fn read_predictions(path: &Path) -> Result<HashMap<RequestId, u32>, FileError> {
    let records = Records::read(path)?;
    let mut seen = SeenIds::default();
    let mut predictions = HashMap::with_capacity(records.records.len());
    for record in &records.records {
        let id = record
            .value
            .get("id")
            .and_then(id_of)
            .ok_or_else(|| records.bad(record, "there is no \"id\""))?;
        let tokens = record.value.get("max_tokens").and_then(serde_json::Value::as_u64);
        let tokens = tokens.and_then(|n| u32::try_from(n).ok());
        let tokens = tokens.ok_or_else(|| records.bad(record, "\"max_tokens\" is not a number of tokens"))?;
        seen.add(&records, record, &id)?;
        predictions.insert(id, tokens);
    }
    Ok(predictions)
}
