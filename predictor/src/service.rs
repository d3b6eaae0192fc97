//! The gRPC service: the only file that knows which error has which code.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use lengthwise_core::PredictError;
use lengthwise_proto::v1;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::measure::Measured;
use crate::queue::Pending;
use crate::{PredictQueue, stream, wire};

/// What is being served, as `GetModelInfo` tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerInfo {
    /// Name or folder of the model; empty where the method has none.
    pub model: String,
    /// Folder of the adapter; empty where the method has none.
    pub adapter: String,
    /// `adapter`, `pia` or `constant`.
    pub method: String,
    /// Cap on an estimate, in tokens.
    pub max_new_tokens: u32,
    /// Longest prompt accepted, in tokens; 0: any.
    pub max_prompt_tokens: u32,
    /// Of all that its estimates depend on; empty where that is not told.
    pub fingerprint: String,
}

/// Most requests in one `PredictBatch`.
pub const MAX_BATCH_REQUESTS: usize = 1024;

#[derive(Clone)]
pub(crate) struct PredictorService {
    pub queue: PredictQueue,
    pub info: Arc<ServerInfo>,
    /// Becomes true when the server stops: what arrives later is refused.
    pub stopping: watch::Receiver<bool>,
}

pub(crate) fn status(err: &PredictError) -> Status {
    let message = err.to_string();
    match err {
        PredictError::EmptyPrompt
        | PredictError::BadChat(_)
        | PredictError::PromptTooLong { .. }
        | PredictError::CapOutOfRange { .. } => Status::invalid_argument(message),
        PredictError::Overloaded { .. } => Status::resource_exhausted(message),
        PredictError::DeadlineExceeded => Status::deadline_exceeded(message),
        PredictError::ShuttingDown => Status::unavailable(message),
        PredictError::Remote { .. } | PredictError::Model(_) => Status::internal(message),
    }
}

pub(crate) fn code<T>(result: &Result<T, Status>) -> Code {
    result.as_ref().err().map_or(Code::Ok, Status::code)
}

/// `err` as the status of the request that `name` tells.
pub(crate) fn status_of(name: &str, err: &PredictError) -> Status {
    let status = status(err);
    Status::new(status.code(), format!("{name}: {}", status.message()))
}

/// A request by its place in a batch or a stream, from 0, and its id.
pub(crate) fn name(place: usize, request: &v1::PredictRequest) -> String {
    format!("request {place} (id {:?})", request.request_id)
}

/// What tonic says of a message that it does not read: one above its limit of bytes is `OUT_OF_RANGE` there, which callers
/// take for the end of a file. It is too long a prompt, whatever is tried again.
pub(crate) fn refusal(status: Status) -> Status {
    match status.code() {
        Code::OutOfRange => Status::invalid_argument(status.message()),
        _ => status,
    }
}

impl PredictorService {
    pub fn submit(&self, request: &v1::PredictRequest, deadline: Option<Instant>) -> Result<Pending, PredictError> {
        if *self.stopping.borrow() {
            return Err(PredictError::ShuttingDown);
        }
        self.queue
            .submit(wire::input(request, self.info.max_new_tokens)?, deadline)
    }

    async fn one(
        &self,
        request: v1::PredictRequest,
        deadline: Option<Instant>,
    ) -> Result<v1::PredictResponse, PredictError> {
        let estimate = self.submit(&request, deadline)?.wait().await?;
        Ok(wire::response(request.request_id, &estimate))
    }

    /// All answers, or the first error; where the call ends early, what still waits is cancelled by being dropped.
    async fn batch(
        &self,
        requests: Vec<v1::PredictRequest>,
        deadline: Option<Instant>,
    ) -> Result<Vec<v1::PredictResponse>, Status> {
        // What is refused is refused before any of the work is done.
        for (i, request) in requests.iter().enumerate() {
            let checked = wire::input(request, self.info.max_new_tokens);
            checked.map_err(|err| status_of(&name(i, request), &err))?;
        }
        let mut pending = Vec::with_capacity(requests.len());
        for (i, request) in requests.iter().enumerate() {
            let submitted = self.submit(request, deadline);
            pending.push(submitted.map_err(|err| status_of(&name(i, request), &err))?);
        }
        let mut responses = Vec::with_capacity(requests.len());
        for (i, (request, pending)) in requests.into_iter().zip(pending).enumerate() {
            let estimate = pending
                .wait()
                .await
                .map_err(|err| status_of(&name(i, &request), &err))?;
            responses.push(wire::response(request.request_id, &estimate));
        }
        Ok(responses)
    }
}

#[tonic::async_trait]
impl v1::length_predictor_server::LengthPredictor for PredictorService {
    async fn predict(&self, request: Request<v1::PredictRequest>) -> Result<Response<v1::PredictResponse>, Status> {
        let deadline = wire::deadline(request.metadata());
        let measured = Measured::begin(1);
        let result = self
            .one(request.into_inner(), deadline)
            .await
            .map_err(|err| status(&err));
        measured.end(code(&result));
        result.map(Response::new)
    }

    async fn predict_batch(
        &self,
        request: Request<v1::PredictBatchRequest>,
    ) -> Result<Response<v1::PredictBatchResponse>, Status> {
        let deadline = wire::deadline(request.metadata());
        let requests = request.into_inner().requests;
        let measured = Measured::begin(requests.len());
        let result = match requests.len() {
            0..=MAX_BATCH_REQUESTS => self.batch(requests, deadline).await,
            got => Err(Status::invalid_argument(format!(
                "batch has {got} requests, the limit is {MAX_BATCH_REQUESTS}"
            ))),
        };
        measured.end(code(&result));
        result.map(|responses| Response::new(v1::PredictBatchResponse { responses }))
    }

    type PredictStreamStream = Pin<Box<dyn Stream<Item = Result<v1::PredictResponse, Status>> + Send>>;

    async fn predict_stream(
        &self,
        request: Request<Streaming<v1::PredictRequest>>,
    ) -> Result<Response<Self::PredictStreamStream>, Status> {
        let deadline = wire::deadline(request.metadata());
        let (answers, receiver) = mpsc::channel(1);
        tokio::spawn(stream::run(self.clone(), request.into_inner(), deadline, answers));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn get_model_info(
        &self,
        _: Request<v1::GetModelInfoRequest>,
    ) -> Result<Response<v1::GetModelInfoResponse>, Status> {
        let info = &self.info;
        Ok(Response::new(v1::GetModelInfoResponse {
            model: info.model.clone(),
            adapter: info.adapter.clone(),
            method: info.method.clone(),
            max_new_tokens: info.max_new_tokens,
            max_prompt_tokens: info.max_prompt_tokens,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            fingerprint: info.fingerprint.clone(),
        }))
    }
}
