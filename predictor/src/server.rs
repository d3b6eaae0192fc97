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

use crate::service::PredictorService;
use crate::{BatchingConfig, PredictQueue, ServerInfo};

/// How long a stopping server waits for its callers to take their answers.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(30);
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

    /// When it stops, callers that do not take their answers are left after `grace`; 30 s otherwise.
    #[must_use]
    pub fn with_shutdown_grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Serves predictions, health and reflection until `shutdown`; then takes no more requests, answers those it has
    /// accepted, and returns.
    ///
    /// # Errors
    /// The transport failed.
    pub async fn serve(
        self,
        predictor: Box<dyn LengthPredictor>,
        batching: BatchingConfig,
        info: ServerInfo,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), ServeError> {
        let (queue, worker) = PredictQueue::start(predictor, batching).map_err(ServeError::Worker)?;
        let (stop, stopping) = watch::channel(false);
        let mut stopped = stopping.clone();
        let service = LengthPredictorServer::new(PredictorService {
            queue,
            info: Arc::new(info),
            stopping,
        });
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_service_status(SERVICE_NAME, ServingStatus::Serving).await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        let signal = async {
            shutdown.await;
            tracing::info!("stopping: answering what was accepted");
            stop_health(health).await;
            // Fails only when nobody listens, which is then as good.
            let _ = stop.send(true);
        };
        let serving = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .add_service(service)
            .add_service(health_service)
            .add_service(reflection)
            .serve_with_incoming_shutdown(TcpIncoming::from(self.listener).with_nodelay(Some(true)), signal);
        let too_long = async {
            let _ = stopped.wait_for(|stopped| *stopped).await;
            tokio::time::sleep(self.grace).await;
        };
        tokio::select! {
            served = serving => served?,
            () = too_long => {
                tracing::warn!("stopped after {} s with connections still open", self.grace.as_secs_f64());
                return Ok(());
            }
        }
        // The service, and with it the last sender, is gone: the worker ends when its queue is empty.
        let _ = tokio::task::spawn_blocking(move || worker.join()).await;
        Ok(())
    }
}

/// Says `NOT_SERVING` to all who watch, then ends their streams: an open stream would keep the server from stopping.
async fn stop_health(mut health: HealthReporter) {
    for service in ["", SERVICE_NAME] {
        health.set_service_status(service, ServingStatus::NotServing).await;
        health.clear_service_status(service).await;
    }
}
