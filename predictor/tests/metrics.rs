//! What the metrics count. A binary of its own: the recorder is the process's.
#![allow(clippy::unwrap_used)]

use anyhow::Result;
use lengthwise_core::{LengthEstimate, LengthPredictor, PredictError, PredictInput, Prompt};
use lengthwise_predictor::{BatchingConfig, PredictorServer, ServerInfo};
use lengthwise_proto::v1;
use lengthwise_proto::v1::length_predictor_client::LengthPredictorClient;
use metrics_exporter_prometheus::PrometheusBuilder;

/// Finds a number in no answer to "?".
struct Unsure;

impl LengthPredictor for Unsure {
    fn predict(&mut self, inputs: &[PredictInput]) -> Result<Vec<Result<LengthEstimate, PredictError>>, PredictError> {
        let unsure = Prompt::Instruction("?".to_owned());
        let one = |input: &PredictInput| match input.prompt == unsure {
            true => LengthEstimate::fallback(9),
            false => LengthEstimate::of(9),
        };
        Ok(inputs.iter().map(|input| Ok(one(input))).collect())
    }
}

fn ask(text: &str) -> v1::PredictRequest {
    let input = v1::predict_request::Input::Instruction(text.to_owned());
    v1::PredictRequest {
        input: Some(input),
        ..v1::PredictRequest::default()
    }
}

#[tokio::test]
async fn every_prediction_is_counted_by_its_code() -> Result<()> {
    let metrics = PrometheusBuilder::new().install_recorder()?;
    let server = PredictorServer::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", server.address());
    let info = ServerInfo {
        model: String::new(),
        adapter: String::new(),
        method: String::new(),
        max_new_tokens: 10,
        max_prompt_tokens: 10,
        fingerprint: String::new(),
    };
    tokio::spawn(server.serve(
        Box::new(Unsure),
        BatchingConfig::default(),
        info,
        std::future::pending(),
    ));
    let mut client = LengthPredictorClient::connect(url).await?;
    client.predict(ask("a")).await?;
    client.predict(ask("")).await.unwrap_err();
    let requests = vec![ask("a"), ask("?"), ask("b")];
    client.predict_batch(v1::PredictBatchRequest { requests }).await?;

    let text = metrics.render();
    let value = |name: &str| {
        let line = text
            .lines()
            .find(|line| line.starts_with(name) && line[name.len()..].starts_with(' '));
        line.unwrap_or_else(|| panic!("no {name} in\n{text}"))
            .rsplit(' ')
            .next()
            .unwrap()
            .to_owned()
    };
    assert_eq!(value("lengthwise_predict_requests_total{code=\"OK\"}"), "4");
    assert_eq!(
        value("lengthwise_predict_requests_total{code=\"INVALID_ARGUMENT\"}"),
        "1"
    );
    assert_eq!(value("lengthwise_predict_duration_seconds_count"), "5");
    // However they were put together, four prompts were predicted.
    assert_eq!(value("lengthwise_predict_batch_size_sum"), "4");
    assert_eq!(value("lengthwise_predict_fallback_total"), "1");
    assert_eq!(value("lengthwise_queue_depth"), "0");
    let named = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    for name in named.filter_map(|line| line.split(' ').next()) {
        assert!(
            text.contains(&format!("# HELP {name} ")),
            "{name} is not explained:\n{text}"
        );
    }
    Ok(())
}
