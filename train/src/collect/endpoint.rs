//! Any OpenAI-compatible server as a decoder.

use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lengthwise_core::{DecodeError, Decoder, FinishReason, Request, Response};
use serde_json::{Value, json};
use ureq::Agent;
use ureq::http::StatusCode;

/// Where requests go and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointConfig {
    /// Base address, with or without `/v1`.
    pub url: String,
    /// The model's name there.
    pub model: String,
    /// Sent as a bearer token.
    pub api_key: Option<String>,
    /// Requests under way at once.
    pub concurrency: usize,
    /// Tries of one request before the run fails.
    pub max_attempts: u32,
    /// Longest wait for one answer.
    pub timeout: Duration,
}

impl EndpointConfig {
    /// Eight requests at once, six tries, ten minutes each.
    pub fn new(url: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            model: model.into(),
            api_key: None,
            concurrency: 8,
            max_attempts: 6,
            timeout: Duration::from_secs(600),
        }
    }
}

/// First wait after a failure; doubled after each further one.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
/// Longest wait between two tries.
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);

/// Answers through an OpenAI-compatible server.
pub struct EndpointDecoder {
    config: EndpointConfig,
    url: String,
    agent: Agent,
}

/// Why a try gave no answer.
enum Failure {
    /// Another try may succeed; the server may have said when.
    Passing(String, Option<Duration>),
    /// It will not.
    Final(String),
}

impl EndpointDecoder {
    /// Nothing is sent yet.
    pub fn new(config: EndpointConfig) -> Self {
        let base = config.url.trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base);
        let agent = Agent::config_builder()
            .timeout_global(Some(config.timeout))
            .http_status_as_error(false)
            .build();
        Self {
            url: format!("{base}/v1/chat/completions"),
            agent: agent.into(),
            config,
        }
    }

    fn answer(&self, request: &Request) -> Result<Response, DecodeError> {
        let mut backoff = FIRST_BACKOFF;
        for attempt in 1.. {
            let (reason, wait) = match self.attempt(request) {
                Ok(response) => return Ok(response),
                Err(Failure::Final(reason)) => return Err(self.failed(reason)),
                Err(Failure::Passing(reason, wait)) => (reason, wait),
            };
            if attempt >= self.config.max_attempts {
                return Err(self.failed(format!("{reason} (gave up after {attempt} tries)")));
            }
            tracing::debug!("{}: {reason}; trying again", self.url);
            // Half of the wait is spread over the requests, so that they do not all come back at once.
            let spread = backoff.mul_f64(0.5 + (request.sampling.seed % 512) as f64 / 1024.0);
            std::thread::sleep(wait.unwrap_or(spread).min(LONGEST_BACKOFF));
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
        unreachable!("the loop ends by returning")
    }

    fn failed(&self, reason: String) -> DecodeError {
        DecodeError::Endpoint {
            endpoint: self.url.clone(),
            reason,
        }
    }

    fn attempt(&self, request: &Request) -> Result<Response, Failure> {
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
        let mut reply = call
            .send_json(&body)
            .map_err(|err| Failure::Passing(err.to_string(), None))?;
        let status = reply.status();
        let header = reply
            .headers()
            .get("retry-after")
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.parse().ok());
        let text = reply
            .body_mut()
            .read_to_string()
            .map_err(|err| Failure::Passing(err.to_string(), None))?;
        if status.is_success() {
            return parse(request, &text);
        }
        let message = serde_json::from_str::<Value>(&text).ok();
        let message = message
            .as_ref()
            .and_then(|v| v.pointer("/error/message")?.as_str())
            .unwrap_or(text.trim());
        let message: String = message.chars().take(300).collect();
        let reason = format!("the server answered {status}: {message}");
        match status {
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT => {
                Err(Failure::Passing(reason, header.map(Duration::from_secs)))
            }
            status if status.is_server_error() => Err(Failure::Passing(reason, header.map(Duration::from_secs))),
            _ => Err(Failure::Final(reason)),
        }
    }
}

fn parse(request: &Request, text: &str) -> Result<Response, Failure> {
    let body: Value =
        serde_json::from_str(text).map_err(|err| Failure::Passing(format!("the answer is no JSON: {err}"), None))?;
    let tokens = body.pointer("/usage/completion_tokens").and_then(Value::as_u64);
    let tokens = tokens.and_then(|t| u32::try_from(t).ok());
    let missing = || Failure::Final("the answer has no usage.completion_tokens: lengths cannot be taken".to_owned());
    let choice = &body["choices"][0];
    Ok(Response {
        id: request.id.clone(),
        text: choice["message"]["content"].as_str().unwrap_or_default().to_owned(),
        tokens: tokens.ok_or_else(missing)?,
        finish: match choice["finish_reason"].as_str() {
            Some("length") => FinishReason::Length,
            _ => FinishReason::Stop,
        },
    })
}

impl Decoder for EndpointDecoder {
    fn decode(
        &mut self,
        requests: Vec<Request>,
        on_response: &mut dyn FnMut(Response) -> Result<(), DecodeError>,
    ) -> Result<(), DecodeError> {
        let this: &Self = self;
        let waiting = Arc::new(Mutex::new(requests.into_iter()));
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::sync_channel(this.config.concurrency);
            for _ in 0..this.config.concurrency.max(1) {
                let (waiting, sender) = (waiting.clone(), sender.clone());
                scope.spawn(move || {
                    // The guard is dropped before the request is sent.
                    let next = || waiting.lock().map_or(None, |mut requests| requests.next());
                    while let Some(request) = next() {
                        if sender.send(this.answer(&request)).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            for response in &receiver {
                let result = response.and_then(&mut *on_response);
                if result.is_err() {
                    // Nobody takes another request; those under way end by themselves.
                    if let Ok(mut requests) = waiting.lock() {
                        requests.by_ref().for_each(drop);
                    }
                    drop(receiver);
                    return result;
                }
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lengthwise_core::{Prompt, SamplingParams};
    use std::collections::BTreeMap;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Reads one HTTP request and returns its JSON body.
    fn read_request(stream: &TcpStream) -> Option<Value> {
        let mut reader = BufReader::new(stream);
        let mut length = 0;
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok()?;
            if line.trim().is_empty() {
                break;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().ok()?;
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).ok()?;
        serde_json::from_slice(&body).ok()
    }

    /// A server whose `n`-th reply is `reply(n, request body)`: status line with headers, and body.
    fn server(reply: impl Fn(usize, Value) -> (String, String) + Send + Sync + 'static) -> (String, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let count = Arc::new(AtomicUsize::new(0));
        let (served, reply) = (count.clone(), Arc::new(reply));
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let (served, reply) = (served.clone(), reply.clone());
                std::thread::spawn(move || {
                    let Some(body) = read_request(&stream) else { return };
                    let (head, body) = reply(served.fetch_add(1, Ordering::SeqCst), body);
                    let length = body.len();
                    let _ = write!(
                        stream,
                        "HTTP/1.1 {head}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
                    );
                });
            }
        });
        (url, count)
    }

    fn ok(tokens: u64, finish: &str) -> (String, String) {
        let body = json!({"choices": [{"message": {"content": "hi"}, "finish_reason": finish}],
            "usage": {"completion_tokens": tokens}});
        ("200 OK".to_owned(), body.to_string())
    }

    fn requests(n: usize) -> Vec<Request> {
        let request = |i: usize| Request {
            id: i.to_string().into(),
            prompt: Prompt::Instruction(format!("{i}")),
            max_new_tokens: 50,
            sampling: SamplingParams::GREEDY,
        };
        (0..n).map(request).collect()
    }

    fn run(url: &str, n: usize) -> Result<BTreeMap<String, u32>, String> {
        let mut lengths = BTreeMap::new();
        let mut decoder = EndpointDecoder::new(EndpointConfig {
            max_attempts: 3,
            ..EndpointConfig::new(url, "m")
        });
        let result = decoder.decode(requests(n), &mut |r| {
            lengths.insert(r.id.to_string(), r.tokens);
            Ok(())
        });
        result.map(|()| lengths).map_err(|err| err.to_string())
    }

    #[test]
    fn every_answer_comes_back_under_its_own_id() {
        let tokens = |body: &Value| body["messages"][0]["content"].as_str()?.parse::<u64>().ok();
        let (url, _) = server(move |_, body| ok(tokens(&body).expect("the request's number") + 1, "stop"));
        let got = run(&format!("{url}/v1/"), 40).expect("answered");
        assert_eq!(got.len(), 40);
        assert!(
            got.iter()
                .all(|(id, tokens)| id.parse::<u32>().expect("a number") + 1 == *tokens)
        );
    }

    #[test]
    fn passing_failures_are_tried_again() {
        let (url, count) = server(|n, _| match n {
            0 => ("503 Busy".to_owned(), String::new()),
            1 => ("429 Slow down\r\nretry-after: 0".to_owned(), String::new()),
            _ => ok(9, "length"),
        });
        assert_eq!(run(&url, 1).expect("answered at last")["0"], 9);
        assert_eq!(count.load(Ordering::SeqCst), 3);
    }

    #[test]
    fn a_refusal_is_final_and_carries_the_servers_words() {
        let refusal = json!({"error": {"message": "no such model"}}).to_string();
        let (url, count) = server(move |_, _| ("404 Not Found".to_owned(), refusal.clone()));
        let err = run(&url, 1).expect_err("refused");
        assert!(err.contains("no such model") && err.contains("404"), "{err}");
        assert_eq!(count.load(Ordering::SeqCst), 1);
        let (url, _) = server(|_, _| ("200 OK".to_owned(), "{\"choices\": []}".to_owned()));
        assert!(run(&url, 1).expect_err("no usage").contains("usage.completion_tokens"));
    }
}
