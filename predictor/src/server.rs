//! Binding, serving and stopping.

use std::future::Future;
use std::net::SocketAddr;

use lengthwise_core::LengthPredictor;
use lengthwise_proto::FILE_DESCRIPTOR_SET;
use lengthwise_proto::v1::length_predictor_server::LengthPredictorServer;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;

use crate::service::PredictorService;
use crate::{BatchingConfig, PredictQueue, ServerInfo};

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
    /// The transport failed.
    #[error("the gRPC server failed: {0}")]
    Transport(#[from] tonic::transport::Error),
    /// Reflection could not be set up.
    #[error("gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A service that is bound, but does not answer yet.
pub struct PredictorServer {
    listener: TcpListener,
    address: SocketAddr,
}

impl PredictorServer {
    /// Listens on `address`; port 0 takes a free one.
    ///
    /// # Errors
    /// The address is in use or not this machine's.
    pub async fn bind(address: &str) -> Result<Self, ServeError> {
        let failed = |source| ServeError::Bind { address: address.to_owned(), source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, address })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
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
        let (queue, worker) = PredictQueue::start(predictor, batching);
        let (stop, stopping) = watch::channel(false);
        let service = LengthPredictorServer::new(PredictorService { queue, info, stopping });
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<LengthPredictorServer<PredictorService>>().await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()?;
        let stopped = async {
            shutdown.await;
            tracing::info!("stopping: answering what was accepted");
            health.set_not_serving::<LengthPredictorServer<PredictorService>>().await;
            // Only fails when nobody listens, which is then as good.
            let _ = stop.send(true);
        };
        tonic::transport::Server::builder()
            .add_service(service)
            .add_service(health_service)
            .add_service(reflection)
            .serve_with_incoming_shutdown(TcpListenerStream::new(self.listener), stopped)
            .await?;
        // The service, and with it the last sender, is gone: the worker ends when its queue is empty.
        let _ = tokio::task::spawn_blocking(move || worker.join()).await;
        Ok(())
    }
}
