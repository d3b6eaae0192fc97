//! What each call answers.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use anyhow::Result;
use lengthwise_predictor::BatchingConfig;
use lengthwise_proto::v1;
use tokio_stream::StreamExt;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

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
    };
    assert_eq!(got, want);
    server.stop().await
}

#[tokio::test]
async fn reflection_lists_the_services() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let mut client = ServerReflectionClient::new(server.channel().await?);
    let list = MessageRequest::ListServices(String::new());
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(list),
    };
    let mut answers = client
        .server_reflection_info(tokio_stream::once(request))
        .await?
        .into_inner();
    let answer = answers.message().await?.unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else {
        panic!("{answer:?}")
    };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"lengthwise.v1.LengthPredictor"), "{names:?}");
    assert!(names.contains(&"grpc.health.v1.Health"), "{names:?}");
    server.stop().await
}
