//! Lines of OpenAI's batch input, as far as they change the answer.

use lengthwise_core::{ChatMessage, Prompt, SamplingParams};
use serde::Deserialize;
use serde_json::Value;

use super::instructions::InstructionRecord;
use super::records::id_of;

/// The body of an OpenAI batch line, as far as it changes the answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BatchBody {
    /// The model that was asked for; answered under the same name.
    pub model: String,
    /// The conversation.
    pub messages: Vec<ChatMessage>,
    /// Cap on the answer: `max_completion_tokens`, or `max_tokens`, its older name.
    pub max_tokens: Option<u32>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Nucleus sampling.
    pub top_p: Option<f32>,
    /// Sampling seed.
    pub seed: Option<u64>,
}

/// The body as it stands in the file.
#[derive(Deserialize)]
struct RawBody {
    model: Option<String>,
    #[serde(default)]
    messages: Vec<Value>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    seed: Option<i64>,
    n: Option<u32>,
}

/// Fields of a body that would change the answer and are not followed, unless they ask for nothing.
const NOT_FOLLOWED: [&str; 12] = [
    "stop",
    "tools",
    "tool_choice",
    "functions",
    "response_format",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "frequency_penalty",
    "presence_penalty",
    "stream",
    "modalities",
];

/// Reads a line of the batch format: `custom_id`, `method`, `url` and `body`.
pub(super) fn parse_batch(value: &Value) -> Result<InstructionRecord, String> {
    let id = id_of(&value["custom_id"]).ok_or("\"custom_id\" must be a text")?;
    if let Some(method) = value["method"].as_str().filter(|m| *m != "POST") {
        return Err(format!("method is \"{method}\", only POST is answered"));
    }
    let url = value["url"].as_str().unwrap_or_default();
    if !url.ends_with("/chat/completions") {
        return Err(format!("url is \"{url}\", only /v1/chat/completions is answered"));
    }
    let body = value.get("body").ok_or("there is no \"body\"")?;
    let body = parse_body(body).map_err(|reason| format!("body: {reason}"))?;
    Ok(InstructionRecord {
        id,
        prompt: Prompt::chat(body.messages.clone()).map_err(|err| format!("body: {err}"))?,
        batch: Some(body),
    })
}

fn parse_body(value: &Value) -> Result<BatchBody, String> {
    let raw = RawBody::deserialize(value).map_err(|err| err.to_string())?;
    if let Some(field) = NOT_FOLLOWED.into_iter().find(|field| asks(field, &value[*field])) {
        return Err(format!(
            "{field} is not followed: remove it to have the request answered without"
        ));
    }
    let max_tokens = raw.max_completion_tokens.or(raw.max_tokens);
    if max_tokens == Some(0) {
        return Err("max_tokens is 0, it must be at least 1".to_owned());
    }
    if let Some(temperature) = raw.temperature.filter(|t| !t.is_finite() || *t < 0.0) {
        return Err(format!("temperature is {temperature}, it must be 0 or more"));
    }
    if let Some(top_p) = raw.top_p.filter(|p| !SamplingParams::allows_top_p(*p)) {
        return Err(format!("top_p is {top_p}, it must be {}", SamplingParams::TOP_P_RANGE));
    }
    if let Some(n) = raw.n.filter(|n| *n != 1) {
        return Err(format!("n is {n}, one answer per request is given"));
    }
    Ok(BatchBody {
        model: raw.model.unwrap_or_default(),
        messages: raw.messages.iter().map(message).collect::<Result<_, _>>()?,
        max_tokens,
        temperature: raw.temperature,
        top_p: raw.top_p,
        // OpenAI's seeds are signed; the bits are what counts.
        seed: raw.seed.map(|seed| seed as u64),
    })
}

/// Whether a field's value asks for anything but what is done anyway.
fn asks(field: &str, value: &Value) -> bool {
    match (field, value) {
        (_, Value::Null | Value::Bool(false)) => false,
        (_, Value::Number(number)) => number.as_f64() != Some(0.0),
        // Without tools, which are refused, both are the same.
        ("tool_choice", Value::String(choice)) => !matches!(choice.as_str(), "none" | "auto"),
        ("modalities", Value::Array(kinds)) => kinds.iter().any(|kind| kind != "text"),
        ("response_format", Value::Object(format)) => format.get("type").is_none_or(|kind| kind != "text"),
        (_, Value::Array(items)) => !items.is_empty(),
        (_, Value::Object(fields)) => !fields.is_empty(),
        (_, Value::Bool(true) | Value::String(_)) => true,
    }
}

/// A turn in OpenAI's form; its content is a text or a list of parts, of which only texts can be answered.
pub(super) fn message(value: &Value) -> Result<ChatMessage, String> {
    let role = match value["role"].as_str() {
        Some("developer") => "system",
        Some(role) => role,
        None => return Err("a message has no \"role\"".to_owned()),
    };
    let content = match &value["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().map(text_of).collect::<Result<String, _>>()?,
        _ => return Err(format!("a message from {role} has no \"content\"")),
    };
    ChatMessage::new(role, content).map_err(|err| err.to_string())
}

fn text_of(part: &Value) -> Result<&str, String> {
    match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text),
        (kind, _) => Err(format!(
            "a message has a part of type \"{}\", only text is answered",
            kind.unwrap_or_default()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(body: Value) -> Result<BatchBody, String> {
        let line = json!({"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": body});
        parse_batch(&line).map(|record| record.batch.expect("a batch line"))
    }

    #[test]
    fn settings_of_the_body_are_kept() {
        let body = parse(
            json!({"model": "m", "max_tokens": 9, "max_completion_tokens": 7, "temperature": 0.5,
            "top_p": 0.9, "seed": -1, "messages": [
                {"role": "developer", "content": "be short"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}),
        );
        let system = ChatMessage {
            role: "system".to_owned(),
            content: "be short".to_owned(),
        };
        let want = BatchBody {
            model: "m".to_owned(),
            messages: vec![system, ChatMessage::user("ab")],
            max_tokens: Some(7),
            temperature: Some(0.5),
            top_p: Some(0.9),
            seed: Some(u64::MAX),
        };
        assert_eq!(body, Ok(want));
    }

    #[test]
    fn fields_that_ask_for_nothing_are_no_matter() {
        let body = json!({"messages": [{"role": "user", "content": "a"}], "stop": null, "tools": [], "n": 1,
            "tool_choice": "auto", "stream": false, "response_format": {"type": "text"},
            "modalities": ["text"], "presence_penalty": 0});
        assert!(parse(body).is_ok());
    }

    #[test]
    fn what_cannot_be_answered_is_refused() {
        let image = json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]});
        let cases = [
            (image, "part of type \"image_url\""),
            (
                json!({"messages": [{"role": "tool", "content": "4"}]}),
                "the role \"tool\", it must be system, user or assistant",
            ),
            (
                json!({"messages": [{"role": "system", "content": "be brief"}]}),
                "no message of the user",
            ),
            (json!({"n": 2}), "n is 2"),
            (json!({"temperature": -1.0}), "temperature is -1"),
            (json!({"top_p": 0.0}), "top_p is 0"),
            (json!({"max_tokens": 0}), "max_tokens is 0"),
            (json!({"stop": ["3"]}), "stop is not followed"),
            (json!({"stop": ["text"]}), "stop is not followed"),
            (json!({"stop": "none"}), "stop is not followed"),
            (json!({"tool_choice": "required"}), "tool_choice is not followed"),
            (json!({"presence_penalty": 0.5}), "presence_penalty is not followed"),
            (
                json!({"response_format": {"type": "json_object"}}),
                "response_format is not followed",
            ),
            (json!({"max_tokens": "many"}), "body: invalid type"),
        ];
        for (body, want) in cases {
            let err = parse(body).expect_err("not answerable");
            assert!(err.contains(want), "{err}, want {want}");
        }
        let other = json!({"custom_id": "b", "method": "POST", "url": "/v1/embeddings", "body": {}});
        assert!(parse_batch(&other).expect_err("embeddings").contains("/v1/embeddings"));
    }
}
