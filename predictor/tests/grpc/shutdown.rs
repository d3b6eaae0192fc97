//! Binding, stopping and health.

use std::time::Duration;

use anyhow::Result;
use lengthwise_predictor::{BatchingConfig, PredictorServer};
use lengthwise_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::support::{Running, ask, until};

const SERVICE: &str = "lengthwise.v1.LengthPredictor";

fn health(service: &str) -> HealthCheckRequest {
    HealthCheckRequest {
        service: service.to_owned(),
    }
}

#[tokio::test]
async fn an_address_in_use_is_named() -> Result<()> {
    let first = PredictorServer::bind("127.0.0.1:0").await?;
    let address = first.address().to_string();
    let message = PredictorServer::bind(&address).await.unwrap_err().to_string();
    assert!(message.contains(&format!("cannot listen on {address}")), "{message}");
    assert!(message.contains("in use"), "{message}");
    Ok(())
}

#[tokio::test]
async fn what_was_accepted_is_answered_before_the_server_ends() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let client = server.client().await?;
    let (mut one, mut many, mut streaming) = (client.clone(), client.clone(), client.clone());
    let held = tokio::spawn(async move { one.predict(ask("a", "hold")).await });
    server.control.begun(1).await;
    let batch = tokio::spawn(async move {
        let requests = vec![ask("b", "22"), ask("c", "333")];
        many.predict_batch(v1::PredictBatchRequest { requests }).await
    });
    // This stream stays open: its caller would ask more.
    let (requests, receiver) = mpsc::channel(4);
    requests.send(ask("d", "4444")).await?;
    let stream = tokio::spawn(async move {
        let answers = streaming.predict_stream(ReceiverStream::new(receiver)).await?;
        Ok::<_, tonic::Status>(answers.into_inner().collect::<Vec<_>>().await)
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    client.clone().get_model_info(v1::GetModelInfoRequest {}).await?;

    let Running {
        control,
        address,
        stop,
        served,
    } = server;
    stop.send(()).unwrap();
    // The port is closed at once, though answers are outstanding.
    until(|| std::net::TcpStream::connect(address).is_err()).await;
    let refused = client.clone().predict(ask("e", "55555")).await.unwrap_err();
    // tonic's client says `Cancelled` where the server has announced on the open connection that it goes away.
    assert!(
        matches!(refused.code(), Code::Unavailable | Code::Cancelled),
        "{refused:?}"
    );
    assert!(!served.is_finished());
    control.open();
    assert_eq!(held.await??.into_inner().max_tokens, 4);
    let lengths: Vec<_> = batch
        .await??
        .into_inner()
        .responses
        .iter()
        .map(|r| r.max_tokens)
        .collect();
    assert_eq!(lengths, [2, 3]);
    let answers = stream.await??;
    assert_eq!(answers[0].as_ref().unwrap().request_id, "d");
    assert_eq!(answers[1].as_ref().unwrap_err().code(), Code::Unavailable);
    tokio::time::timeout(Duration::from_secs(20), served).await???;
    drop(requests);
    Ok(())
}

#[tokio::test]
async fn health_turns_from_serving_to_not_serving_and_does_not_keep_the_server() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let mut client = HealthClient::new(server.channel().await?);
    for service in ["", SERVICE] {
        let got = client.check(health(service)).await?.into_inner();
        assert_eq!(got.status(), ServingStatus::Serving);
    }
    assert_eq!(client.check(health("other")).await.unwrap_err().code(), Code::NotFound);
    let mut watches = Vec::new();
    for service in ["", SERVICE] {
        let mut watch = client.watch(health(service)).await?.into_inner();
        assert_eq!(watch.message().await?.unwrap().status(), ServingStatus::Serving);
        watches.push(watch);
    }
    server.stop().await?;
    for mut watch in watches {
        assert_eq!(watch.message().await?.unwrap().status(), ServingStatus::NotServing);
        assert_eq!(watch.message().await?, None);
    }
    Ok(())
}

#[tokio::test]
async fn the_server_ends_after_its_grace_and_tells_how_many_it_left_unanswered() -> Result<()> {
    let bound = PredictorServer::bind("127.0.0.1:0")
        .await?
        .with_shutdown_grace(Duration::from_millis(100));
    let server = Running::serve(bound, BatchingConfig::default());
    let client = server.client().await?;
    let control = server.control.clone();
    let call = |text: &'static str| {
        let mut client = client.clone();
        tokio::spawn(async move { client.predict(ask("a", text)).await })
    };
    let held = [call("hold"), call("1"), call("22")];
    control.begun(1).await;
    // Until the others have arrived.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let message = server.stop().await.unwrap_err().to_string();
    assert!(message.starts_with("3 accepted requests were dropped"), "{message}");
    assert!(message.contains("within 0.1 s"), "{message}");
    held.iter().for_each(tokio::task::JoinHandle::abort);
    control.open();
    Ok(())
}

#[tokio::test]
async fn an_idle_stream_is_left_after_the_grace_without_a_failure() -> Result<()> {
    let bound = PredictorServer::bind("127.0.0.1:0")
        .await?
        .with_shutdown_grace(Duration::from_millis(100));
    let server = Running::serve(bound, BatchingConfig::default());
    let mut client = server.client().await?;
    let (requests, receiver) = mpsc::channel(1);
    requests.send(ask("a", "1")).await?;
    let mut answers = client.predict_stream(ReceiverStream::new(receiver)).await?.into_inner();
    assert_eq!(answers.message().await?.unwrap().max_tokens, 1);
    server.stop().await
}
