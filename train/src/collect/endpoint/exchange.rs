//! One request to the server and what its reply means.

use std::time::Duration;

use lengthwise_core::{FinishReason, Request, Response};
use serde_json::{Value, json};
use ureq::http::StatusCode;

use super::EndpointDecoder;

/// Most characters of a server's words in an error.
const LONGEST_MESSAGE: usize = 300;

/// Why a try gave no answer.
#[derive(Debug, PartialEq)]
pub(super) enum Failure {
    /// Another try may succeed.
    Passing {
        reason: String,
        /// How long to wait, where the server said so.
        retry_after: Option<Duration>,
    },
    /// No other try will succeed, nor another request.
    Final(String),
    /// No other try of this request will succeed; others may.
    Refused(String),
    /// The prompt leaves no room for the answer in the model's context.
    TooLong { got: usize, max: usize },
}

impl Failure {
    fn passing(reason: impl ToString) -> Self {
        Self::Passing {
            reason: reason.to_string(),
            retry_after: None,
        }
    }
}

impl EndpointDecoder {
    /// Sends a request once.
    pub(super) fn attempt(&self, request: &Request) -> Result<Response, Failure> {
        let body = json!({
            "model": self.config.model,
            "messages": request.prompt.messages(),
            "max_tokens": request.max_new_tokens,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            // JSON numbers above 2^53 are not safe with every server.
            "seed": request.sampling.seed % (1 << 31),
        });
        let mut call = self.agent.post(&self.url);
        if let Some(key) = &self.config.api_key {
            call = call.header("Authorization", format!("Bearer {key}"));
        }
        let mut reply = call.send_json(&body).map_err(|err| self.not_sent(err))?;
        let status = reply.status();
        let header = reply.headers().get("retry-after").and_then(|v| v.to_str().ok());
        let retry_after = header.and_then(seconds);
        let text = reply.body_mut().read_to_string().map_err(|err| self.not_sent(err))?;
        if status.is_success() {
            return answer(request, &text);
        }
        Err(refusal(request, status, retry_after, &text))
    }

    /// What ureq could not send or read: a fault of the address stays, one of the connection may pass.
    fn not_sent(&self, err: ureq::Error) -> Failure {
        use ureq::{Error, Timeout};
        match err {
            Error::BadUri(_) | Error::Http(_) | Error::InvalidProxyUrl | Error::TooManyRedirects => {
                Failure::Final(format!("the address cannot be used: {err}"))
            }
            Error::Timeout(Timeout::Connect | Timeout::Resolve) => {
                Failure::passing("the server cannot be reached in time")
            }
            Error::Timeout(_) => {
                let seconds = self.config.timeout.as_secs_f64();
                Failure::passing(format!("no answer within {seconds} s"))
            }
            _ => Failure::passing(err),
        }
    }
}

/// Seconds of a `Retry-After`. Its other form, a date, leaves the wait to us.
fn seconds(header: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(header.trim().parse().ok()?).ok()
}

/// The server answered, and not with success.
fn refusal(request: &Request, status: StatusCode, retry_after: Option<Duration>, text: &str) -> Failure {
    let body = serde_json::from_str::<Value>(text).unwrap_or_default();
    // OpenAI's form; that of vLLM before 0.10; FastAPI's.
    let places = ["/error/message", "/message", "/detail"];
    let said = places.iter().find_map(|place| body.pointer(place)?.as_str());
    let said = said.unwrap_or(text.trim());
    if status.is_client_error()
        && let Some(too_long) = too_long(said, request.max_new_tokens as usize)
    {
        return too_long;
    }
    let words: Vec<&str> = said.split_whitespace().collect();
    let words: String = words.join(" ").chars().take(LONGEST_MESSAGE).collect();
    let reason = match words.is_empty() {
        true => format!("the server answered {status}"),
        false => format!("the server answered {status}: {words}"),
    };
    let passes = status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED;
    match status {
        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => Failure::Passing { reason, retry_after },
        _ if passes => Failure::Passing { reason, retry_after },
        // The key, the account, the address or the model's name: every request would fare like this one.
        StatusCode::UNAUTHORIZED | StatusCode::PAYMENT_REQUIRED | StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => {
            Failure::Final(reason)
        }
        _ if status.is_client_error() => Failure::Refused(reason),
        _ => Failure::Final(reason),
    }
}

/// Reads "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4500 in the
/// messages, 500 in the completion)." and its siblings ("your messages resulted in 4500 tokens", "your request has
/// 4500 input tokens") of OpenAI and vLLM. `None` where it is no such message or the prompt is not to blame.
fn too_long(said: &str, max_new_tokens: usize) -> Option<Failure> {
    let after = |words: &str| number(said.split_once(words)?.1.split_whitespace().next()?);
    let before = |words: &str| number(said.split_once(words)?.0.split_whitespace().next_back()?);
    let context = after("maximum context length is ")?;
    let got = before(" in the messages")
        .or_else(|| before(" input tokens"))
        .or_else(|| after("resulted in "))?;
    let max = context.checked_sub(max_new_tokens).filter(|max| *max > 0)?;
    (got > max).then_some(Failure::TooLong { got, max })
}

fn number(word: &str) -> Option<usize> {
    word.trim_matches(|c: char| !c.is_ascii_digit()).parse().ok()
}

/// The server answered with success.
fn answer(request: &Request, text: &str) -> Result<Response, Failure> {
    let body: Value =
        serde_json::from_str(text).map_err(|err| Failure::passing(format!("the answer is no JSON: {err}")))?;
    let choice = body
        .pointer("/choices/0")
        .ok_or_else(|| Failure::Final("the answer has no choices: it is no chat completion".to_owned()))?;
    let tokens = body.pointer("/usage/completion_tokens").and_then(Value::as_u64);
    let tokens = tokens.and_then(|t| u32::try_from(t).ok()).ok_or_else(|| {
        Failure::Final("the answer has no usage.completion_tokens: lengths cannot be taken".to_owned())
    })?;
    let finish = match choice["finish_reason"].as_str() {
        Some("length") => FinishReason::Length,
        Some("content_filter") => {
            tracing::warn!("request {}: the server's filter cut the answer short", request.id);
            FinishReason::Stop
        }
        Some(_) => FinishReason::Stop,
        // Some servers leave it out.
        None if tokens >= request.max_new_tokens => FinishReason::Length,
        None => FinishReason::Stop,
    };
    Ok(Response {
        id: request.id.clone(),
        text: choice["message"]["content"].as_str().unwrap_or_default().to_owned(),
        tokens,
        finish,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_that_does_not_fit_is_told_from_other_refusals() {
        let openai = "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens \
            (4500 in the messages, 500 in the completion). Please reduce the length of the messages or completion.";
        assert_eq!(too_long(openai, 500), Some(Failure::TooLong { got: 4500, max: 3596 }));
        let newer =
            "This model's maximum context length is 8192 tokens. However, your messages resulted in 9000 tokens.";
        assert_eq!(too_long(newer, 192), Some(Failure::TooLong { got: 9000, max: 8000 }));
        // A cap above the context is the caller's fault whatever the prompt.
        let cap = "'max_tokens' or 'max_completion_tokens' is too large: 5000. This model's maximum context length is \
            4096 tokens and your request has 100 input tokens (5000 > 4096 - 100).";
        assert_eq!(too_long(cap, 5000), None);
        assert_eq!(too_long(cap, 4000), Some(Failure::TooLong { got: 100, max: 96 }));
        assert_eq!(too_long("no such model", 5), None);
    }

    #[test]
    fn retry_after_is_read_in_seconds() {
        assert_eq!(seconds(" 2"), Some(Duration::from_secs(2)));
        assert_eq!(seconds("0.5"), Some(Duration::from_millis(500)));
        assert_eq!(seconds("-1"), None);
        assert_eq!(seconds("Wed, 21 Oct 2015 07:28:00 GMT"), None);
    }
}
