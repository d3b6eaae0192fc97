//! What each call answers.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::time::Duration;

use anyhow::Result;
use lengthwise_predictor::BatchingConfig;
use lengthwise_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::support::{CAP, Running, ask};

#[tokio::test]
async fn an_answer_carries_the_id_and_the_length_capped() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let mut client = server.client().await?;
    let long = "x".repeat(500);
    for (text, cap, want) in [
        ("seven77", 0, 7),
        ("seven77", 5, 5),
        (long.as_str(), 0, CAP),
        (long.as_str(), CAP, CAP),
    ] {
        let request = v1::PredictRequest {
            max_new_tokens: cap,
            ..ask("a", text)
        };
        let got = client.predict(request).await?.into_inner();
        assert_eq!((got.request_id.as_str(), got.max_tokens, got.parsed), ("a", want, true));
    }
    let got = client.predict(ask("b", "unparsed")).await?.into_inner();
    assert_eq!((got.max_tokens, got.parsed), (77, false));
    server.stop().await
}

#[tokio::test]
async fn a_conversation_is_predicted_as_one_prompt() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let turn = |role: &str, content: &str| v1::ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
    };
    let messages = vec![turn("user", "ab"), turn("assistant", "c"), turn("user", "def")];
    let chat = Some(v1::predict_request::Input::Chat(v1::Chat { messages }));
    let got = server
        .client()
        .await?
        .predict(v1::PredictRequest {
            input: chat,
            ..ask("a", "")
        })
        .await?
        .into_inner();
    assert_eq!(got.max_tokens, 8);
    assert_eq!(server.control.batches(), [["ab|c|def"]]);
    server.stop().await
}

#[tokio::test]
async fn a_batch_is_answered_in_its_order() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let mut client = server.client().await?;
    let requests = vec![ask("c", "333"), ask("a", "1"), ask("b", "22"), ask("a", "4444")];
    let got = client
        .predict_batch(v1::PredictBatchRequest { requests })
        .await?
        .into_inner()
        .responses;
    let got: Vec<_> = got.iter().map(|r| (r.request_id.as_str(), r.max_tokens)).collect();
    assert_eq!(got, [("c", 3), ("a", 1), ("b", 2), ("a", 4)]);
    let none = client
        .predict_batch(v1::PredictBatchRequest { requests: vec![] })
        .await?
        .into_inner();
    assert_eq!(none.responses, []);
    server.stop().await
}

#[tokio::test]
async fn a_stream_answers_every_request_by_its_id_within_the_places_of_the_queue() -> Result<()> {
    // More requests than the stream may have under way, and a queue that could not hold them.
    let batching = BatchingConfig {
        capacity: NonZeroUsize::new(8).unwrap(),
        ..BatchingConfig::default()
    };
    let server = Running::start(batching).await?;
    let requests: Vec<_> = (0..600).map(|i| ask(&i.to_string(), &"x".repeat(1 + i % 97))).collect();
    let stream = server
        .client()
        .await?
        .predict_stream(tokio_stream::iter(requests))
        .await?
        .into_inner();
    let answers: Vec<v1::PredictResponse> = stream.collect::<Result<_, _>>().await?;
    assert_eq!(answers.len(), 600);
    let by_id: BTreeMap<usize, u32> = answers
        .iter()
        .map(|r| (r.request_id.parse().unwrap(), r.max_tokens))
        .collect();
    assert_eq!(by_id, (0..600).map(|i| (i, 1 + i as u32 % 97)).collect());
    server.stop().await
}

#[tokio::test]
async fn the_model_info_is_what_the_server_was_told() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let got = server
        .client()
        .await?
        .get_model_info(v1::GetModelInfoRequest {})
        .await?
        .into_inner();
    let want = v1::GetModelInfoResponse {
        model: "tiny".to_owned(),
        adapter: "adapters/tiny".to_owned(),
        method: "adapter".to_owned(),
        max_new_tokens: CAP,
        max_prompt_tokens: 512,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        fingerprint: "0123".to_owned(),
    };
    assert_eq!(got, want);
    server.stop().await
}

#[tokio::test]
async fn a_long_stream_of_small_requests_waits_for_the_model_and_leaves_its_connection_to_others() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let client = server.client().await?;
    // One place, so that every request is a frame of its own.
    let (requests, receiver) = mpsc::channel(1);
    let sent = tokio::spawn(async move {
        requests.send(ask("hold", "hold")).await?;
        for i in 0..10_000 {
            requests.send(ask(&i.to_string(), "x")).await?;
        }
        anyhow::Ok(())
    });
    let (mut one, mut other) = (client.clone(), client.clone());
    let streaming = tokio::spawn(async move {
        let stream = one.predict_stream(ReceiverStream::new(receiver)).await?.into_inner();
        stream.collect::<Result<Vec<_>, _>>().await
    });
    server.control.begun(1).await;
    // The model is busy, so that what can be sent ahead is.
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!sent.is_finished(), "nothing held the sender up");
    let requests = vec![ask("b", "22"), ask("c", "333")];
    let batch = tokio::spawn(async move { other.predict_batch(v1::PredictBatchRequest { requests }).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    server.control.open();
    assert_eq!(batch.await??.into_inner().responses.len(), 2);
    let mut ids: Vec<String> = streaming.await??.into_iter().map(|r| r.request_id).collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 10_001);
    sent.await??;
    server.stop().await
}

/// The services that a reflection client of one version of the protocol is told of.
macro_rules! reflected {
    ($server:expr, $version:ident) => {{
        use tonic_reflection::pb::$version::server_reflection_client::ServerReflectionClient;
        use tonic_reflection::pb::$version::server_reflection_request::MessageRequest;
        use tonic_reflection::pb::$version::server_reflection_response::MessageResponse;
        let request = tonic_reflection::pb::$version::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut client = ServerReflectionClient::new($server.channel().await?);
        let answers = client.server_reflection_info(tokio_stream::once(request)).await?;
        let answer = answers.into_inner().message().await?.unwrap().message_response;
        let Some(MessageResponse::ListServicesResponse(list)) = answer else {
            panic!("{answer:?}")
        };
        list.service.into_iter().map(|service| service.name).collect::<Vec<_>>()
    }};
}

#[tokio::test]
async fn reflection_of_both_versions_lists_the_services() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    for names in [reflected!(server, v1), reflected!(server, v1alpha)] {
        for name in ["lengthwise.v1.LengthPredictor", "grpc.health.v1.Health"] {
            assert!(names.iter().any(|n| n == name), "{names:?}");
        }
    }
    server.stop().await
}
