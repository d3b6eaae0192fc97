//! What the command line says and which code it exits with.

use anyhow::Result;

use crate::support::{Folder, run};

const COMMANDS: [&str; 13] = [
    "demo", "collect", "label", "train", "eval", "predict", "serve", "generate", "bench", "simulate", "report",
    "profile", "pretrain",
];

#[test]
fn help_is_printed_on_standard_output_and_is_no_failure() -> Result<()> {
    let help = run(&["--help"])?;
    assert_eq!(help.code, Some(0), "{}", help.stderr);
    for command in COMMANDS {
        assert!(
            help.stdout.contains(&format!("\n  {command} ")),
            "{command} is not in the list:\n{}",
            help.stdout
        );
        let of_command = run(&[command, "--help"])?;
        assert_eq!(
            (of_command.code, of_command.stderr.as_str()),
            (Some(0), ""),
            "{command}"
        );
        for flag in ["--model", "--device", "--dtype", "--seed", "--json"] {
            assert!(of_command.stdout.contains(flag), "{command} has no {flag}");
        }
    }
    Ok(())
}

#[test]
fn wrong_usage_exits_with_2_and_names_what_is_wrong() -> Result<()> {
    let cases: &[(&[&str], &str)] = &[
        (&["nonsense"], "nonsense"),
        (&["label", "--input", "x"], "--output"),
        (&["label", "--input", "x", "--output", "y", "--bucket", "0"], "--bucket"),
        (
            &["label", "--input", "x", "--output", "y", "--target", "largest"],
            "largest",
        ),
        (&["simulate", "--lengths", "x", "--strategy", "fastest"], "fastest"),
        (
            &[
                "collect",
                "--input",
                "x",
                "--output",
                "y",
                "--endpoint",
                "http://localhost",
            ],
            "--remote-model",
        ),
        (&["predict", "--device", "gpu", "text"], "gpu"),
        (&["predict", "--dtype", "f8", "text"], "f8"),
        (&["predict", "--quantize", "q4_0", "text"], "q8_0"),
        (&["serve", "--listen", "foo"], "host:port"),
        (&["serve", "--metrics-listen", "127.0.0.1:99999"], "host:port"),
        (&["serve", "--constant", "0"], "1..=4294967295"),
        (&["serve", "--max-batch-tokens", "0"], "is not in 1.."),
        (&["serve", "--queue-capacity", "0"], "--queue-capacity"),
        (&["serve", "--max-wait-ms", "18446744073709551615"], "0..=60000"),
        (&["eval", "--data", "x", "--constant", "0"], "1..=4294967295"),
        (&["profile", "--kv-cache-dtype", "q8_0"], "f16"),
        (&["profile", "--kv-cache-tokens", "18446744073709551615"], "2^40"),
        (&["profile", "--contexts", "0"], "--contexts"),
        (
            &["generate", "--input", "x", "--output", "y", "--temperature", "nan"],
            "0 or more",
        ),
        (
            &["generate", "--input", "x", "--output", "y", "--top-p", "0"],
            "above 0 and at most 1",
        ),
        // Weights in 8 bits are run, not trained on.
        (
            &["train", "--data", "x", "--output", "y", "--quantize", "q8_0"],
            "--quantize",
        ),
    ];
    for (args, named) in cases {
        let got = run(args)?;
        let first = got.stderr.lines().next().unwrap_or_default();
        assert_eq!(
            (got.code, got.stdout.as_str()),
            (Some(2), ""),
            "{args:?}: {}",
            got.stderr
        );
        assert!(first.starts_with("error: "), "{args:?}: {}", got.stderr);
        assert!(got.stderr.contains(named), "{args:?}: {}", got.stderr);
    }
    Ok(())
}

#[test]
fn a_number_out_of_range_is_wrong_usage() -> Result<()> {
    let train = ["train", "--data", "x", "--output", "y"];
    let collect = ["collect", "--input", "x", "--output", "y"];
    let pretrain = ["pretrain", "--output", "y"];
    let cases: &[(&[&str], &str, &[&str])] = &[
        (&train, "--lora-dropout", &["nan", "1", "-0.1", "inf"]),
        (&train, "--learning-rate", &["-1", "nan", "0"]),
        (&train, "--warmup-ratio", &["2", "-1", "nan"]),
        (&train, "--max-grad-norm", &["-1", "nan"]),
        (&train, "--weight-decay", &["-1", "nan"]),
        (&train, "--lora-alpha", &["0", "-4", "nan", "inf"]),
        (&train, "--calibration-share", &["1", "nan"]),
        (&train, "--smoothing", &["-1", "nan"]),
        (&train, "--max-steps", &["0"]),
        (&train, "--lora-r", &["0", "4294967295", "18446744073709551615"]),
        (&train, "--batch-size", &["0"]),
        (&train, "--epochs", &["0"]),
        (&train, "--save-steps", &["0"]),
        (&pretrain, "--steps", &["0"]),
        (&pretrain, "--batch-tokens", &["0"]),
        (&collect, "--concurrency", &["0"]),
        (&collect, "--temperatures", &["nan", "-1", "inf", "0,-1"]),
        (&collect, "--samples-per-temperature", &["0", "4294967295"]),
        (&["demo"], "--epochs", &["0"]),
        (&["demo"], "--train-instructions", &["0", "18446744073709551615"]),
    ];
    for (command, flag, values) in cases {
        for value in *values {
            let flag_and_value = format!("{flag}={value}");
            let args: Vec<&str> = command.iter().copied().chain([flag_and_value.as_str()]).collect();
            let got = run(&args)?;
            assert_eq!(got.code, Some(2), "{args:?}: {}", got.stderr);
            assert!(got.stderr.contains(flag), "{args:?}: {}", got.stderr);
        }
    }
    Ok(())
}

#[test]
fn a_failure_exits_with_1_and_one_line_that_names_the_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (missing, output, broken) = (path("missing.jsonl"), path("out"), path("broken.jsonl"));
    std::fs::write(&broken, "{\"id\": \"1\", \n{\"id\": \"2\"}\n")?;
    let cases: [&[&str]; 7] = [
        &["collect", "--input", &missing, "--output", &output],
        &["label", "--input", &missing, "--output", &output],
        &["train", "--data", &missing, "--output", &output],
        &["generate", "--input", &missing, "--output", &output],
        &["simulate", "--lengths", &missing],
        &["report", "--input", &missing, "--output", &output],
        &["label", "--input", &broken, "--output", &output],
    ];
    for args in cases {
        let got = run(args)?;
        let named = if args.contains(&broken.as_str()) {
            "broken.jsonl"
        } else {
            "missing.jsonl"
        };
        assert_eq!(
            (got.code, got.stdout.as_str()),
            (Some(1), ""),
            "{args:?}: {}",
            got.stderr
        );
        assert_eq!(got.stderr.lines().count(), 1, "{args:?}: {}", got.stderr);
        assert!(
            got.stderr.starts_with("error: ") && got.stderr.contains(named),
            "{args:?}: {}",
            got.stderr
        );
    }
    assert!(
        !std::path::Path::new(&output).exists(),
        "a run that failed at its input left an output"
    );
    Ok(())
}

#[test]
fn lengths_become_pairs_become_nothing_else() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    let samples = [(0.0, 115), (0.7, 126)]
        .map(|(t, n)| format!(r#"{{"temperature":{t:.1},"tokens":{n},"finish":"stop"}}"#))
        .join(",");
    std::fs::write(
        path("lengths.jsonl"),
        format!("{{\"id\":\"a\",\"instruction\":\"x\",\"samples\":[{samples}]}}\n"),
    )?;
    let got = run(&[
        "label",
        "--input",
        &path("lengths.jsonl"),
        "--output",
        &path("pairs.jsonl"),
        "--json",
        "-q",
    ])?;
    assert_eq!((got.code, got.stderr.as_str()), (Some(0), ""), "{got:?}");
    let printed: serde_json::Value = serde_json::from_str(&got.stdout)?;
    assert_eq!(printed["pairs"], 1);
    let pairs = std::fs::read_to_string(path("pairs.jsonl"))?;
    let pair: serde_json::Value = serde_json::from_str(&pairs)?;
    assert_eq!(
        pair,
        serde_json::json!({"id": "a", "instruction": "x", "label": 150, "lengths": [115, 126]})
    );
    Ok(())
}

#[test]
fn what_could_not_mean_anything_is_refused_in_one_line() -> Result<()> {
    let folder = Folder::new(0)?;
    let (lengths, pairs) = (folder.text("lengths.json"), folder.text("pairs.jsonl"));
    std::fs::write(&lengths, r#"[{"id": "a", "L_t0.0": 5}, {"id": "b", "L_t0.0": 7}]"#)?;
    std::fs::write(
        &pairs,
        r#"{"id": "a", "instruction": "Count.", "label": 2000, "lengths": [2000]}"#,
    )?;
    let cases: [(&[&str], &str); 2] = [
        (&["profile", "--steps", "1000000"], "leave no room for a prompt"),
        (
            &[
                "bench",
                "--replay",
                &lengths,
                "--strategy",
                "seqsch",
                "--adapter",
                "none",
            ],
            "random tokens",
        ),
    ];
    for (args, said) in cases {
        let run = run(args)?;
        assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""), "{args:?}");
        let lines: Vec<&str> = run.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(lines.len() == 1 && lines[0].contains(said), "{args:?}: {}", run.stderr);
    }
    // A length beyond the cap stays what it is.
    let eval = run(&[
        "eval",
        "--data",
        &pairs,
        "--method",
        "constant",
        "--constant",
        "512",
        "--json",
    ])?;
    assert!(
        eval.stdout.contains("1488") && eval.stderr.contains("1 of 1 lengths"),
        "{}{}",
        eval.stdout,
        eval.stderr
    );
    Ok(())
}

#[test]
fn what_is_true_of_every_batch_size_is_said_once() -> Result<()> {
    let flags = ["--batch-sizes", "1,2", "--steps", "1", "--kv-cache-tokens", "2100"];
    let profile = run(&[&["profile", "-q", "--json", "--contexts", "2000,3000"], &flags[..]].concat())?;
    let beyond = profile.stderr.matches("is beyond the model's positions").count();
    assert_eq!((profile.code, beyond), (Some(0), 2), "{}", profile.stderr);
    // Both contexts are cut to the same, which is measured once for each batch size.
    let printed: serde_json::Value = serde_json::from_str(&profile.stdout)?;
    assert!(printed["points"].as_array().is_some_and(|p| p.len() <= 2), "{printed}");
    Ok(())
}
