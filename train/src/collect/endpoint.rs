//! Any OpenAI-compatible server as a decoder.

mod exchange;
#[cfg(test)]
mod tests;

use std::sync::{Condvar, Mutex, PoisonError, mpsc};
use std::time::Duration;

use lengthwise_core::{DecodeError, Decoder, Refusal, Request, Response};
use ureq::Agent;

use exchange::Failure;

/// Where requests go and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointConfig {
    /// Base address, with or without `/v1`, or the whole address up to `/chat/completions`.
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
    /// Eight requests at once, six tries, three minutes each.
    pub fn new(url: impl Into<String>, model: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            model: model.into(),
            api_key: None,
            concurrency: 8,
            max_attempts: 6,
            timeout: Duration::from_secs(180),
        }
    }

    fn completions_url(&self) -> String {
        let base = self.url.trim_end_matches('/');
        if base.ends_with("/chat/completions") {
            return base.to_owned();
        }
        format!("{}/v1/chat/completions", base.strip_suffix("/v1").unwrap_or(base))
    }
}

/// First wait after a failure; doubled after each further one.
const FIRST_BACKOFF: Duration = Duration::from_millis(500);
/// Longest wait between two tries that we choose ourselves.
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);
/// Longest wait that a server may ask for.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(600);
/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// So many refusals end a call, so that the caller hears of them before all requests were sent.
const REFUSALS_TOLD: usize = 100;

/// What came of a request.
enum Answer {
    Response(Response),
    Refusal(Refusal),
}

/// Answers through an OpenAI-compatible server. The length of an answer is the server's `usage.completion_tokens`.
#[derive(Debug)]
pub struct EndpointDecoder {
    config: EndpointConfig,
    url: String,
    agent: Agent,
}

impl EndpointDecoder {
    /// Nothing is sent yet.
    pub fn new(config: EndpointConfig) -> Self {
        let agent = Agent::config_builder()
            .timeout_global(Some(config.timeout))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .max_idle_connections_per_host(config.concurrency.max(1))
            .http_status_as_error(false)
            .build();
        Self {
            url: config.completions_url(),
            agent: agent.into(),
            config,
        }
    }

    /// Tries until there is an answer or no hope; `None` where the run was stopped between two tries.
    fn answer(&self, request: &Request, work: &Work) -> Option<Result<Answer, DecodeError>> {
        let mut backoff = FIRST_BACKOFF;
        for attempt in 1.. {
            let (reason, asked) = match self.attempt(request) {
                Ok(response) => return Some(Ok(Answer::Response(response))),
                Err(Failure::Final(reason)) => return Some(Err(self.failed(request, reason))),
                Err(Failure::Refused(reason)) => {
                    let id = request.id.clone();
                    return Some(Ok(Answer::Refusal(Refusal { id, reason })));
                }
                Err(Failure::TooLong { got, max }) => {
                    let id = request.id.clone();
                    return Some(Err(DecodeError::PromptTooLong { id, got, max }));
                }
                Err(Failure::Passing { reason, retry_after }) => (reason, retry_after),
            };
            if attempt >= self.config.max_attempts {
                let reason = format!("{reason} (gave up after {attempt} tries)");
                return Some(Err(self.failed(request, reason)));
            }
            // Half of the wait is chance, so that the requests do not all come back at once.
            let chosen = backoff.mul_f64(rand::random_range(0.5..1.0));
            let wait = asked.map_or(chosen, |asked| asked.min(LONGEST_RETRY_AFTER));
            tracing::warn!(
                "request {}: {}: {reason}; trying again in {:.1} s",
                request.id,
                self.url,
                wait.as_secs_f64()
            );
            if work.stopped_within(wait) {
                return None;
            }
            backoff = (backoff * 2).min(LONGEST_BACKOFF);
        }
        None
    }

    /// Hands responses over as they come; a failure for good is what all ends with, else the refusals are.
    fn receive(
        &self,
        answers: mpsc::Receiver<Result<Answer, DecodeError>>,
        work: &Work,
        on_response: &mut dyn FnMut(Response) -> Result<(), DecodeError>,
    ) -> Result<(), DecodeError> {
        let (mut outcome, mut refusals) = (Ok(()), Vec::new());
        for answer in answers {
            match answer {
                Ok(Answer::Response(response)) => {
                    if let Err(err) = on_response(response) {
                        work.stop();
                        return Err(err);
                    }
                }
                Ok(Answer::Refusal(refusal)) => {
                    refusals.push(refusal);
                    if refusals.len() >= REFUSALS_TOLD {
                        work.stop();
                    }
                }
                Err(err) => outcome = outcome.and(Err(err)),
            }
        }
        match refusals.is_empty() {
            true => outcome,
            false => outcome.and(Err(DecodeError::Refused {
                endpoint: self.url.clone(),
                refusals,
            })),
        }
    }

    fn failed(&self, request: &Request, reason: String) -> DecodeError {
        DecodeError::Endpoint {
            id: request.id.clone(),
            endpoint: self.url.clone(),
            reason,
        }
    }
}

/// The requests that wait for a thread.
struct Work {
    /// `None` once the run is stopped.
    waiting: Mutex<Option<std::vec::IntoIter<Request>>>,
    stop: Condvar,
}

impl Work {
    fn next(&self) -> Option<Request> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.as_mut()?.next()
    }

    /// Nobody takes another request or waits for another try; tries under way end by themselves.
    fn stop(&self) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.stop.notify_all();
    }

    /// Waits; true as soon as the run is stopped.
    fn stopped_within(&self, wait: Duration) -> bool {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let wait = self.stop.wait_timeout_while(waiting, wait, |waiting| waiting.is_some());
        wait.unwrap_or_else(PoisonError::into_inner).0.is_none()
    }
}

impl Decoder for EndpointDecoder {
    /// A request that fails for good stops the run; what other threads are being answered is handed over first. Refused
    /// requests are told at the end, or once there are many.
    fn decode(
        &mut self,
        requests: Vec<Request>,
        on_response: &mut dyn FnMut(Response) -> Result<(), DecodeError>,
    ) -> Result<(), DecodeError> {
        let this: &Self = self;
        let threads = this.config.concurrency.clamp(1, requests.len().max(1));
        let work = &Work {
            waiting: Mutex::new(Some(requests.into_iter())),
            stop: Condvar::new(),
        };
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel();
            for _ in 0..threads {
                let sender = sender.clone();
                scope.spawn(move || {
                    while let Some(answer) = work.next().and_then(|request| this.answer(&request, work)) {
                        if answer.is_err() {
                            // Here and not where it is received: this thread would take another request before that.
                            work.stop();
                        }
                        if sender.send(answer).is_err() {
                            break;
                        }
                    }
                });
            }
            drop(sender);
            this.receive(receiver, work, on_response)
        })
    }
}
