//! The demo's predictor: a real server on loopback, asked over gRPC.

use std::path::Path;
use std::thread::JoinHandle;

use anyhow::Context;
use lengthwise_core::LengthPredictor;
use lengthwise_model::LoadedModel;
use lengthwise_predictor::{BatchingConfig, PredictorServer, Question, RemotePredictor, ServeError, ServerInfo};
use tokio::sync::oneshot;

use crate::predictions::local_predictor;

/// A running server and a client connected to it.
pub struct ServedPredictor {
    url: String,
    client: RemotePredictor,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl ServedPredictor {
    /// Serves an adapter on a free port of this machine.
    pub fn start(model: &LoadedModel, adapter: &Path, cap: u32) -> anyhow::Result<Self> {
        let predictor = local_predictor(model, Some(adapter), Question::Length, cap)?;
        let info = ServerInfo {
            model: model.name.clone(),
            adapter: adapter.display().to_string(),
            method: "adapter".to_owned(),
            max_new_tokens: cap,
            max_prompt_tokens: model.network.config().max_position_embeddings as u32 - 1,
            // Nobody but this demo asks it.
            fingerprint: String::new(),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let server = runtime.block_on(PredictorServer::bind("127.0.0.1:0"))?;
        let url = format!("http://{}", server.address());
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let shutdown = async { stopped.await.unwrap_or(()) };
            runtime.block_on(server.serve(predictor, BatchingConfig::default(), info, shutdown))
        });
        let client = RemotePredictor::connect(&url)?;
        Ok(Self {
            url,
            client,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Where it answers.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The client.
    pub fn predictor(&mut self) -> &mut dyn LengthPredictor {
        &mut self.client
    }

    /// Stops the server; what it accepted is answered.
    pub fn stop(mut self) -> anyhow::Result<()> {
        // The server has ended already where nobody takes the signal.
        let _ = self.stop.take().map(|stop| stop.send(()));
        // Its connection ends with the client, and the server with its connections.
        drop(self.client);
        let thread = self.thread.take().context("the server was started")?;
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the server's thread panicked"))??;
        Ok(())
    }
}
