//! A predictor elsewhere.

use std::error::Error;
use std::future::Future;
use std::time::{Duration, Instant};

use lengthwise_core::{LengthEstimate, LengthPredictor, PredictError, PredictInput};
use lengthwise_proto::v1;
use lengthwise_proto::v1::length_predictor_client::LengthPredictorClient;
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::reason::{causes, endpoint, no_connection, reason, remote};
use crate::wire;

/// Most requests in one call.
const CALL_REQUESTS: usize = 64;
/// Most prompt text in one call, in bytes: a gRPC server takes messages of 4 MiB.
const CALL_BYTES: usize = 2 << 20;
/// Longest wait for one call's answers, its repetitions counted in.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Tries of a call while the service is unavailable or overloaded.
const MAX_ATTEMPTS: u32 = 4;
/// Wait after the first failed try; doubled after each further one.
const FIRST_BACKOFF: Duration = Duration::from_millis(50);

/// Asks a predictor service over gRPC. It blocks, and may be used inside an asynchronous runtime as well as outside one.
pub struct RemotePredictor {
    url: String,
    client: LengthPredictorClient<Channel>,
    info: v1::GetModelInfoResponse,
    timeout: Duration,
    /// Only `None` while it is dropped.
    runtime: Option<Runtime>,
}

impl RemotePredictor {
    /// Connects to `http://host:port` or `host:port`, and asks what is served there.
    ///
    /// # Errors
    /// The address is malformed, or no length predictor answers there.
    pub fn connect(url: &str) -> Result<Self, PredictError> {
        let endpoint = endpoint(url)?.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true);
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let builder = builder.worker_threads(1).thread_name("predictor-client").enable_all();
        let runtime = builder.build().map_err(|err| remote(url, causes(&err)))?;
        let connecting = async move {
            let channel = endpoint.connect().await.map_err(|err| no_connection(&err))?;
            let mut client = LengthPredictorClient::new(channel);
            let call = timed(v1::GetModelInfoRequest {}, CONNECT_TIMEOUT);
            let info = client.get_model_info(call).await.map_err(|status| reason(&status))?;
            Ok::<_, String>((client, info.into_inner()))
        };
        let (client, info) = match wait(&runtime, connecting) {
            Some(Ok(connected)) => connected,
            Some(Err(reason)) => {
                runtime.shutdown_background();
                return Err(remote(url, reason));
            }
            None => return Err(remote(url, "the connection was dropped".to_owned())),
        };
        Ok(Self {
            url: url.to_owned(),
            client,
            info,
            timeout: CALL_TIMEOUT,
            runtime: Some(runtime),
        })
    }

    /// Waits for the answers of one call (64 requests) no longer than `timeout`; 60 s otherwise.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// What was being served there when the connection was made.
    pub fn model_info(&self) -> &v1::GetModelInfoResponse {
        &self.info
    }

    fn wait<T: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        let runtime = self.runtime.as_ref();
        let result = runtime.and_then(|runtime| wait(runtime, call));
        result.unwrap_or_else(|| Err(Status::internal("the client's runtime has ended")))
    }

    /// One call's answers; where the server refuses one of the requests, each is asked alone so that it fails alone, be it
    /// the only one. The error is the reason.
    fn call(&self, inputs: &[PredictInput]) -> Result<Vec<Result<LengthEstimate, PredictError>>, String> {
        let max = self.info.max_new_tokens;
        let requests: Vec<_> = inputs
            .iter()
            .enumerate()
            .map(|(i, p)| wire::request(i.to_string(), p, max))
            .collect();
        let until = Instant::now() + self.timeout;
        let batch = v1::PredictBatchRequest {
            requests: requests.clone(),
        };
        let client = self.client.clone();
        let result = self.wait(repeat(until, move |timeout| {
            let (mut client, call) = (client.clone(), timed(batch.clone(), timeout));
            async move { client.predict_batch(call).await }
        }));
        match result {
            Ok(reply) if reply.responses.len() == inputs.len() => {
                let estimates = reply.responses.into_iter().zip(inputs);
                Ok(estimates
                    .map(|(r, input)| Ok(wire::estimate(r).capped(input.max_new_tokens)))
                    .collect())
            }
            Ok(reply) => Err(format!("{} answers to {} prompts", reply.responses.len(), inputs.len())),
            Err(status) if status.code() == Code::InvalidArgument => Ok(inputs
                .iter()
                .zip(requests)
                .map(|(input, request)| self.one(input, request))
                .collect()),
            Err(status) => Err(reason(&status)),
        }
    }

    fn one(&self, input: &PredictInput, request: v1::PredictRequest) -> Result<LengthEstimate, PredictError> {
        let client = self.client.clone();
        let result = self.wait(repeat(Instant::now() + self.timeout, move |timeout| {
            let (mut client, call) = (client.clone(), timed(request.clone(), timeout));
            async move { client.predict(call).await }
        }));
        let response = result.map_err(|status| remote(&self.url, reason(&status)))?;
        Ok(wire::estimate(response).capped(input.max_new_tokens))
    }
}

impl Drop for RemotePredictor {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Dropped as it is, it would panic inside another runtime.
            runtime.shutdown_background();
        }
    }
}

impl LengthPredictor for RemotePredictor {
    fn predict(&mut self, inputs: &[PredictInput]) -> Result<Vec<Result<LengthEstimate, PredictError>>, PredictError> {
        let mut answers = Vec::with_capacity(inputs.len());
        while answers.len() < inputs.len() {
            let rest = &inputs[answers.len()..];
            match self.call(&rest[..call_size(rest)]) {
                Ok(answered) => answers.extend(answered),
                Err(reason) if answers.is_empty() => return Err(remote(&self.url, reason)),
                // What is known is kept; the service has just been asked several times, the rest is given up.
                Err(reason) => answers.extend(rest.iter().map(|_| Err(remote(&self.url, reason.clone())))),
            }
        }
        Ok(answers)
    }
}

/// How many of `inputs` go into one call.
fn call_size(inputs: &[PredictInput]) -> usize {
    let mut bytes = 0;
    let fits = |input: &&PredictInput| {
        bytes += input
            .prompt
            .messages()
            .iter()
            .map(|turn| turn.role.len() + turn.content.len() + 32)
            .sum::<usize>();
        bytes <= CALL_BYTES
    };
    inputs.iter().take(CALL_REQUESTS).take_while(fits).count().max(1)
}

fn timed<T>(message: T, timeout: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}

/// Makes a call until it succeeds, with growing pauses, while the service is away or overloaded. Predictions change
/// nothing, so that repeating one is safe even where the first try may have arrived.
async fn repeat<T, F>(until: Instant, call: impl Fn(Duration) -> F) -> Result<T, Status>
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    let mut backoff = FIRST_BACKOFF;
    let mut attempt = 1;
    loop {
        let status = match call(until.saturating_duration_since(Instant::now())).await {
            Ok(reply) => return Ok(reply.into_inner()),
            Err(status) => status,
        };
        // A source is an error of the transport here: a connection that closed under the call, under various codes.
        let passing = matches!(status.code(), Code::Unavailable | Code::ResourceExhausted) || status.source().is_some();
        if !passing || attempt == MAX_ATTEMPTS || Instant::now() + backoff >= until {
            return Err(status);
        }
        tokio::time::sleep(backoff).await;
        backoff *= 2;
        attempt += 1;
    }
}

/// Blocks until `future` is done; `None` where it panicked. Unlike `Runtime::block_on` it may be called inside a runtime.
fn wait<T: Send + 'static>(runtime: &Runtime, future: impl Future<Output = T> + Send + 'static) -> Option<T> {
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    runtime.spawn(async move { sender.send(future.await) });
    receiver.recv().ok()
}
