//! The commands one after the other, killed and resumed, and what they say to bad input.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use crate::support::{Folder, binary, run, start_server, succeed};

/// Starts the binary, and kills it with SIGKILL as soon as `ready` holds.
fn kill_when(args: &[&str], ready: impl Fn() -> bool) -> Result<()> {
    let mut child = Command::new(binary()?)
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let began = Instant::now();
    while !ready() {
        if let Some(status) = child.try_wait()? {
            bail!("it ended ({status}) before it could be killed");
        }
        ensure!(
            began.elapsed() < Duration::from_secs(120),
            "it never became ready to be killed"
        );
        std::thread::sleep(Duration::from_millis(3));
    }
    child.kill()?;
    child.wait()?;
    Ok(())
}

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[test]
fn a_killed_collection_resumes_to_the_same_file() -> Result<()> {
    let folder = Folder::new(60)?;
    let (input, whole, killed) = (
        folder.text("in.jsonl"),
        folder.text("whole.jsonl"),
        folder.text("killed.jsonl"),
    );
    succeed(&["collect", "-q", "--input", &input, "--output", &whole, "--slots", "8"])?;
    let args = ["collect", "-q", "--input", &input, "--output", &killed, "--slots", "8"];
    let journal = folder.path("killed.jsonl.partial");
    kill_when(&args, || lines(&journal) > 8)?;
    ensure!(
        !folder.path("killed.jsonl").exists(),
        "it was killed too late to mean anything"
    );
    // A line that the kill cut short is dropped.
    let mut torn = fs::OpenOptions::new().append(true).open(&journal)?;
    std::io::Write::write_all(&mut torn, b"{\"id\": \"q5")?;
    drop(torn);
    // Another number of slots is another order of work, and no other result.
    succeed(&["collect", "-q", "--input", &input, "--output", &killed, "--slots", "16"])?;
    assert_eq!(folder.read("killed.jsonl")?, folder.read("whole.jsonl")?);
    Ok(())
}

#[test]
fn a_killed_training_resumes_to_the_same_adapter() -> Result<()> {
    resumes("number", &[])
}

#[test]
fn a_killed_training_of_a_head_resumes_to_the_same_head() -> Result<()> {
    resumes("head", &["length_head.safetensors", "length_head.json"])
}

/// Trains once through, and once killed and resumed; the loss curves, the adapters and `others` must be the same bytes.
fn resumes(objective: &str, others: &[&str]) -> Result<()> {
    let folder = Folder::new(48)?;
    let (input, lengths, pairs) = (
        folder.text("in.jsonl"),
        folder.text("lengths.jsonl"),
        folder.text("pairs.jsonl"),
    );
    succeed(&[
        "collect",
        "-q",
        "--input",
        &input,
        "--output",
        &lengths,
        "--temperatures",
        "0",
        "--max-new-tokens",
        "60",
    ])?;
    succeed(&["label", "-q", "--input", &lengths, "--output", &pairs, "--bucket", "10"])?;
    let args = |output: &'static str, resume: bool| {
        let mut args: Vec<String> = ["train", "-q", "--batch-size", "4", "--epochs", "6", "--save-steps", "3"]
            .map(str::to_owned)
            .to_vec();
        args.extend(
            [
                "--learning-rate",
                "1e-3",
                "--gradient-accumulation-steps",
                "1",
                "--eval-steps",
                "10",
            ]
            .map(str::to_owned),
        );
        args.extend([
            "--data".to_owned(),
            pairs.clone(),
            "--eval-data".to_owned(),
            pairs.clone(),
        ]);
        args.extend(["--output".to_owned(), folder.text(output)]);
        args.extend(["--objective".to_owned(), objective.to_owned()]);
        args.extend(resume.then(|| "--resume".to_owned()));
        args
    };
    let run_args = |args: Vec<String>| succeed(&args.iter().map(String::as_str).collect::<Vec<_>>());
    run_args(args("whole", false))?;
    let killed = args("killed", false);
    let curve = folder.path("killed/loss.jsonl");
    kill_when(&killed.iter().map(String::as_str).collect::<Vec<_>>(), || {
        lines(&curve) > 13
    })?;
    ensure!(
        !folder.path("killed/adapter_config.json").exists(),
        "it was killed too late to mean anything"
    );
    let refused = run(&killed.iter().map(String::as_str).collect::<Vec<_>>())?;
    assert!(
        refused.code == Some(1) && refused.stderr.contains("--resume"),
        "{}",
        refused.stderr
    );
    run_args(args("killed", true))?;
    assert_eq!(folder.read("killed/loss.jsonl")?, folder.read("whole/loss.jsonl")?);
    for name in ["adapter_model.safetensors"].iter().chain(others) {
        for within in ["", "last", "best"] {
            let [a, b] = ["killed", "whole"].map(|run| fs::read(folder.path(run).join(within).join(name)));
            assert!(a? == b?, "{within} {name} differs");
        }
    }
    Ok(())
}

#[test]
fn every_strategy_writes_the_same_answers() -> Result<()> {
    let folder = Folder::new(40)?;
    let (input, predictions) = (folder.text("in.jsonl"), folder.text("predictions.jsonl"));
    // Every other one with a distribution, which only the cost planner and the continuous mode go by.
    let line = |i: usize| {
        let most = 5 + (i * 37) % 120;
        let half = format!(", \"quantiles\": [{{\"probability\": 0.5, \"tokens\": {}}}]", most / 2);
        let half = if i.is_multiple_of(2) { &half } else { "" };
        format!("{{\"id\": \"q{i}\", \"max_tokens\": {most}{half}}}\n")
    };
    fs::write(&predictions, (0..40).map(line).collect::<String>())?;
    let answers = |name: &str, args: &[&str]| -> Result<Vec<(String, String)>> {
        let output = folder.text(name);
        let mut all = vec![
            "generate",
            "-q",
            "--input",
            &input,
            "--output",
            &output,
            "--max-new-tokens",
            "200",
        ];
        all.extend(args);
        succeed(&all)?;
        let answer = |line: &str| -> Result<(String, String)> {
            let value: Value = serde_json::from_str(line)?;
            Ok((value["id"].to_string(), value["text"].to_string()))
        };
        folder.read(name)?.lines().map(answer).collect()
    };
    let alone = answers("alone", &["--strategy", "vanilla", "--batch-size", "1"])?;
    let ids: Vec<String> = alone.iter().map(|(id, _)| id.clone()).collect();
    assert_eq!(
        ids,
        (0..40).map(|i| format!("\"q{i}\"")).collect::<Vec<_>>(),
        "answers are in the order of the input"
    );
    let from_file = ["--predictions", &predictions];
    for (name, strategy, flags) in [
        ("vanilla", "vanilla", &[][..]),
        ("seqsch", "seqsch", &["--vbs", "--fcr"]),
        ("fcr", "oracle", &["--fcr"]),
        ("cost", "seqsch", &["--planner", "cost"]),
        ("continuous", "continuous", &["--order", "sjf"]),
    ] {
        let args: Vec<&str> = ["--strategy", strategy]
            .iter()
            .chain(&from_file)
            .chain(flags)
            .copied()
            .collect();
        assert_eq!(answers(name, &args)?, alone, "{name}");
    }
    Ok(())
}

#[test]
fn generate_asks_a_running_predictor_and_survives_its_death() -> Result<()> {
    let folder = Folder::new(12)?;
    let (input, first, second) = (
        folder.text("in.jsonl"),
        folder.text("first.jsonl"),
        folder.text("second.jsonl"),
    );
    let (mut server, url) = start_server(&["serve", "--json", "-q", "--listen", "127.0.0.1:0", "--constant", "77"])?;
    let generate = |output: &str| {
        run(&[
            "generate",
            "--strategy",
            "seqsch",
            "--fcr",
            "--input",
            &input,
            "--output",
            output,
            "--predictor",
            &url,
            "--max-new-tokens",
            "90",
        ])
    };
    let done = generate(&first)?;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(
        folder
            .read("first.jsonl")?
            .matches("\"predicted_max_tokens\":77")
            .count(),
        12
    );
    server.kill()?;
    server.wait()?;
    let done = generate(&second)?;
    // Nobody listens there any more: that is known before anything is decoded.
    assert!(
        done.code == Some(1) && done.stderr.contains("127.0.0.1"),
        "{}",
        done.stderr
    );
    Ok(())
}

#[test]
fn a_server_stops_gracefully_and_says_when_its_port_is_taken() -> Result<()> {
    let (mut server, url) = start_server(&["serve", "--json", "-q", "--listen", "127.0.0.1:0", "--constant", "50"])?;
    let address = url.trim_start_matches("http://").to_owned();
    let second = run(&["serve", "--listen", &address, "--constant", "50"])?;
    assert!(
        second.code == Some(1) && second.stderr.contains(&address),
        "{}",
        second.stderr
    );
    let predicted = succeed(&["predict", "--json", "--predictor", &url, "Tell me a story."])?;
    let value: Value = serde_json::from_str(&predicted.stdout)?;
    assert_eq!(value["predictions"][0]["max_tokens"], 50);
    Command::new("kill")
        .args(["-TERM", &server.id().to_string()])
        .status()?;
    assert!(server.wait()?.success(), "SIGTERM is an orderly end");
    Ok(())
}

#[test]
fn bad_input_is_one_line_and_exit_code_1() -> Result<()> {
    let folder = Folder::new(2)?;
    let write = |name: &str, text: &str| fs::write(folder.path(name), text);
    write(
        "long.jsonl",
        &format!("{{\"id\": \"a\", \"instruction\": \"{}\"}}\n", "word ".repeat(3000)),
    )?;
    write(
        "twice.jsonl",
        "{\"id\": \"a\", \"instruction\": \"x\"}\n{\"id\": \"a\", \"instruction\": \"y\"}\n",
    )?;
    write("torn.jsonl", "{\"id\": \"a\", \"instruction\": \"x\"}\n{\"id\": \n")?;
    fs::create_dir(folder.path("bare"))?;
    fs::copy("../data/tiny/config.json", folder.path("bare/config.json"))?;
    let (output, bare) = (folder.text("out.jsonl"), folder.text("bare"));
    let generate = |input: &str| {
        let input = folder.text(input);
        run(&["generate", "--input", &input, "--output", &output])
    };
    let cases = [
        (generate("long.jsonl")?, "request a: the prompt has"),
        (generate("twice.jsonl")?, "line 2"),
        (generate("torn.jsonl")?, "line 2"),
        (generate("missing.jsonl")?, "missing.jsonl"),
        (run(&["predict", "--model", &bare, "x"])?, "tokenizer"),
        (run(&["predict", "--model", "/nowhere", "x"])?, "/nowhere"),
        (run(&["predict", "--adapter", &bare, "x"])?, "adapter"),
    ];
    for (run, want) in cases {
        assert_eq!(run.code, Some(1), "{}", run.stderr);
        let errors: Vec<&str> = run.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(
            errors.len() == 1 && errors[0].contains(want),
            "{}, want {want}",
            run.stderr
        );
    }
    Ok(())
}
