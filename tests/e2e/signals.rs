//! Long jobs are asked to end by a signal, and go on with the same command.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::support::{Folder, binary, run, start_server, succeed, workspace};

/// Starts the binary and sends it the signals one after the other as soon as `ready` holds.
fn signal_when(args: &[&str], signals: &[&str], ready: impl Fn() -> bool) -> Result<Output> {
    let mut child = Command::new(binary()?)
        .current_dir(workspace())
        .env_remove("RUST_LOG")
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let began = Instant::now();
    while !ready() {
        if let Some(status) = child.try_wait()? {
            bail!("it ended ({status}) before it could be sent a signal");
        }
        ensure!(began.elapsed() < Duration::from_secs(120), "it never became ready");
        std::thread::sleep(Duration::from_millis(2));
    }
    for signal in signals {
        let sent = Command::new("kill")
            .args([signal, child.id().to_string().as_str()])
            .status()?;
        ensure!(sent.success(), "kill {signal} failed");
    }
    Ok(child.wait_with_output()?)
}

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// Runs `generate` undisturbed, then stopped by `signals` and run again: the answers must be the same bytes.
fn stops_and_goes_on(flags: &[&str], signals: &[&str]) -> Result<String> {
    let folder = Folder::new(150)?;
    let (input, whole, stopped) = (
        folder.text("in.jsonl"),
        folder.text("whole.jsonl"),
        folder.text("out.jsonl"),
    );
    let args = |output: &str| -> Vec<String> {
        let mut args: Vec<String> = ["generate", "-q", "--batch-size", "4", "--temperature", "0.7"]
            .map(str::to_owned)
            .to_vec();
        args.extend(["--input", &input, "--output", output].map(str::to_owned));
        args.extend(flags.iter().map(|flag| (*flag).to_owned()));
        args
    };
    let (undisturbed, again) = (args(&whole), args(&stopped));
    succeed(&undisturbed.iter().map(String::as_str).collect::<Vec<_>>())?;
    let again: Vec<&str> = again.iter().map(String::as_str).collect();
    let journal = folder.path("out.jsonl.partial");
    // The first line is the settings'.
    let output = signal_when(&again, signals, || lines(&journal) > 8)?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    ensure!(
        !folder.path("out.jsonl").exists(),
        "it was stopped too late to mean anything"
    );
    let kept = lines(&journal) - 1;
    ensure!((8..150).contains(&kept), "{kept} answers were kept");
    let journal = fs::read_to_string(&journal)?;
    assert!(!journal.contains("cancelled"), "what was cut short is no answer");
    // Other instructions under the same ids, and the same ones rounded otherwise, do not take these answers over.
    let asked = folder.read("in.jsonl")?;
    fs::write(&input, asked.replace("\"instruction\":\"", "\"instruction\":\"Now: "))?;
    let other = run(&again)?;
    assert!(
        other.code == Some(1) && other.stderr.contains("holds the answer to request"),
        "{}",
        other.stderr
    );
    fs::write(&input, asked)?;
    let narrow = run(&[&again[..], &["--kv-cache-dtype", "f16"]].concat())?;
    assert!(
        narrow.code == Some(1) && narrow.stderr.contains("kv_cache_dtype"),
        "{}",
        narrow.stderr
    );
    succeed(&again)?;
    assert_eq!(folder.read("out.jsonl")?, folder.read("whole.jsonl")?);
    let said = String::from_utf8(output.stderr).context("it speaks UTF-8")?;
    Ok(said.replace(&kept.to_string(), "KEPT"))
}

#[test]
fn ctrl_c_ends_continuous_batching_in_good_order() -> Result<()> {
    let said = stops_and_goes_on(&["--strategy", "continuous"], &["-INT"])?;
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        said.starts_with("error: stopped: KEPT of 150 answers for ")
            && said
                .trim_end()
                .ends_with("out.jsonl are kept; the same command goes on from there"),
        "{said}"
    );
    Ok(())
}

#[test]
fn sigterm_ends_static_batches_in_good_order() -> Result<()> {
    let said = stops_and_goes_on(&["--strategy", "vanilla"], &["-TERM"])?;
    assert!(said.starts_with("error: stopped: KEPT of 150 answers"), "{said}");
    Ok(())
}

#[test]
fn two_signals_end_it_at_once_and_lose_nothing_that_has_ended() -> Result<()> {
    stops_and_goes_on(&["--strategy", "continuous"], &["-TERM", "-INT"])?;
    Ok(())
}

#[test]
fn answers_go_on_with_the_predictor_that_they_were_begun_with_and_no_other() -> Result<()> {
    let folder = Folder::new(150)?;
    let (input, output) = (folder.text("in.jsonl"), folder.text("out.jsonl"));
    let mut servers = Vec::new();
    let mut serve = |tokens: &str| -> Result<String> {
        let (server, url) = start_server(&["serve", "--json", "--listen", "127.0.0.1:0", "--constant", tokens])?;
        servers.push(server);
        Ok(url)
    };
    let (first, same, other) = (serve("30")?, serve("30")?, serve("40")?);
    let begin = [
        "generate",
        "-q",
        "--batch-size",
        "4",
        "--input",
        &input,
        "--output",
        &output,
    ];
    let journal = folder.path("out.jsonl.partial");
    let stopped = signal_when(&[&begin[..], &["--predictor", &first]].concat(), &["-INT"], || {
        lines(&journal) > 8
    })?;
    assert_eq!(stopped.status.code(), Some(1), "{stopped:?}");
    let others: [&[&str]; 3] = [&["--predictor", &other], &["--strategy", "vanilla"], &[]];
    for flags in others {
        let refused = run(&[&begin[..], flags].concat())?;
        assert_eq!(
            (refused.code, refused.stderr.lines().count()),
            (Some(1), 1),
            "{}",
            refused.stderr
        );
        assert!(
            refused
                .stderr
                .contains("other settings (lengths_predicted_by \"a --predictor (constant "),
            "{}",
            refused.stderr
        );
    }
    // It has come up at another address.
    succeed(&[&begin[..], &["--predictor", &same]].concat())?;
    let answers = folder.read("out.jsonl")?;
    assert!(answers.lines().count() == 150 && answers.lines().all(|l| l.contains("\"predicted_max_tokens\":30")));
    servers.iter_mut().try_for_each(|server| server.kill())?;
    Ok(())
}

#[test]
fn a_training_that_is_asked_to_end_keeps_its_last_step() -> Result<()> {
    let folder = Folder::new(64)?;
    let text = folder.read("in.jsonl")?;
    let pair = |line: &str| line.replacen('}', ",\"label\":50}", 1) + "\n";
    fs::write(folder.path("pairs.jsonl"), text.lines().map(pair).collect::<String>())?;
    let pairs = folder.text("pairs.jsonl");
    let (whole, stopped) = (folder.text("whole"), folder.text("stopped"));
    let args = |output| {
        [
            "train",
            "-q",
            "--data",
            &pairs,
            "--batch-size",
            "4",
            "--epochs",
            "12",
            "--output",
            output,
        ]
        .map(str::to_owned)
    };
    let (undisturbed, again) = (args(&whole), args(&stopped));
    succeed(&undisturbed.iter().map(String::as_str).collect::<Vec<_>>())?;
    let mut again: Vec<&str> = again.iter().map(String::as_str).collect();
    let curve = folder.path("stopped/loss.jsonl");
    let output = signal_when(&again, &["-INT"], || lines(&curve) > 2)?;
    let said = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.lines().count() == 1 && said.starts_with("error: stopped after step ") && said.contains("--resume"),
        "{said}"
    );
    again.push("--resume");
    succeed(&again)?;
    let name = "adapter_model.safetensors";
    let [a, b] = ["whole", "stopped"].map(|run| fs::read(folder.path(run).join(name)));
    assert!(a? == b?, "{name} differs");
    Ok(())
}

#[test]
fn a_collection_that_is_asked_to_end_says_that_the_same_command_goes_on() -> Result<()> {
    let folder = Folder::new(150)?;
    let (input, output) = (folder.text("in.jsonl"), folder.text("lengths.jsonl"));
    let args = ["collect", "-q", "--input", &input, "--output", &output, "--slots", "4"];
    let journal = folder.path("lengths.jsonl.partial");
    let ended = signal_when(&args, &["-TERM"], || lines(&journal) > 4)?;
    let said = String::from_utf8(ended.stderr)?;
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(
        said.lines().count() == 1 && said.starts_with("error: stopped: ") && said.contains("the same command goes on"),
        "{said}"
    );
    assert!(journal.is_file());
    Ok(())
}
