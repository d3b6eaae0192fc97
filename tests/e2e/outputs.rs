//! Nothing that is there already is lost, and outputs go where they were sent.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde_json::Value;

use crate::support::{Folder, Run, binary, finish, run, succeed};

/// A folder with `lengths.jsonl` and `pairs.jsonl` of eight instructions.
fn labelled() -> Result<Folder> {
    let folder = Folder::new(1)?;
    let record = |i: usize| {
        let samples = format!("[{{\"temperature\":0.0,\"tokens\":{},\"finish\":\"stop\"}}]", 10 + i);
        format!("{{\"id\":\"q{i}\",\"instruction\":\"say {i}\",\"samples\":{samples}}}\n")
    };
    fs::write(folder.path("lengths.jsonl"), (0..8).map(record).collect::<String>())?;
    label(&folder, &folder.text("pairs.jsonl"))?;
    Ok(folder)
}

fn label(folder: &Folder, output: &str) -> Result<Run> {
    succeed(&[
        "label",
        "-q",
        "--input",
        &folder.text("lengths.jsonl"),
        "--output",
        output,
    ])
}

fn train(folder: &Folder, output: &str, flags: &[&str]) -> Result<Run> {
    let (pairs, output) = (folder.text("pairs.jsonl"), folder.text(output));
    let mut args = vec!["train", "--data", &pairs, "--output", &output, "--batch-size", "4"];
    args.extend(["--gradient-accumulation-steps", "1", "--epochs", "1"]);
    args.extend(flags);
    run(&args)
}

/// That a run ended with `code` and said `text`.
fn says(run: &Run, code: i32, text: &str) {
    assert!(run.code == Some(code) && run.stderr.contains(text), "{}", run.stderr);
}

/// Arguments of a short `collect`.
fn collecting<'a>(input: &'a str, output: &'a str) -> [&'a str; 7] {
    ["collect", "--input", input, "--output", output, "--max-new-tokens", "5"]
}

#[test]
fn a_finished_adapter_is_not_replaced() -> Result<()> {
    let folder = labelled()?;
    let head = ["--objective", "head"];
    let done = train(&folder, "head", &head)?;
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let files = [
        "adapter_model.safetensors",
        "length_head.safetensors",
        "adapter_config.json",
    ];
    let bytes = || files.map(|name| fs::read(folder.path("head").join(name)).expect("there"));
    let before = bytes();
    let refused = train(&folder, "head", &[])?;
    let said = refused.stderr.lines().last().unwrap_or_default();
    assert!(
        refused.code == Some(1) && said.contains("choose another --output"),
        "{said}"
    );
    let finished = train(&folder, "head", &["--objective", "head", "--resume"])?;
    says(&finished, 0, "which is finished");
    let other = train(&folder, "head", &["--objective", "head", "--resume", "--seed", "5"])?;
    says(&other, 1, "(seed 0, now 5)");
    assert!(before == bytes(), "something was written");
    // Whoever may read the settings may read the weights.
    let mode = |name: &str| fs::metadata(folder.path("head").join(name)).map(|m| m.permissions().mode());
    assert_eq!(mode("adapter_model.safetensors")?, mode("adapter_config.json")?);
    assert_eq!(mode("length_head.safetensors")?, mode("adapter_config.json")?);
    let begun = train(&folder, "new", &["--objective", "head", "--resume"])?;
    says(&begun, 0, "holds no checkpoint");
    Ok(())
}

#[test]
fn an_example_that_is_too_long_is_named() -> Result<()> {
    let folder = labelled()?;
    let long = format!(
        "{{\"id\":\"long one\",\"instruction\":\"{}\",\"label\":50}}\n",
        "word ".repeat(3000)
    );
    fs::write(folder.path("pairs.jsonl"), folder.read("pairs.jsonl")? + &long)?;
    let refused = train(&folder, "adapter", &[])?;
    says(&refused, 1, "example \"long one\" of the training data has");
    Ok(())
}

#[test]
fn pairs_do_not_replace_the_samples() -> Result<()> {
    let folder = labelled()?;
    let before = folder.read("lengths.jsonl")?;
    let lengths = folder.text("lengths.jsonl");
    symlink("lengths.jsonl", folder.path("link.jsonl"))?;
    for output in [lengths.as_str(), &folder.text("link.jsonl")] {
        let refused = run(&["label", "--input", &lengths, "--output", output])?;
        says(&refused, 2, "is the input");
    }
    assert_eq!(folder.read("lengths.jsonl")?, before);
    Ok(())
}

#[test]
fn what_cannot_be_labelled_is_placed() -> Result<()> {
    let folder = labelled()?;
    fs::write(folder.path("lengths.jsonl"), "[{\"id\": \"12\", \"L_t0.0\": 9}]")?;
    let args = [
        "label",
        "--input",
        &folder.text("lengths.jsonl"),
        "--output",
        &folder.text("out"),
    ];
    let refused = run(&args)?;
    says(&refused, 1, "lengths.jsonl: record 12 has no instruction");
    Ok(())
}

#[test]
fn an_output_through_a_link_or_to_standard_output_leaves_both_as_they_are() -> Result<()> {
    let folder = labelled()?;
    let pairs = folder.read("pairs.jsonl")?;
    symlink("target.jsonl", folder.path("link.jsonl"))?;
    label(&folder, &folder.text("link.jsonl"))?;
    assert_eq!(folder.read("target.jsonl")?, pairs);
    assert_eq!(fs::read_link(folder.path("link.jsonl"))?, Path::new("target.jsonl"));
    // A link of ours to the same place: a failure of this test must not touch the system's.
    symlink("/proc/self/fd/1", folder.path("stdout"))?;
    let printed = label(&folder, &folder.text("stdout"))?;
    assert_eq!(printed.stdout, pairs);
    assert!(fs::symlink_metadata(folder.path("stdout"))?.is_symlink());
    Ok(())
}

#[test]
fn what_cannot_be_printed_is_a_failure_and_a_reader_that_has_gone_is_none() -> Result<()> {
    let folder = labelled()?;
    let (lengths, pairs) = (folder.text("lengths.jsonl"), folder.text("pairs.jsonl"));
    let commands: [&[&str]; 3] = [
        &["predict", "Count to five."],
        &["eval", "--json", "--data", &pairs, "--method", "constant"],
        &["simulate", "--lengths", &lengths, "--strategy", "vanilla"],
    ];
    for args in commands {
        let mut command = Command::new(binary()?);
        command.args(args).arg("-q");
        // Only Linux has that one.
        if Path::new("/dev/full").exists() {
            let got = finish(command.stdout(fs::File::create("/dev/full")?))?;
            assert_eq!(
                (got.code, got.stderr.lines().count()),
                (Some(1), 1),
                "{args:?}: {}",
                got.stderr
            );
            assert!(
                got.stderr.starts_with("error: standard output: "),
                "{args:?}: {}",
                got.stderr
            );
        }
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let quiet = finish(command.stdout(writer))?;
        assert_eq!((quiet.code, quiet.stderr.as_str()), (Some(0), ""), "{args:?}");
    }
    Ok(())
}

#[test]
fn a_folder_in_use_is_not_written_by_pretrain_nor_emptied_by_a_demo_that_cannot_begin() -> Result<()> {
    let folder = labelled()?;
    let refused = run(&["pretrain", "--steps", "1", "--output", &folder.text("")])?;
    says(&refused, 1, "is not empty");
    fs::create_dir(folder.path("demo"))?;
    for name in ["demo.json", "train-pairs.jsonl"] {
        fs::write(folder.path("demo").join(name), "{}\n")?;
    }
    let refused = run(&[
        "demo",
        "--output",
        &folder.text("demo"),
        "--model",
        &folder.text("nowhere"),
    ])?;
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    assert!(folder.path("demo/train-pairs.jsonl").is_file());
    Ok(())
}

#[test]
fn pretrain_says_what_it_made() -> Result<()> {
    let folder = Folder::new(1)?;
    let output = folder.text("model");
    let made = succeed(&[
        "pretrain",
        "-q",
        "--json",
        "--steps",
        "1",
        "--batch-tokens",
        "1",
        "--output",
        &output,
    ])?;
    let value: Value = serde_json::from_str(&made.stdout)?;
    assert_eq!(value["steps"], 1);
    assert!(folder.path("model/model.safetensors").is_file());
    Ok(())
}

#[test]
fn a_conversation_is_learnt_from_as_it_was_sampled() -> Result<()> {
    let folder = Folder::new(1)?;
    let turn = |who: &str, text: &str| format!("{{\"from\":\"{who}\",\"value\":\"{text}\"}}");
    let several = [
        turn("human", "Hello."),
        turn("gpt", "Hi."),
        turn("human", "Name a colour."),
    ]
    .join(",");
    let one = turn("human", "Name a colour.");
    let text = format!("[{{\"id\":\"a\",\"conversations\":[{several}]}},{{\"id\":\"b\",\"conversations\":[{one}]}}]");
    fs::write(folder.path("chat.json"), text)?;
    let (input, output) = (folder.text("chat.json"), folder.text("lengths.jsonl"));
    let args = collecting(&input, &output);
    succeed(&args)?;
    label(&folder, &folder.text("pairs.jsonl"))?;
    for name in ["lengths.jsonl", "pairs.jsonl"] {
        let text = folder.read(name)?;
        let records = text
            .lines()
            .map(serde_json::from_str)
            .collect::<serde_json::Result<Vec<Value>>>()?;
        assert_eq!(records[0]["messages"][1]["content"], "Hi.", "{name}");
        assert_eq!(records[1].get("messages"), None, "{name}");
    }
    let trained = train(&folder, "adapter", &[])?;
    assert_eq!(trained.code, Some(0), "{}", trained.stderr);
    Ok(())
}

#[test]
fn an_unfinished_collection_does_not_go_on_in_another_dtype() -> Result<()> {
    let folder = Folder::new(2)?;
    let (input, output) = (folder.text("in.jsonl"), folder.text("lengths.jsonl"));
    let args = collecting(&input, &output);
    succeed(&args)?;
    // As if it had been killed before the end: its settings and one record.
    let settings = "{\"model\":\"tiny\",\"dtype\":\"f32\",\"kv_cache_dtype\":\"f32\",\"temperatures\":[0.0,0.3,0.5,0.7],\
        \"top_p\":1.0,\"top_k\":0,\"samples_per_temperature\":1,\"max_new_tokens\":5,\"seed\":0,\"save_text\":false}";
    let lengths = folder.read("lengths.jsonl")?;
    let first = lengths.lines().next().unwrap_or_default();
    fs::write(folder.path("lengths.jsonl.partial"), format!("{settings}\n{first}\n"))?;
    fs::remove_file(folder.path("lengths.jsonl"))?;
    let other: Vec<&str> = args.iter().copied().chain(["--dtype", "bf16"]).collect();
    let refused = run(&other)?;
    says(&refused, 1, "dtype \"f32\", now \"bf16\"");
    succeed(&args)?;
    assert_eq!(folder.read("lengths.jsonl")?, lengths);
    Ok(())
}
