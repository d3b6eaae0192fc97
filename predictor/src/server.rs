//! Binding, serving and stopping.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use lengthwise_core::LengthPredictor;
use lengthwise_proto::FILE_DESCRIPTOR_SET;
use lengthwise_proto::v1::length_predictor_server::{LengthPredictorServer, SERVICE_NAME};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::refused::Refused;
use crate::service::PredictorService;
use crate::{BatchingConfig, PredictQueue, ServerInfo, measure};

/// How long a stopping server goes on answering what it has accepted, unless it is told otherwise.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(30);
/// Most calls of one connection at a time; further ones wait at the caller's end.
const MAX_CONNECTION_CALLS: u32 = 512;
/// What a caller may send ahead on one stream, in bytes, before it is read: HTTP/2's own default. Beyond it the caller waits,
/// so that a long `PredictStream` goes no faster than the model.
const STREAM_WINDOW_BYTES: u32 = 65_535;
/// What a connection may send ahead. It never holds a caller up, the windows of its streams do; but h2 ends a connection once
/// the unread DATA frames below 256 bytes lack more than half of this window to that size, all together.
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;
/// The frame of the shortest request that is not refused: gRPC's five bytes, and an instruction of one letter.
const SHORTEST_FRAME_BYTES: u64 = 8;
/// Every stream of a connection may be full of the shortest requests.
const _: () = {
    let unread = MAX_CONNECTION_CALLS as u64 * STREAM_WINDOW_BYTES as u64;
    assert!(unread / SHORTEST_FRAME_BYTES * (256 - SHORTEST_FRAME_BYTES) <= CONNECTION_WINDOW_BYTES as u64 / 2);
};
/// How often silent connections are asked whether their other end is still there.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Why the service did not run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The worker could not be started.
    #[error("cannot start the predictor's thread: {0}")]
    Worker(#[source] std::io::Error),
    /// The transport failed.
    #[error("the gRPC server failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// The time to stop in was over before the work was.
    #[error("{requests} accepted requests were dropped: they were not answered within {} s of being asked to stop", grace.as_secs_f64())]
    Unanswered {
        /// Whose callers were still waiting.
        requests: usize,
        /// The time.
        grace: Duration,
    },
    /// Reflection could not be set up.
    #[error("gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A service that is bound, but does not answer yet.
#[derive(Debug)]
pub struct PredictorServer {
    listener: TcpListener,
    address: SocketAddr,
    grace: Duration,
}

impl PredictorServer {
    /// Listens on `address`; port 0 takes a free one.
    ///
    /// # Errors
    /// The address is in use or not this machine's.
    pub async fn bind(address: &str) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Bind {
            address: address.to_owned(),
            source,
        };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self {
            listener,
            address,
            grace: SHUTDOWN_GRACE,
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// When it stops, what is not answered after `grace` is dropped; [`SHUTDOWN_GRACE`] otherwise.
    #[must_use]
    pub fn with_shutdown_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Serves predictions, health and reflection until `shutdown`; then takes no more requests, answers those it has
    /// accepted, and returns.
    ///
    /// # Errors
    /// The transport failed, or not everything that was accepted was answered in time.
    pub async fn serve(
        self,
        predictor: Box<dyn LengthPredictor>,
        batching: BatchingConfig,
        info: ServerInfo,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), ServeError> {
        let (queue, worker) = PredictQueue::start(predictor, batching).map_err(ServeError::Worker)?;
        measure::describe();
        let unanswered = queue.unanswered();
        let (stop, stopping) = watch::channel(false);
        let mut stopped = stopping.clone();
        let service = LengthPredictorServer::new(PredictorService {
            queue,
            info: Arc::new(info),
            stopping,
        });
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_service_status(SERVICE_NAME, ServingStatus::Serving).await;
        let signal = async {
            shutdown.await;
            tracing::info!(
                "stopping: answering what was accepted, for {} s at most",
                self.grace.as_secs_f64()
            );
            stop_health(health).await;
            // Fails only when nobody listens, which is then as good.
            let _ = stop.send(true);
        };
        let serving = transport()
            .add_service(Refused(service))
            .add_service(health_service)
            .add_service(reflection().build_v1()?)
            // What most tools ask for still.
            .add_service(reflection().build_v1alpha()?)
            .serve_with_incoming_shutdown(TcpIncoming::from(self.listener).with_nodelay(Some(true)), signal);
        let too_long = async {
            let _ = stopped.wait_for(|stopped| *stopped).await;
            tokio::time::sleep(self.grace).await;
            unanswered.get()
        };
        tokio::select! {
            served = serving => served?,
            requests = too_long => return left(requests, self.grace),
        }
        // The service, and with it the last sender, is gone: the worker ends when its queue is empty.
        let _ = tokio::task::spawn_blocking(move || worker.join()).await;
        Ok(())
    }
}

/// A server whose connections live on whatever is sent ahead of its reading.
fn transport() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .max_concurrent_streams(MAX_CONNECTION_CALLS)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

/// What is said of a stop that took too long.
fn left(requests: usize, grace: Duration) -> Result<(), ServeError> {
    if requests > 0 {
        return Err(ServeError::Unanswered { requests, grace });
    }
    tracing::warn!("stopped after {} s with connections still open", grace.as_secs_f64());
    Ok(())
}

/// Says `NOT_SERVING` to all who watch, then ends their streams: an open stream would keep the server from stopping.
async fn stop_health(mut health: HealthReporter) {
    for service in ["", SERVICE_NAME] {
        health.set_service_status(service, ServingStatus::NotServing).await;
        health.clear_service_status(service).await;
    }
}
