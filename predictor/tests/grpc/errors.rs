//! Which cause has which code.

use anyhow::Result;
use lengthwise_predictor::{BatchingConfig, MAX_BATCH_REQUESTS};
use lengthwise_proto::v1;
use lengthwise_proto::v1::predict_request::Input;
use tokio_stream::StreamExt;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Request, Status};

use crate::support::{CAP, Running, ask};

/// `PredictRequest` as a client writes it that does not check its text.
#[derive(Clone, PartialEq, prost::Message)]
struct RawRequest {
    #[prost(bytes = "vec", tag = "2")]
    instruction: Vec<u8>,
}

fn told(status: &Status, code: Code, parts: &[&str]) {
    assert_eq!(status.code(), code, "{status:?}");
    for part in parts {
        assert!(status.message().contains(part), "{:?} lacks {part:?}", status.message());
    }
}

#[tokio::test]
async fn what_the_caller_did_wrong_is_an_invalid_argument() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let mut client = server.client().await?;
    let chat = |messages| v1::PredictRequest {
        input: Some(Input::Chat(v1::Chat { messages })),
        ..ask("a", "")
    };
    let blank = v1::ChatMessage {
        role: "user".to_owned(),
        content: " ".to_owned(),
    };
    let turn = |role: &str| v1::ChatMessage {
        role: role.to_owned(),
        content: "x".to_owned(),
    };
    let wrong = [
        (ask("a", ""), "empty"),
        (ask("a", " \n"), "empty"),
        (
            v1::PredictRequest {
                input: None,
                ..ask("a", "")
            },
            "empty",
        ),
        (chat(vec![]), "empty"),
        (chat(vec![blank]), "empty"),
        (
            v1::PredictRequest {
                max_new_tokens: CAP + 1,
                ..ask("a", "x")
            },
            "101, the server allows at most 100",
        ),
        (
            chat(vec![turn("robot")]),
            "the role \"robot\", it must be system, user or assistant",
        ),
        (chat(vec![turn("")]), "the role \"\""),
        (chat(vec![turn("user"), turn("User")]), "the role \"User\""),
        (chat(vec![turn("system")]), "no message of the user"),
        (ask("a", "long"), "900 tokens, the model takes at most 512"),
    ];
    for (request, message) in wrong {
        told(
            &client.predict(request).await.unwrap_err(),
            Code::InvalidArgument,
            &[message],
        );
    }
    // Only what needs the tokenizer reached the predictor.
    assert_eq!(server.control.batches(), [["long"]]);
    server.stop().await
}

#[tokio::test]
async fn text_that_is_not_utf8_is_an_invalid_argument() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let mut client = tonic::client::Grpc::new(server.channel().await?);
    client.ready().await?;
    let path = PathAndQuery::from_static("/lengthwise.v1.LengthPredictor/Predict");
    let codec = tonic_prost::ProstCodec::<RawRequest, v1::PredictResponse>::default();
    let request = Request::new(RawRequest {
        instruction: vec![b'a', 0xff],
    });
    let status = client.unary(request, path, codec).await.unwrap_err();
    told(&status, Code::InvalidArgument, &["UTF-8"]);
    server.stop().await
}

#[tokio::test]
async fn a_batch_fails_as_a_whole_and_names_the_request() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let mut client = server.client().await?;
    let mut fails = async |requests| {
        client
            .predict_batch(v1::PredictBatchRequest { requests })
            .await
            .unwrap_err()
    };
    let status = fails(vec![ask("a", "x"), ask("b", "")]).await;
    told(&status, Code::InvalidArgument, &["request 1", "\"b\"", "empty"]);
    let status = fails(vec![ask("a", "x"); MAX_BATCH_REQUESTS + 1]).await;
    told(&status, Code::InvalidArgument, &["1025", "1024"]);
    assert!(
        server.control.batches().is_empty(),
        "work was done for a batch that was refused"
    );
    let status = fails(vec![ask("a", "x"), ask("b", "y"), ask("c", "long")]).await;
    told(&status, Code::InvalidArgument, &["request 2", "\"c\"", "512"]);
    server.stop().await
}

#[tokio::test]
async fn a_message_above_the_limit_of_bytes_is_an_invalid_argument() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let mut client = server.client().await?;
    let large = || ask("a", &"x".repeat(5 << 20));
    let status = client.predict(large()).await.unwrap_err();
    told(&status, Code::InvalidArgument, &["5242", "4194304 bytes"]);
    let requests = vec![large()];
    let status = client
        .predict_batch(v1::PredictBatchRequest { requests })
        .await
        .unwrap_err();
    told(&status, Code::InvalidArgument, &["4194304 bytes"]);
    let stream = client
        .predict_stream(tokio_stream::iter([ask("a", "1"), large()]))
        .await?;
    let mut answers: Vec<_> = stream.into_inner().collect().await;
    let status = answers.pop().unwrap().unwrap_err();
    told(&status, Code::InvalidArgument, &["request 1: ", "4194304 bytes"]);
    assert_eq!(answers.len(), 1);
    server.stop().await
}

/// What a stream of `requests` is answered: the ids, and the error at its end.
async fn streamed(server: &Running, requests: Vec<v1::PredictRequest>) -> Result<(Vec<String>, Status)> {
    let mut client = server.client().await?;
    let stream = client.predict_stream(tokio_stream::iter(requests)).await?;
    let mut answers: Vec<_> = stream.into_inner().collect().await;
    let status = answers.pop().unwrap().unwrap_err();
    let ids = answers.into_iter().map(|answer| answer.unwrap().request_id);
    Ok((ids.collect(), status))
}

#[tokio::test]
async fn a_refused_request_ends_its_stream_after_the_answers_before_it_and_those_alone() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    // Many times, since answers and requests are taken in an order of chance.
    for _ in 0..50 {
        let requests = vec![ask("a", "1"), ask("b", "22"), ask("c", ""), ask("d", "4444")];
        let (mut ids, status) = streamed(&server, requests).await?;
        told(&status, Code::InvalidArgument, &["request 2", "\"c\"", "empty"]);
        ids.sort();
        assert_eq!(ids, ["a", "b"]);
    }
    server.stop().await
}

#[tokio::test]
async fn a_request_that_the_predictor_refuses_ends_its_stream_after_the_answers_before_it() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let requests = vec![ask("a", "1"), ask("b", "long"), ask("c", "333")];
    let (ids, status) = streamed(&server, requests).await?;
    told(&status, Code::InvalidArgument, &["request 1", "\"b\"", "at most 512"]);
    assert!(ids.contains(&"a".to_owned()), "{ids:?}");
    server.stop().await
}

#[tokio::test]
async fn what_the_predictor_did_wrong_is_internal_and_the_next_request_is_answered() -> Result<()> {
    let server = Running::start(BatchingConfig::default()).await?;
    let mut client = server.client().await?;
    for (text, message) in [
        ("fail", "out of memory"),
        ("panic", "told to panic"),
        ("short", "0 answers to 1 prompts"),
    ] {
        told(
            &client.predict(ask("a", text)).await.unwrap_err(),
            Code::Internal,
            &[message],
        );
        assert_eq!(client.predict(ask("a", "good")).await?.into_inner().max_tokens, 4);
    }
    server.stop().await
}
