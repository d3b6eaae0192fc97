//! A predictor whose steps the tests control, and a running server.

use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lengthwise_core::{LengthEstimate, LengthPredictor, PredictError, PredictInput, Prompt};
use lengthwise_predictor::{BatchingConfig, PredictorServer, ServeError, ServerInfo};
use lengthwise_proto::v1;
use lengthwise_proto::v1::length_predictor_client::LengthPredictorClient;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::transport::Channel;

/// The server's cap in all tests.
pub const CAP: u32 = 100;

/// What the predictor was asked, batch by batch, and whether it may go on.
#[derive(Clone, Default)]
pub struct Control {
    batches: Arc<Mutex<Vec<Vec<String>>>>,
    open: Arc<(Mutex<bool>, Condvar)>,
}

impl Control {
    pub fn batches(&self) -> Vec<Vec<String>> {
        self.batches.lock().unwrap().clone()
    }

    /// Lets the predictor go on from "hold".
    pub fn open(&self) {
        *self.open.0.lock().unwrap() = true;
        self.open.1.notify_all();
    }

    /// Waits until the predictor has begun its `n`-th batch.
    pub async fn begun(&self, n: usize) {
        until(|| self.batches().len() >= n).await;
    }
}

/// Waits, at most 20 s, until `condition` holds.
pub async fn until(condition: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < end, "waited 20 s in vain");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Predicts the number of bytes in the prompt. Some prompts are special: "hold" waits for the control, "panic" panics,
/// "fail" fails the batch, "short" leaves out an answer, "long" is too long, "unparsed" gets a fallback.
pub struct Scripted(pub Control);

impl LengthPredictor for Scripted {
    fn predict(&mut self, inputs: &[PredictInput]) -> Result<Vec<Result<LengthEstimate, PredictError>>, PredictError> {
        let texts: Vec<String> = inputs.iter().map(|input| text(&input.prompt)).collect();
        let has = |text: &str| texts.iter().any(|t| t == text);
        self.0.batches.lock().unwrap().push(texts.clone());
        if has("hold") {
            let (open, changed) = &*self.0.open;
            drop(changed.wait_while(open.lock().unwrap(), |open| !*open).unwrap());
        }
        assert!(!has("panic"), "told to panic");
        if has("fail") {
            return Err(PredictError::model("out of memory"));
        }
        let one = |(input, text): (&PredictInput, &String)| match text.as_str() {
            "long" => Err(PredictError::PromptTooLong { got: 900, max: 512 }),
            "unparsed" => Ok(LengthEstimate::fallback(77)),
            text => Ok(LengthEstimate::of(text.len() as u32).capped(input.max_new_tokens)),
        };
        let mut answers: Vec<_> = inputs.iter().zip(&texts).map(one).collect();
        answers.truncate(answers.len() - usize::from(has("short")));
        Ok(answers)
    }
}

fn text(prompt: &Prompt) -> String {
    prompt
        .messages()
        .iter()
        .map(|turn| turn.content.as_str())
        .collect::<Vec<_>>()
        .join("|")
}

/// A server on a free port of this machine.
pub struct Running {
    pub control: Control,
    pub address: SocketAddr,
    pub stop: oneshot::Sender<()>,
    pub served: JoinHandle<Result<(), ServeError>>,
}

impl Running {
    pub async fn start(batching: BatchingConfig) -> Result<Self> {
        let server = PredictorServer::bind("127.0.0.1:0").await?;
        Ok(Self::serve(server, batching))
    }

    pub fn serve(server: PredictorServer, batching: BatchingConfig) -> Self {
        let control = Control::default();
        let address = server.address();
        let (stop, stopped) = oneshot::channel::<()>();
        let shutdown = async { _ = stopped.await };
        let predictor = Box::new(Scripted(control.clone()));
        let served = tokio::spawn(server.serve(predictor, batching, info(), shutdown));
        Self {
            control,
            address,
            stop,
            served,
        }
    }

    pub async fn channel(&self) -> Result<Channel> {
        let endpoint = Channel::from_shared(format!("http://{}", self.address))?;
        Ok(endpoint.connect().await?)
    }

    pub async fn client(&self) -> Result<LengthPredictorClient<Channel>> {
        Ok(LengthPredictorClient::new(self.channel().await?))
    }

    /// Stops the server and waits until it has ended.
    pub async fn stop(self) -> Result<()> {
        let _ = self.stop.send(());
        let ended = tokio::time::timeout(Duration::from_secs(20), self.served).await;
        Ok(ended.context("the server did not stop")???)
    }
}

pub fn info() -> ServerInfo {
    ServerInfo {
        model: "tiny".to_owned(),
        adapter: "adapters/tiny".to_owned(),
        method: "adapter".to_owned(),
        max_new_tokens: CAP,
        max_prompt_tokens: 512,
        fingerprint: "0123".to_owned(),
    }
}

pub fn ask(id: &str, instruction: &str) -> v1::PredictRequest {
    let input = v1::predict_request::Input::Instruction(instruction.to_owned());
    v1::PredictRequest {
        request_id: id.to_owned(),
        input: Some(input),
        max_new_tokens: 0,
    }
}

pub fn instruction(text: &str) -> PredictInput {
    PredictInput {
        prompt: Prompt::Instruction(text.to_owned()),
        max_new_tokens: CAP,
    }
}
