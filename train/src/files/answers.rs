//! Answers that `generate` writes, and predictions that it reads.

use std::collections::HashMap;
use std::path::Path;

use lengthwise_core::{FinishReason, LengthEstimate, Quantile, RequestId, Response};
use serde::Serialize;
use serde_json::json;

use super::FileError;
use super::instructions::InstructionRecord;
use super::records::{Records, SeenIds, required_id};

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
                    // Clients want the field; the time of day would make two equal runs differ.
                    "created": 0,
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

/// A prediction as one line of a file that [`read_predictions`] reads.
pub fn prediction_line(id: &RequestId, max_tokens: u32) -> String {
    json!({"id": id, "max_tokens": max_tokens}).to_string() + "\n"
}

/// Reads predictions: `{"id", "max_tokens", "quantiles"?}` line by line, the quantiles ascending as
/// `[{"probability", "tokens"}]`.
///
/// # Errors
/// The file is missing, empty or malformed, or an id was used before.
pub fn read_predictions(path: &Path) -> Result<HashMap<RequestId, LengthEstimate>, FileError> {
    let records = Records::read(path)?;
    let mut seen = SeenIds::default();
    let mut predictions = HashMap::with_capacity(records.records.len());
    for record in &records.records {
        let id = required_id(&record.value).map_err(|reason| records.bad(record, reason))?;
        let tokens = record.value.get("max_tokens").and_then(serde_json::Value::as_u64);
        let tokens = tokens.and_then(|n| u32::try_from(n).ok());
        let tokens = tokens.ok_or_else(|| records.bad(record, "\"max_tokens\" is not a number of tokens"))?;
        let quantiles = quantiles(&record.value).map_err(|reason| records.bad(record, reason))?;
        seen.add(&records, record, &id)?;
        let estimate = LengthEstimate {
            quantiles,
            ..LengthEstimate::of(tokens)
        };
        predictions.insert(id, estimate);
    }
    Ok(predictions)
}

/// The quantiles of a record; none where it has none.
fn quantiles(record: &serde_json::Value) -> Result<Vec<Quantile>, &'static str> {
    let Some(value) = record.get("quantiles") else {
        return Ok(Vec::new());
    };
    let quantiles: Vec<Quantile> = serde::Deserialize::deserialize(value)
        .map_err(|_| "\"quantiles\" is not a list of {\"probability\", \"tokens\"}")?;
    let ascend = |q: &[Quantile]| q[0].probability < q[1].probability && q[0].tokens <= q[1].tokens;
    let within = |q: &Quantile| (0.0..=1.0).contains(&q.probability);
    match quantiles.windows(2).all(ascend) && quantiles.iter().all(within) {
        true => Ok(quantiles),
        false => Err("\"quantiles\" do not ascend within 0 and 1"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::BatchBody;
    use lengthwise_core::Prompt;

    fn answer() -> Answer {
        let response = Response {
            id: "a".into(),
            text: "hi".to_owned(),
            tokens: 3,
            finish: FinishReason::Length,
        };
        Answer::new(response, None)
    }

    #[test]
    fn a_batch_request_is_answered_in_its_own_form() {
        let mut request = InstructionRecord {
            id: "a".into(),
            prompt: Prompt::Instruction("x".to_owned()),
            batch: None,
        };
        let plain = answer_line(&answer(), &request, 7);
        assert_eq!(
            plain,
            "{\"id\":\"a\",\"text\":\"hi\",\"tokens\":3,\"finish\":\"length\",\"predicted_max_tokens\":null}\n"
        );
        request.batch = Some(BatchBody {
            model: "m".to_owned(),
            ..BatchBody::default()
        });
        let line = answer_line(&answer(), &request, 7);
        let got: serde_json::Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!((&got["custom_id"], &got["error"]), (&json!("a"), &json!(null)));
        let body = &got["response"]["body"];
        assert_eq!(
            (&got["response"]["status_code"], &body["model"]),
            (&json!(200), &json!("m"))
        );
        assert_eq!(
            body["choices"][0]["message"],
            json!({"role": "assistant", "content": "hi"})
        );
        assert_eq!(body["choices"][0]["finish_reason"], "length");
        assert_eq!(
            body["usage"],
            json!({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10})
        );
    }

    #[test]
    fn predictions_are_read_as_they_were_written() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("predictions.jsonl");
        std::fs::write(
            &path,
            prediction_line(&"a".into(), 150) + "{\"id\": 2, \"max_tokens\": 50}\n",
        )?;
        let got = read_predictions(&path)?;
        let want = [
            ("a".into(), LengthEstimate::of(150)),
            ("2".into(), LengthEstimate::of(50)),
        ];
        assert_eq!(got, HashMap::from(want));
        std::fs::write(&path, "{\"id\": 2, \"max_tokens\": -1}\n")?;
        let err = read_predictions(&path).expect_err("negative").to_string();
        assert!(
            err.contains("line 1: \"max_tokens\" is not a number of tokens"),
            "{err}"
        );
        Ok(())
    }

    #[test]
    fn quantiles_of_a_prediction_are_read_where_they_ascend() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("predictions.jsonl");
        let read = |quantiles: &str| {
            std::fs::write(
                &path,
                format!("{{\"id\": 1, \"max_tokens\": 9, \"quantiles\": {quantiles}}}\n"),
            )?;
            anyhow::Ok(read_predictions(&path)?[&"1".into()].quantiles.clone())
        };
        let got = read("[{\"probability\": 0.5, \"tokens\": 4}, {\"probability\": 0.9, \"tokens\": 4}]")?;
        assert_eq!(
            got.iter().map(|q| (q.probability, q.tokens)).collect::<Vec<_>>(),
            [(0.5, 4), (0.9, 4)]
        );
        for bad in [
            "[{\"probability\": 0.5, \"tokens\": 4}, {\"probability\": 0.5, \"tokens\": 5}]",
            "[{\"probability\": 1.5, \"tokens\": 4}]",
            "[4]",
        ] {
            let err = read(bad).expect_err(bad).to_string();
            assert!(err.contains("line 1: \"quantiles\""), "{err}");
        }
        Ok(())
    }
}
