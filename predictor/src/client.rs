//! A predictor elsewhere, and what stands in when it goes away.

use std::time::Duration;

use lengthwise_core::{LengthEstimate, LengthPredictor, PredictError, PredictInput, Prompt, Quantile};
use lengthwise_proto::v1;
use lengthwise_proto::v1::length_predictor_client::LengthPredictorClient;
use lengthwise_proto::v1::predict_request::Input;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

/// Requests in one call.
const BATCH: usize = 64;
/// Longest wait for one call's answers.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Tries of a call while the service is unavailable or overloaded.
const MAX_ATTEMPTS: u32 = 4;
/// Wait after the first failed try; doubled after each further one.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);

/// Asks a predictor service over gRPC.
pub struct RemotePredictor {
    url: String,
    runtime: Runtime,
    client: LengthPredictorClient<Channel>,
}

impl RemotePredictor {
    /// Connects to `http://host:port`.
    ///
    /// # Errors
    /// The address is malformed, or nobody answers there.
    pub fn connect(url: &str) -> Result<Self, PredictError> {
        let failed = |reason: String| PredictError::Remote { endpoint: url.to_owned(), reason };
        let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let endpoint = Endpoint::from_shared(full).map_err(|err| failed(err.to_string()))?;
        let endpoint = endpoint.connect_timeout(Duration::from_secs(5));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|err| failed(err.to_string()))?;
        let channel = runtime.block_on(endpoint.connect()).map_err(|err| failed(innermost(&err)))?;
        Ok(Self { url: url.to_owned(), client: LengthPredictorClient::new(channel), runtime })
    }

    /// What is being served there.
    ///
    /// # Errors
    /// The service does not answer.
    pub fn model_info(&mut self) -> Result<v1::GetModelInfoResponse, PredictError> {
        let call = self.client.get_model_info(v1::GetModelInfoRequest {});
        let result = self.runtime.block_on(call).map(tonic::Response::into_inner);
        result.map_err(|status| self.failed(&status))
    }

    fn failed(&self, status: &Status) -> PredictError {
        let reason = format!("{:?}: {}", status.code(), status.message());
        PredictError::Remote { endpoint: self.url.clone(), reason }
    }

    fn call(&mut self, inputs: &[PredictInput]) -> Result<Vec<v1::PredictResponse>, PredictError> {
        let requests: Vec<v1::PredictRequest> = inputs.iter().enumerate().map(request).collect();
        let mut backoff = FIRST_BACKOFF;
        for attempt in 1.. {
            let mut call = tonic::Request::new(v1::PredictBatchRequest { requests: requests.clone() });
            call.set_timeout(CALL_TIMEOUT);
            let status = match self.runtime.block_on(self.client.predict_batch(call)) {
                Ok(reply) => return Ok(reply.into_inner().responses),
                Err(status) => status,
            };
            let passing = matches!(status.code(), Code::Unavailable | Code::ResourceExhausted);
            if !passing || attempt >= MAX_ATTEMPTS {
                return Err(self.failed(&status));
            }
            std::thread::sleep(backoff);
            backoff *= 2;
        }
        unreachable!("the loop ends by returning")
    }
}

fn request((index, input): (usize, &PredictInput)) -> v1::PredictRequest {
    let prompt = match &input.prompt {
        Prompt::Instruction(text) => Input::Instruction(text.clone()),
        Prompt::Chat(messages) => {
            let message =
                |m: &lengthwise_core::ChatMessage| v1::ChatMessage { role: m.role.clone(), content: m.content.clone() };
            Input::Chat(v1::Chat { messages: messages.iter().map(message).collect() })
        }
    };
    v1::PredictRequest { request_id: index.to_string(), input: Some(prompt), max_new_tokens: input.max_new_tokens }
}

/// The cause at the end of an error's chain: "connection refused" rather than "transport error".
fn innermost(err: &dyn std::error::Error) -> String {
    let mut err = err;
    while let Some(source) = err.source() {
        err = source;
    }
    err.to_string()
}

impl LengthPredictor for RemotePredictor {
    fn predict(
        &mut self,
        inputs: &[PredictInput],
    ) -> Result<Vec<Result<LengthEstimate, PredictError>>, PredictError> {
        let mut estimates = Vec::with_capacity(inputs.len());
        for chunk in inputs.chunks(BATCH) {
            let responses = self.call(chunk)?;
            if responses.len() != chunk.len() {
                let reason = format!("{} answers to {} prompts", responses.len(), chunk.len());
                return Err(PredictError::Remote { endpoint: self.url.clone(), reason });
            }
            let quantile = |q: v1::Quantile| Quantile { probability: q.probability, tokens: q.tokens };
            estimates.extend(responses.into_iter().map(|r| {
                let quantiles = r.quantiles.into_iter().map(quantile).collect();
                Ok(LengthEstimate { max_tokens: r.max_tokens, quantiles, parsed: r.parsed })
            }));
        }
        Ok(estimates)
    }
}

/// Never fails as a whole: where the predictor inside does, a stated length stands in, with one warning.
pub struct FallbackPredictor<P> {
    inner: P,
    fallback: u32,
    warned: bool,
}

impl<P: LengthPredictor> FallbackPredictor<P> {
    /// `fallback`: the length, in tokens, that stands in.
    pub fn new(inner: P, fallback: u32) -> Self {
        Self { inner, fallback, warned: false }
    }
}

impl<P: LengthPredictor> LengthPredictor for FallbackPredictor<P> {
    fn predict(
        &mut self,
        inputs: &[PredictInput],
    ) -> Result<Vec<Result<LengthEstimate, PredictError>>, PredictError> {
        let err = match self.inner.predict(inputs) {
            Ok(estimates) => return Ok(estimates),
            Err(err) => err,
        };
        if !self.warned {
            tracing::warn!("{err}; going on with a length of {} tokens for every request", self.fallback);
            self.warned = true;
        }
        let stand_in = |input: &PredictInput| Ok(LengthEstimate::fallback(self.fallback).capped(input.max_new_tokens));
        Ok(inputs.iter().map(stand_in).collect())
    }
}
