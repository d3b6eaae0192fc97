//! The client, and what stands in when the service goes away.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Result;
use lengthwise_core::{LengthPredictor, PredictInput};
use lengthwise_predictor::{BatchingConfig, FallbackPredictor, RemotePredictor};
use lengthwise_proto::v1;
use lengthwise_proto::v1::length_predictor_server::{LengthPredictor as Service, LengthPredictorServer};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use crate::support::{CAP, Running, instruction};

fn lengths(predictor: &mut impl LengthPredictor, inputs: &[PredictInput]) -> Result<Vec<(u32, bool)>> {
    let answers = predictor.predict(inputs)?.into_iter();
    answers
        .map(|answer| answer.map(|e| (e.max_tokens, e.parsed)).map_err(Into::into))
        .collect()
}

// It blocks, so these tests need a second thread for the server. That it works in here at all is part of the test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_prompts_are_answered_in_order_over_several_calls() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let mut remote = RemotePredictor::connect(&format!("http://{}", server.address))?;
    assert_eq!(
        (remote.model_info().model.as_str(), remote.model_info().max_new_tokens),
        ("tiny", CAP)
    );
    let inputs: Vec<_> = (0..150).map(|i| instruction(&"x".repeat(1 + i % 90))).collect();
    let want: Vec<_> = (0..150).map(|i| (1 + i % 90, true)).collect();
    assert_eq!(lengths(&mut remote, &inputs)?, want);
    assert_eq!(lengths(&mut remote, &[])?, []);
    drop(remote);
    server.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cap_above_the_servers_is_the_servers() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let mut remote = RemotePredictor::connect(&server.address.to_string())?;
    let capped = |max_new_tokens| PredictInput {
        max_new_tokens,
        ..instruction(&"x".repeat(500))
    };
    let got = lengths(&mut remote, &[capped(2048), capped(CAP), capped(30)])?;
    assert_eq!(got, [(CAP, true), (CAP, true), (30, true)]);
    server.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prompt_that_is_refused_fails_alone() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let mut remote = RemotePredictor::connect(&server.address.to_string())?;
    let got = remote.predict(&[instruction("1"), instruction("long"), instruction("333")])?;
    assert_eq!(
        (got[0].as_ref().unwrap().max_tokens, got[2].as_ref().unwrap().max_tokens),
        (1, 3)
    );
    let message = got[1].as_ref().unwrap_err().to_string();
    assert!(
        message.contains(&server.address.to_string()) && message.contains("at most 512"),
        "{message}"
    );
    // The only one of its call fails alone as well, and in the same words.
    let got = remote.predict(&[instruction("long")])?;
    assert_eq!(got[0].as_ref().unwrap_err().to_string(), message);
    server.stop().await
}

#[test]
fn a_port_where_nothing_speaks_is_given_up_in_plain_words() {
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let message = RemotePredictor::connect(&url).err().unwrap().to_string();
    assert!(
        message.starts_with(&format!("predictor {url}: there was no answer in time")),
        "{message}"
    );
    assert!(!message.contains("::") && !message.contains("(("), "{message}");
}

#[test]
fn an_address_without_a_service_is_named() {
    let free = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let url = format!("http://{free}");
    let message = RemotePredictor::connect(&url).err().unwrap().to_string();
    assert!(message.starts_with(&format!("predictor {url}: ")), "{message}");
    assert!(message.to_lowercase().contains("refused"), "{message}");
    let message = RemotePredictor::connect("http://a b").err().unwrap().to_string();
    assert!(message.starts_with("predictor http://a b: "), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_hangs_is_left_after_the_timeout() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let remote = RemotePredictor::connect(&server.address.to_string())?;
    let message = remote
        .with_timeout(Duration::from_millis(500))
        .predict(&[instruction("hold")])
        .unwrap_err()
        .to_string();
    assert!(
        message.contains(&server.address.to_string()) && message.contains("DeadlineExceeded"),
        "{message}"
    );
    server.control.open();
    server.stop().await
}

#[test]
fn a_service_killed_in_the_middle_of_a_call_leaves_the_fallback() -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let server = runtime.block_on(Running::start(BatchingConfig::default()))?;
    let remote = RemotePredictor::connect(&server.address.to_string())?;
    let mut predictor = FallbackPredictor::new(remote, 64);
    assert_eq!(lengths(&mut predictor, &[instruction("22")])?, [(2, true)]);
    let control = server.control.clone();
    let asking = std::thread::spawn(move || {
        let during = lengths(&mut predictor, &[instruction("hold"), instruction("333")]);
        (during, lengths(&mut predictor, &[instruction("4444")]))
    });
    runtime.block_on(control.begun(2));
    runtime.shutdown_background();
    let (during, after) = asking.join().unwrap();
    assert_eq!(during?, [(64, false), (64, false)]);
    assert_eq!(after?, [(64, false)]);
    control.open();
    Ok(())
}

/// Away for the first calls, then answers 9 to everything.
struct Flaky {
    away: u32,
    calls: Arc<AtomicU32>,
}

#[tonic::async_trait]
impl Service for Flaky {
    type PredictStreamStream = tokio_stream::Empty<Result<v1::PredictResponse, Status>>;

    async fn predict(&self, _: Request<v1::PredictRequest>) -> Result<Response<v1::PredictResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn predict_batch(
        &self,
        request: Request<v1::PredictBatchRequest>,
    ) -> Result<Response<v1::PredictBatchResponse>, Status> {
        if self.calls.fetch_add(1, Ordering::SeqCst) < self.away {
            return Err(Status::unavailable("restarting"));
        }
        let answer = |r: v1::PredictRequest| v1::PredictResponse {
            request_id: r.request_id,
            max_tokens: 9,
            quantiles: vec![],
            parsed: true,
        };
        let responses = request.into_inner().requests.into_iter().map(answer).collect();
        Ok(Response::new(v1::PredictBatchResponse { responses }))
    }

    async fn predict_stream(
        &self,
        _: Request<Streaming<v1::PredictRequest>>,
    ) -> Result<Response<Self::PredictStreamStream>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn get_model_info(
        &self,
        _: Request<v1::GetModelInfoRequest>,
    ) -> Result<Response<v1::GetModelInfoResponse>, Status> {
        Ok(Response::new(v1::GetModelInfoResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_is_away_is_asked_four_times() -> Result<()> {
    for (away, succeeds) in [(3, true), (4, false)] {
        let calls = Arc::new(AtomicU32::new(0));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let service = LengthPredictorServer::new(Flaky {
            away,
            calls: calls.clone(),
        });
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        let got = RemotePredictor::connect(&address)?.predict(&[instruction("x")]);
        assert_eq!(calls.load(Ordering::SeqCst), 4);
        match got {
            Ok(answers) => assert_eq!((succeeds, answers[0].as_ref().unwrap().max_tokens), (true, 9)),
            Err(err) => assert_eq!(
                (succeeds, err.to_string()),
                (false, format!("predictor {address}: Unavailable: restarting"))
            ),
        }
    }
    Ok(())
}
