//! An adapter with a length head under every command that takes an adapter.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::support::{Folder, run, start_server, succeed};

/// A folder with pairs of made-up lengths and a head trained on them for a few steps, with these flags.
fn trained_with(flags: &[&str]) -> Result<Folder> {
    let folder = Folder::new(40)?;
    let input = folder.read("in.jsonl")?;
    let pair = |(i, line): (usize, &str)| -> Result<String> {
        let mut value: Value = serde_json::from_str(line)?;
        let lengths: Vec<usize> = (0..4).map(|sample| 5 + (i * 7 + sample * 3) % 40).collect();
        value["label"] = 50.into();
        value["lengths"] = lengths.into();
        Ok(format!("{value}\n"))
    };
    let pairs = input.lines().enumerate().map(pair).collect::<Result<String>>()?;
    fs::write(folder.path("pairs.jsonl"), pairs)?;
    let (data, output) = (folder.text("pairs.jsonl"), folder.text("head"));
    let train = [
        "train",
        "-q",
        "--objective",
        "head",
        "--max-tokens",
        "60",
        "--epochs",
        "2",
    ];
    succeed(&[&train[..], &["--data", &data, "--output", &output], flags].concat())?;
    Ok(folder)
}

fn trained() -> Result<Folder> {
    trained_with(&[])
}

/// The quantiles of the first prediction: they must ascend.
fn quantiles(json: &str) -> Result<Vec<(f64, u64)>> {
    let value: Value = serde_json::from_str(json)?;
    let list = value["predictions"][0]["quantiles"].as_array().context("a list")?;
    let pair = |q: &Value| Some((q["probability"].as_f64()?, q["tokens"].as_u64()?));
    let pairs: Vec<(f64, u64)> = list.iter().map(pair).collect::<Option<_>>().context("pairs")?;
    assert!(pairs.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{pairs:?}");
    Ok(pairs)
}

#[test]
fn every_command_uses_the_head_of_an_adapter() -> Result<()> {
    let folder = trained()?;
    let (input, data, head) = (folder.text("in.jsonl"), folder.text("pairs.jsonl"), folder.text("head"));

    let local = succeed(&["predict", "--json", "-q", "--adapter", &head, "Tell me a story."])?.stdout;
    let wanted = quantiles(&local)?;
    assert_eq!(wanted.len(), 8);

    let (mut server, url) = start_server(&["serve", "--json", "-q", "--listen", "127.0.0.1:0", "--adapter", &head])?;
    let remote = succeed(&["predict", "--json", "-q", "--predictor", &url, "Tell me a story."])?.stdout;
    Command::new("kill")
        .args(["-TERM", &server.id().to_string()])
        .status()?;
    server.wait()?;
    assert_eq!(quantiles(&remote)?, wanted, "the same over gRPC");

    let eval = succeed(&["eval", "--json", "-q", "--data", &data, "--adapter", &head])?.stdout;
    let eval: Value = serde_json::from_str(&eval)?;
    let coverage = eval["predictors"][0]["coverage_90"]
        .as_f64()
        .context("it has quantiles")?;
    assert!((0.8..=1.0).contains(&coverage), "{coverage}");

    let output = folder.text("answers.jsonl");
    let generate = ["generate", "-q", "--max-new-tokens", "60", "--admit-quantile", "0.75"];
    let flags = ["--input", &input, "--output", &output, "--adapter", &head];
    succeed(&[&generate[..], &flags].concat())?;
    assert_eq!(folder.read("answers.jsonl")?.lines().count(), 40);
    let bench = [
        "bench",
        "-q",
        "--json",
        "--max-new-tokens",
        "60",
        "--strategy",
        "seqsch,continuous",
    ];
    succeed(&[&bench[..], &["--input", &input, "--num", "16", "--adapter", &head]].concat())?;
    Ok(())
}

/// `generate` with the head of `folder` and these flags: the answers, and what was predicted of each.
fn answers(folder: &Folder, name: &str, flags: &[&str]) -> Result<(Vec<Value>, Vec<Option<u64>>)> {
    let (answers, predicted, _) = answers_and_log(folder, name, flags)?;
    Ok((answers, predicted))
}

/// As [`answers`], with what was logged.
fn answers_and_log(folder: &Folder, name: &str, flags: &[&str]) -> Result<(Vec<Value>, Vec<Option<u64>>, String)> {
    let (input, output, head) = (folder.text("in.jsonl"), folder.text(name), folder.text("head"));
    let files = [
        "generate",
        "--max-new-tokens",
        "60",
        "--input",
        &input,
        "--output",
        &output,
        "--adapter",
        &head,
    ];
    let run = succeed(&[&files[..], flags].concat())?;
    assert_eq!(
        run.stderr.contains("predicted in the decoder's passes"),
        flags.contains(&"fcfs"),
        "{}",
        run.stderr
    );
    let mut answers = Vec::new();
    let mut predicted = Vec::new();
    for line in folder.read(name)?.lines() {
        let mut value: Value = serde_json::from_str(line)?;
        predicted.push(value["predicted_max_tokens"].take().as_u64());
        answers.push(value);
    }
    Ok((answers, predicted, run.stderr))
}

#[test]
fn an_activated_adapter_predicts_from_a_few_tokens_what_it_predicts_from_all() -> Result<()> {
    let folder = trained_with(&["--alora"])?;
    let config: Value = serde_json::from_str(&folder.read("head/adapter_config.json")?)?;
    let invocation = config["alora_invocation_tokens"]
        .as_array()
        .context("PEFT's key")?
        .len();
    assert!(invocation > 0);
    let (want, before) = answers(&folder, "before.jsonl", &["--order", "ljf", "--batch-size", "4"])?;
    for cache in ["65536", "256"] {
        let flags = ["--order", "fcfs", "--batch-size", "4", "--kv-cache-tokens", cache];
        let (got, predicted, log) = answers_and_log(&folder, &format!("{cache}.jsonl"), &flags)?;
        assert_eq!(got, want, "{cache} tokens of cache");
        assert_eq!(predicted, before, "{cache} tokens of cache");
        if cache == "65536" {
            let tokens = format!(
                "40 of 40 lengths were predicted in the decoder's passes, from {} tokens",
                40 * invocation
            );
            assert!(log.contains(&tokens), "{log}");
        }
    }
    Ok(())
}

#[test]
fn lengths_predicted_in_the_decoders_passes_are_those_predicted_before() -> Result<()> {
    let folder = trained()?;
    let (want, before) = answers(&folder, "before.jsonl", &["--order", "ljf", "--batch-size", "4"])?;
    assert!(before.iter().all(Option::is_some));
    // Room for all, and for little more than one that reaches the cap.
    for cache in ["65536", "256"] {
        let flags = ["--order", "fcfs", "--batch-size", "4", "--kv-cache-tokens", cache];
        let (got, predicted) = answers(&folder, &format!("{cache}.jsonl"), &flags)?;
        assert_eq!(got, want, "{cache} tokens of cache");
        let told = predicted.iter().zip(&before).filter(|(got, _)| got.is_some());
        assert!(told.clone().count() >= 30, "{predicted:?}");
        assert!(
            told.clone().all(|(got, want)| got == want),
            "{predicted:?}, want {before:?}"
        );
    }
    Ok(())
}

#[test]
fn a_damaged_head_is_one_line_and_exit_code_1() -> Result<()> {
    let folder = trained()?;
    let head = folder.text("head");
    let weights = folder.path("head/length_head.safetensors");
    let bytes = fs::read(&weights)?;
    fs::write(&weights, &bytes[..bytes.len() / 2])?;
    let cut = run(&["predict", "--adapter", &head, "x"])?;
    fs::write(&weights, &bytes)?;
    fs::write(folder.path("head/length_head.json"), "{")?;
    let malformed = run(&["predict", "--adapter", &head, "x"])?;
    for (run, want) in [(cut, "length_head.safetensors"), (malformed, "length_head.json")] {
        let errors: Vec<&str> = run.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(
            run.code == Some(1) && errors.len() == 1 && errors[0].contains(want),
            "{}",
            run.stderr
        );
    }
    Ok(())
}

/// What the README says of the demo: its best predictor is five times as good as always saying the median.
#[test]
#[ignore = "runs the whole demo, some minutes"]
fn the_demos_head_beats_the_median_five_times_over() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let output = dir.path().join("demo");
    succeed(&["demo", "-q", "--output", output.to_str().context("a path in UTF-8")?])?;
    let report: Value = serde_json::from_str(&std::fs::read_to_string(output.join("demo.json"))?)?;
    let error = |name: &str| -> Result<f64> {
        let rows = report["predictors"].as_array().context("predictors")?;
        let row = rows.iter().find(|row| row["predictor"] == name);
        row.and_then(|row| row["error"].as_f64()).context("an error")
    };
    let (head, median) = (error("head")?, error("median")?);
    assert!(5.0 * head <= median, "{head} against {median}");
    Ok(())
}
