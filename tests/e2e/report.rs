//! What `bench`, `simulate` and `eval` print with --json, and what `report` draws of it.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::support::{Folder, run, succeed};

/// `{"strategies": [{…}]}` of design.md.
const STRATEGY_KEYS: [&str; 13] = [
    "average_length",
    "batch_size",
    "effective_token_ratio",
    "failure_ratio",
    "fcr",
    "requests",
    "samples_per_s",
    "seconds",
    "steps",
    "strategy",
    "tokens_per_s",
    "vbs",
    "wasted_tokens",
];

/// A folder with recorded lengths in the published form, four samples of 3 to 26 tokens.
fn folder_with_lengths(records: u32) -> Result<Folder> {
    let folder = Folder::new(4)?;
    let record =
        |i: u32| json!({"id": i, "L_t0.0": 3 + 7 * i % 23, "L_t0.3": 5, "L_t0.5": 9, "L_t0.7": 4 + 5 * i % 19});
    let lengths: Vec<Value> = (0..records).map(record).collect();
    std::fs::write(folder.path("lengths.json"), serde_json::to_string(&lengths)?)?;
    Ok(folder)
}

/// What a command prints with --json, kept as a file too.
fn json_of(folder: &Folder, name: &str, args: &[&str]) -> Result<Value> {
    let printed = succeed(args)?.stdout;
    std::fs::write(folder.path(name), &printed)?;
    serde_json::from_str(&printed).with_context(|| format!("{args:?} printed {printed}"))
}

fn keys(value: &Value) -> BTreeSet<&str> {
    value
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, _)| key.as_str())
        .collect()
}

fn bench(folder: &Folder, name: &str, more: &[&str]) -> Result<Value> {
    let lengths = folder.text("lengths.json");
    let mut args = vec![
        "bench",
        "-q",
        "--json",
        "--replay",
        &lengths,
        "--prompt-tokens",
        "4",
        "9",
        "--num",
        "20",
    ];
    args.extend(["--max-new-tokens", "32"]);
    args.extend(more);
    json_of(folder, name, &args)
}

#[test]
fn json_has_the_keys_of_the_design_and_no_other() -> Result<()> {
    let folder = folder_with_lengths(32)?;
    let (lengths, instructions, answers) = (
        folder.text("lengths.json"),
        folder.text("in.jsonl"),
        folder.text("out.jsonl"),
    );
    let generate = [
        "generate",
        "-q",
        "--json",
        "--input",
        &instructions,
        "--output",
        &answers,
        "--max-new-tokens",
        "8",
    ];
    let printed = [
        json_of(
            &folder,
            "a",
            &["simulate", "-q", "--json", "--lengths", &lengths, "--vbs", "--fcr"],
        )?,
        bench(&folder, "b", &["--batch-sizes", "2,4"])?,
        json_of(&folder, "c", &generate)?,
    ];
    for printed in &printed {
        assert_eq!(keys(printed), BTreeSet::from(["strategies"]));
        let rows = printed["strategies"].as_array().context("rows")?;
        assert!(!rows.is_empty());
        for row in rows {
            assert_eq!(keys(row), BTreeSet::from(STRATEGY_KEYS));
        }
    }
    let simulated = &printed[0]["strategies"][0];
    assert!(
        simulated["seconds"].is_null() && simulated["samples_per_s"].is_null() && simulated["tokens_per_s"].is_null()
    );
    let pair = json!({"id": "a", "instruction": "x", "label": 50, "lengths": [12, 44]});
    std::fs::write(folder.path("pairs.jsonl"), format!("{pair}\n"))?;
    let pairs = folder.text("pairs.jsonl");
    let evaluated = json_of(
        &folder,
        "d",
        &["eval", "-q", "--json", "--data", &pairs, "--method", "constant"],
    )?;
    let want = "predictor n error acc_50 acc_100 underestimate_rate kendall_tau coverage_90 ms_per_prediction";
    assert_eq!(keys(&evaluated), BTreeSet::from(["predictors"]));
    assert_eq!(keys(&evaluated["predictors"][0]), want.split(' ').collect());
    Ok(())
}

/// Slots × steps of one kind of a row's timeline.
fn area(row: &Value, kind: &str) -> u64 {
    let spans = row["timeline"][kind].as_array().into_iter().flatten();
    spans
        .map(|span| span[2].as_u64().unwrap_or(0) - span[1].as_u64().unwrap_or(0))
        .sum()
}

#[test]
fn bench_runs_every_strategy_at_every_size_and_records_every_step() -> Result<()> {
    let folder = folder_with_lengths(20)?;
    let strategies = ["--strategy", "vanilla,oracle,continuous", "--vbs", "--fcr"];
    let flags = ["--batch-sizes", "4,2", "--timeline"];
    let printed = bench(&folder, "bench.json", &[&strategies[..], &flags].concat())?;
    let rows = printed["strategies"].as_array().context("rows")?;
    let names: Vec<(u64, &str)> = rows
        .iter()
        .map(|row| {
            (
                row["batch_size"].as_u64().unwrap_or(0),
                row["strategy"].as_str().unwrap_or(""),
            )
        })
        .collect();
    let want = [2, 4].map(|size| ["vanilla", "oracle", "continuous"].map(|name| (size, name)));
    assert_eq!(names, want.concat());
    let useful: u64 = (0..20).map(|i| 3 + 7 * i % 23).sum();
    for row in rows {
        let wasted = row["wasted_tokens"].as_u64().context("wasted")?;
        assert_eq!(area(row, "useful"), useful, "{row}");
        assert_eq!(area(row, "padding") + area(row, "thrown_away"), wasted, "{row}");
        if row["strategy"] != "oracle" {
            let slots_times_steps =
                row["steps"].as_u64().context("steps")? * row["batch_size"].as_u64().context("size")?;
            assert_eq!(useful + wasted, slots_times_steps, "{row}");
        }
    }
    // The simulation of the same requests counts the same steps, and draws the continuous mode's slots alike.
    let lengths = folder.text("lengths.json");
    let simulate = [
        "simulate",
        "-q",
        "--json",
        "--lengths",
        &lengths,
        "--max-new-tokens",
        "32",
        "--resume",
    ];
    let simulated = json_of(&folder, "s.json", &[&simulate[..], &strategies, &flags].concat())?;
    for (real, simulated) in rows.iter().zip(simulated["strategies"].as_array().context("rows")?) {
        for key in ["strategy", "batch_size", "steps", "wasted_tokens"] {
            assert_eq!(real[key], simulated[key], "{key}");
        }
        assert_eq!(area(simulated, "useful"), useful);
    }
    // People get the same as a table and letters.
    let people = [
        "bench",
        "-q",
        "--replay",
        &lengths,
        "--prompt-tokens",
        "4",
        "9",
        "--max-new-tokens",
        "32",
    ];
    let text = succeed(&[&people[..], &strategies, &flags].concat())?.stdout;
    assert!(
        text.contains("continuous, 4 slots, ") && text.contains("\n####") && text.contains("speed-up"),
        "{text}"
    );
    Ok(())
}

#[test]
fn sizes_that_make_no_sense_are_named_in_one_line() -> Result<()> {
    let folder = folder_with_lengths(20)?;
    let lengths = folder.text("lengths.json");
    let cases: [(&[&str], i32, &str); 4] = [
        (&["--batch-sizes", "0,2"], 2, "'0'"),
        (&["--batch-sizes", "2,4,2"], 2, "--batch-sizes names 2 twice"),
        (&["--batch-sizes", "2", "--batch-size", "4"], 2, "cannot be used with"),
        (
            &["--batch-sizes", "2,16", "--kv-cache-tokens", "128"],
            1,
            "16 sequences never fit the KV cache of 128 tokens",
        ),
    ];
    for (flags, code, said) in cases {
        let base = [
            "bench",
            "-q",
            "--replay",
            &lengths,
            "--prompt-tokens",
            "4",
            "9",
            "--max-new-tokens",
            "32",
        ];
        let got = run(&[&base[..], flags].concat())?;
        let first = got.stderr.lines().next().unwrap_or_default();
        assert_eq!(
            (got.code, got.stdout.as_str()),
            (Some(code), ""),
            "{flags:?}: {}",
            got.stderr
        );
        assert!(
            first.starts_with("error: ") && first.contains(said),
            "{flags:?}: {}",
            got.stderr
        );
    }
    Ok(())
}

/// Width and height of an SVG in pixels.
fn svg_size(svg: &str) -> Result<(u32, u32)> {
    let side = |name: &str| -> Result<u32> {
        let from = svg.split_once(&format!("{name}=\"")).context("a size")?.1;
        Ok(from.split('"').next().unwrap_or_default().parse::<f64>()?.ceil() as u32)
    };
    ensure!(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\"") && svg.trim_end().ends_with("</svg>"));
    Ok((side("width")?, side("height")?))
}

/// Width and height of a PNG in pixels.
fn png_size(png: &[u8]) -> Result<(u32, u32)> {
    ensure!(
        png.starts_with(b"\x89PNG\r\n\x1a\n") && &png[12..16] == b"IHDR",
        "no PNG"
    );
    let side = |at: usize| -> Result<u32> { Ok(u32::from_be_bytes(png[at..at + 4].try_into()?)) };
    Ok((side(16)?, side(20)?))
}

#[test]
fn a_report_of_many_inputs_is_one_page_with_svg_and_png_beside_it() -> Result<()> {
    let folder = folder_with_lengths(20)?;
    let lengths = folder.text("lengths.json");
    bench(
        &folder,
        "bench.json",
        &["--batch-sizes", "2,4", "--timeline", "--strategy", "vanilla,continuous"],
    )?;
    json_of(
        &folder,
        "sim.json",
        &[
            "simulate",
            "-q",
            "--json",
            "--lengths",
            &lengths,
            "--timeline",
            "--resume",
        ],
    )?;
    let point =
        |size: u32, context: u32| json!({"batch_size": size, "context": context, "prefill_ms": 2.0, "step_ms": size});
    let linear = json!({"batch_size": 4, "linear": "qkv", "share": 0.8});
    let step = json!({"batch_size": 4, "context": 32, "step_ms": 4.0, "products_ms": 2.5});
    let profile = json!({"model": "tiny", "points": [point(1, 32), point(4, 32), point(1, 64), point(4, 64)],
        "products": {"linears": [linear], "steps": [step]}});
    std::fs::write(folder.path("profile.json"), profile.to_string())?;
    let output = folder.text("report");
    let mut args = vec!["report", "-q", "--json", "--output", &output];
    let inputs = ["bench.json", "sim.json", "profile.json", "lengths.json"].map(|name| folder.text(name));
    inputs.iter().for_each(|input| args.extend(["--input", input]));
    let printed: Value = serde_json::from_str(&succeed(&args)?.stdout)?;
    assert_eq!(printed["report"], json!(folder.path("report/index.html")));
    let page = folder.read("report/index.html")?;
    let want = [
        "throughput-by-batch-size-bench",
        "redundancy-by-batch-size-bench",
        "strategies-speed-bench",
        "timeline-2-bench",
        "timeline-4-bench",
        "strategies-wasted-sim",
        "timeline-16-sim",
        "decode-throughput",
        "step-time",
        "products-share",
        "products-of-step",
        "lengths",
        "length-spread",
    ];
    for name in want {
        let size = svg_size(&folder.read(&format!("report/{name}.svg"))?).with_context(|| name.to_owned())?;
        let picture = std::fs::read(folder.path(&format!("report/{name}.png")))?;
        assert_eq!(png_size(&picture)?, (2 * size.0, 2 * size.1), "{name}");
        for link in [
            format!("id=\"{name}\""),
            format!("href=\"{name}.svg\""),
            format!("href=\"{name}.png\""),
        ] {
            assert!(page.contains(&link), "the page has no {link}");
        }
    }
    // Nothing lies there that the page does not show.
    let pictures = std::fs::read_dir(folder.path("report"))?.filter_map(Result::ok);
    let names = pictures.map(|entry| entry.file_name().to_string_lossy().into_owned());
    let files: Vec<String> = names.filter(|name| name != "index.html").collect();
    assert_eq!(files.len(), 2 * page.matches("<svg").count());
    files
        .iter()
        .for_each(|file| assert!(page.contains(&format!("href=\"{file}\"")), "{file}"));
    assert!(page.contains("Strategies (bench)") && page.contains("<td>vanilla</td>"));
    Ok(())
}

#[test]
fn what_cannot_be_drawn_is_named_in_one_line_and_leaves_no_folder() -> Result<()> {
    let folder = folder_with_lengths(4)?;
    std::fs::write(folder.path("answers.jsonl"), "{\"id\":\"a\",\"text\":\"b\"}\n")?;
    let (good, bad, output) = (
        folder.text("lengths.json"),
        folder.text("answers.jsonl"),
        folder.text("report"),
    );
    let got = run(&["report", "--input", &good, "--input", &bad, "--output", &output])?;
    assert_eq!((got.code, got.stderr.lines().count()), (Some(1), 1), "{}", got.stderr);
    assert!(
        got.stderr
            .contains("answers.jsonl is nothing that can be drawn: expected"),
        "{}",
        got.stderr
    );
    assert!(!folder.path("report").exists());
    Ok(())
}
