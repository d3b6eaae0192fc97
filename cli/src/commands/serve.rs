//! `serve`: the gRPC predictor.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::routing::get;
use clap::Args;
use clap::builder::RangedU64ValueParser;
use lengthwise_core::LengthPredictor;
use lengthwise_model::LoadedModel;
use lengthwise_predictor::{
    BatchingConfig, ConstantPredictor, MAX_BATCH_REQUESTS, PredictorServer, Question, SHUTDOWN_GRACE, ServerInfo,
};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use tokio::net::TcpListener;

use crate::address::parse_listen;
use crate::args::{Global, QuantizeArgs};
use crate::identity;
use crate::interrupt::StopSignals;
use crate::output::print_json;
use crate::predictions::local_predictor;

/// Longest `--max-wait-ms`: nobody waits longer for an answer.
const LONGEST_WAIT_MS: u64 = 60_000;

/// Flags of `serve`.
#[derive(Args)]
#[command(after_help = limits())]
pub struct ServeArgs {
    /// A length adapter, best one with a head (train --objective head); without one the untuned model is asked (PiA)
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// Say this length of every prompt, without a model
    #[arg(long, conflicts_with = "adapter", value_parser = clap::value_parser!(u32).range(1..))]
    constant: Option<u32>,
    /// Address to listen on; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:50051", value_parser = parse_listen)]
    listen: String,
    /// Address for Prometheus metrics over HTTP, at /metrics
    #[arg(long, value_parser = parse_listen)]
    metrics_listen: Option<String>,
    /// Cap on an estimate, in tokens; also what stands in where the model's answer is no number
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: u32,
    /// Most requests in one forward pass
    #[arg(long, default_value_t = BatchingConfig::default().max_batch_requests)]
    max_batch_requests: NonZeroUsize,
    /// Most prompt tokens in one forward pass, estimated
    #[arg(
        long,
        default_value_t = BatchingConfig::default().max_batch_tokens,
        value_parser = RangedU64ValueParser::<usize>::new().range(1..),
    )]
    max_batch_tokens: usize,
    /// Longest time a request waits for others, in milliseconds; never more than half of the time to its deadline
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(..=LONGEST_WAIT_MS))]
    max_wait_ms: u64,
    /// Requests that may wait; beyond them callers are turned away
    #[arg(long, default_value_t = BatchingConfig::default().capacity)]
    queue_capacity: NonZeroUsize,
    #[command(flatten)]
    weights: QuantizeArgs,
}

/// What no flag changes.
fn limits() -> String {
    format!(
        "One PredictBatch has at most {MAX_BATCH_REQUESTS} requests, one message 4 MiB.\n\
         Ctrl-C and SIGTERM stop the server: it takes no more requests and answers those accepted, for {} s at most; \
         how many were dropped then is the error it ends with.",
        SHUTDOWN_GRACE.as_secs()
    )
}

pub fn run(global: &Global, args: &ServeArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        // Bound first: a port in use is known before the model is loaded.
        let server = PredictorServer::bind(&args.listen).await?;
        let metrics = match &args.metrics_listen {
            Some(address) => Some(bind_metrics(address).await?),
            None => None,
        };
        let (predictor, info) = predictor(global, args)?;
        let address = server.address();
        let model = if info.model.is_empty() { "no model" } else { &info.model };
        tracing::info!("{model} ({}) listening on {address}", info.method);
        let metrics_address = metrics.as_ref().map(|listener| listener.local_addr()).transpose()?;
        if global.json {
            print_json(&serde_json::json!({"listening": address, "metrics": metrics_address}))?;
        }
        if let Some(listener) = metrics {
            serve_metrics(listener)?;
        }
        let batching = BatchingConfig {
            max_batch_requests: args.max_batch_requests,
            max_batch_tokens: args.max_batch_tokens,
            max_wait: Duration::from_millis(args.max_wait_ms),
            capacity: args.queue_capacity,
        };
        let mut signals = StopSignals::new()?;
        let stop = async move { signals.next().await };
        server.serve(predictor, batching, info, stop).await?;
        Ok(())
    })
}

fn predictor(global: &Global, args: &ServeArgs) -> anyhow::Result<(Box<dyn LengthPredictor>, ServerInfo)> {
    let cap = args.max_new_tokens;
    if let Some(max_tokens) = args.constant {
        let info = ServerInfo {
            model: String::new(),
            adapter: String::new(),
            method: "constant".to_owned(),
            max_new_tokens: cap,
            max_prompt_tokens: 0,
            fingerprint: identity::of_constant(max_tokens, cap),
        };
        return Ok((Box::new(ConstantPredictor { max_tokens }), info));
    }
    let model = global.open_quantized(args.weights)?;
    let question = if args.adapter.is_some() {
        Question::Length
    } else {
        Question::Pia
    };
    let info = info(&model, args, question)?;
    Ok((local_predictor(&model, args.adapter.as_deref(), question, cap)?, info))
}

fn info(model: &LoadedModel, args: &ServeArgs, question: Question) -> anyhow::Result<ServerInfo> {
    Ok(ServerInfo {
        model: model.name.clone(),
        adapter: args
            .adapter
            .as_ref()
            .map(|p| p.display().to_string())
            .unwrap_or_default(),
        method: if question == Question::Length { "adapter" } else { "pia" }.to_owned(),
        max_new_tokens: args.max_new_tokens,
        max_prompt_tokens: model.network.config().max_position_embeddings as u32 - 1,
        fingerprint: identity::of_local(model, args.adapter.as_deref(), args.max_new_tokens)?,
    })
}

async fn bind_metrics(address: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address}"))
}

/// Histograms with fixed bounds, which, unlike quantiles, can be added up over servers.
fn recorder() -> anyhow::Result<PrometheusBuilder> {
    let bounds = |name: &str| Matcher::Full(name.to_owned());
    let seconds = [
        0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
    ];
    let requests = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];
    Ok(PrometheusBuilder::new()
        .set_buckets_for_metric(bounds("lengthwise_predict_duration_seconds"), &seconds)?
        .set_buckets_for_metric(bounds("lengthwise_predict_batch_size"), &requests)?)
}

fn serve_metrics(listener: TcpListener) -> anyhow::Result<()> {
    let handle = recorder()?.install_recorder().context("metrics cannot be recorded")?;
    let upkeep = handle.clone();
    tokio::spawn(async move {
        // Histograms grow while nobody scrapes them.
        let mut ticks = tokio::time::interval(Duration::from_secs(5));
        loop {
            ticks.tick().await;
            upkeep.run_upkeep();
        }
    });
    let router = Router::new().route("/metrics", get(move || async move { handle.render() }));
    tokio::spawn(async move {
        if let Err(err) = axum::serve(listener, router).await {
            tracing::warn!("metrics: {err}");
        }
    });
    Ok(())
}
