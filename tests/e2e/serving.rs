//! `serve` and `predict`, as their users see them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Child;

use anyhow::{Context, Result};
use lengthwise_predictor::RemotePredictor;
use serde_json::Value;

use crate::support::{Run, run, start_server, start_server_that_says, succeed};

const SERVE: [&str; 5] = ["serve", "--json", "-q", "--listen", "127.0.0.1:0"];

/// Ends the server with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The one line on standard error that begins with "error: ".
fn error_of(run: &Run) -> &str {
    let mut errors = run.stderr.lines().filter(|line| line.starts_with("error: "));
    let error = errors.next().unwrap_or_default();
    assert!(errors.next().is_none(), "{}", run.stderr);
    error
}

#[test]
fn a_text_that_is_refused_is_named_after_the_others_were_predicted() -> Result<()> {
    let (server, url) = start_server(&SERVE)?;
    let _server = Running(server);
    let long = "word ".repeat(3000);
    for source in [&["--seed", "0"], &["--predictor", &url]] {
        let texts = ["Tell me a story.", " ", "Spell the word cat.", &long];
        let args = [&["predict", "--json"], &source[..], &texts].concat();
        let got = run(&args)?;
        assert_eq!(got.code, Some(1), "{source:?}: {}", got.stderr);
        let error = error_of(&got);
        assert!(error.starts_with("error: text 2 of 4: "), "{error}");
        assert!(
            error.contains("empty; text 4 of 4: ") && error.contains("the model takes at most"),
            "{error}"
        );
        let value: Value = serde_json::from_str(&got.stdout)?;
        let predictions = value["predictions"].as_array().context("a list")?;
        let places: Vec<_> = predictions.iter().map(|p| p["index"].as_u64()).collect();
        assert_eq!(places, [Some(0), Some(2)], "{source:?}");
        // The only text is no other case.
        let got = run(&[&["predict"], &source[..], &[""]].concat())?;
        assert_eq!((got.code, got.stdout.as_str()), (Some(1), ""), "{source:?}");
        assert!(error_of(&got).starts_with("error: text 1 of 1: "), "{}", got.stderr);
    }
    Ok(())
}

#[test]
fn an_address_that_asks_for_encryption_is_sent_nothing() -> Result<()> {
    let (server, url) = start_server(&[&SERVE[..], &["--constant", "50"]].concat())?;
    let _server = Running(server);
    let secure = url.replace("http://", "https://");
    let got = run(&["predict", "--predictor", &secure, "x"])?;
    assert_eq!(got.code, Some(1));
    let error = error_of(&got);
    assert!(
        error.contains(&secure) && error.contains("TLS is not supported"),
        "{error}"
    );
    Ok(())
}

#[test]
fn a_constant_is_served_with_a_queue_of_any_size_and_says_that_there_is_no_model() -> Result<()> {
    let capacity = ["--constant", "50", "--queue-capacity", "18446744073709551615"];
    let (server, url) = start_server(&[&SERVE[..], &capacity].concat())?;
    let _server = Running(server);
    let remote = RemotePredictor::connect(&url)?;
    let info = remote.model_info();
    assert_eq!((info.model.as_str(), info.method.as_str()), ("", "constant"));
    assert_eq!(info.max_prompt_tokens, 0, "any");
    Ok(())
}

#[test]
fn metrics_are_explained_and_histograms_have_bounds() -> Result<()> {
    let metrics = ["--constant", "50", "--metrics-listen", "127.0.0.1:0"];
    let (server, said) = start_server_that_says(&[&SERVE[..], &metrics].concat())?;
    let _server = Running(server);
    let url = format!("http://{}", said["listening"].as_str().context("an address")?);
    succeed(&["predict", "--predictor", &url, "a", "b"])?;
    let mut stream = TcpStream::connect(said["metrics"].as_str().context("an address")?)?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    for line in [
        "# HELP lengthwise_predict_batch_size ",
        "# TYPE lengthwise_predict_batch_size histogram",
        "lengthwise_predict_batch_size_bucket{le=\"2\"} ",
        "lengthwise_predict_batch_size_sum 2",
        "# HELP lengthwise_queue_depth ",
        "lengthwise_predict_duration_seconds_bucket{le=\"0.001\"} ",
    ] {
        assert!(text.lines().any(|l| l.starts_with(line)), "no {line:?} in\n{text}");
    }
    assert!(!text.contains("quantile="), "{text}");
    Ok(())
}

#[test]
fn the_help_of_serve_tells_the_limits_that_no_flag_changes() -> Result<()> {
    let help = succeed(&["serve", "--help"])?.stdout;
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in ["at most 1024 requests", "for 30 s at most"] {
        assert!(help.contains(part), "no {part:?} in\n{help}");
    }
    Ok(())
}
