//! `PredictStream`: requests in, answers out as they are ready.

use std::time::Instant;

use lengthwise_core::PredictError;
use lengthwise_proto::v1;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::StreamExt;
use tonic::{Status, Streaming};

use crate::measure::Measured;
use crate::service::{PredictorService, code, name, refusal, status_of};
use crate::wire;

/// Most requests of one stream that are under way; further ones wait in the transport, and so does their sender.
const MAX_IN_STREAM: usize = 256;

type Answered = Result<v1::PredictResponse, Status>;

/// Answers `requests` until they end. A request that fails ends the stream with a status that names it and its place, once
/// the requests accepted before have been answered; no further one is accepted. A caller that goes away cancels what it had
/// under way.
pub(crate) async fn run(
    service: PredictorService,
    mut requests: Streaming<v1::PredictRequest>,
    deadline: Option<Instant>,
    answers: mpsc::Sender<Answered>,
) {
    // Within the queue's places, so that a stream alone never overloads it.
    let most = MAX_IN_STREAM.min(service.queue.capacity());
    let mut stopping = service.stopping.clone();
    let mut under_way: JoinSet<Answered> = JoinSet::new();
    let (mut open, mut place) = (true, 0);
    let mut failure = None;
    while open || !under_way.is_empty() {
        tokio::select! {
            // Dropping the set cancels them.
            () = answers.closed() => return,
            Some(done) = under_way.join_next() => {
                match done.unwrap_or_else(|err| Err(Status::internal(err.to_string()))) {
                    // A slow reader is waited for, and so slows its own stream only.
                    Ok(response) => if answers.send(Ok(response)).await.is_err() { return },
                    Err(status) => _ = failure.get_or_insert(status),
                }
            }
            request = requests.next(), if open && under_way.len() < most => match request {
                Some(Ok(request)) => {
                    let begun = begin(&service, place, request, deadline, &mut under_way);
                    failure = failure.or(begun.err());
                    place += 1;
                }
                // A message that could not be read.
                Some(Err(status)) => _ = failure.get_or_insert(in_place(place, &refusal(status))),
                None => open = false,
            },
            () = async { _ = stopping.wait_for(|stopping| *stopping).await }, if open => {
                _ = failure.get_or_insert(Status::unavailable(PredictError::ShuttingDown.to_string()));
            }
        }
        open &= failure.is_none();
    }
    if let Some(status) = failure {
        // Fails only when the caller is gone.
        let _ = answers.send(Err(status)).await;
    }
}

/// Puts the request at `place` of the stream into the queue.
fn begin(
    service: &PredictorService,
    place: usize,
    request: v1::PredictRequest,
    deadline: Option<Instant>,
    under_way: &mut JoinSet<Answered>,
) -> Result<(), Status> {
    let measured = Measured::begin(1);
    let name = name(place, &request);
    let pending = match service.submit(&request, deadline) {
        Ok(pending) => pending,
        Err(err) => {
            let status = status_of(&name, &err);
            measured.end(status.code());
            return Err(status);
        }
    };
    under_way.spawn(async move {
        let result = pending.wait().await;
        let result = result.map(|estimate| wire::response(request.request_id, &estimate));
        let result = result.map_err(|err| status_of(&name, &err));
        measured.end(code(&result));
        result
    });
    Ok(())
}

fn in_place(place: usize, status: &Status) -> Status {
    Status::new(status.code(), format!("request {place}: {}", status.message()))
}
