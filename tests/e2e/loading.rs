//! What the loading of a checkpoint takes and gives, in every format.

mod checkpoint;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use lengthwise_model::Weights;

use crate::support::{binary, run, workspace};
use checkpoint::{Checkpoint, Format, shapes};

/// The most memory that serving a model took until it was loaded, in bytes, by Linux's own count. Where the allocator
/// may have huge pages, every tensor is rounded up to 2 MiB.
fn peak_of_serving(folder: &Path, huge_pages: bool) -> Result<u64> {
    let mut server = Command::new(binary()?)
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--json",
            "--dtype",
            "f32",
            "--model",
        ])
        .arg(folder)
        .env("MIMALLOC_ALLOW_THP", if huge_pages { "1" } else { "0" })
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(server.stdout.take().context("it is piped")?).read_line(&mut line)?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.id()));
    server.kill()?;
    server.wait()?;
    ensure!(line.contains("listening"), "it did not come up: {line}");
    let status = status?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = peak
        .and_then(|peak| peak.trim().strip_suffix(" kB"))
        .context("no VmHWM")?;
    Ok(1024 * kib.trim().parse::<u64>()?)
}

/// Checks the bound for every format, and prints what was measured.
fn check_peaks(hidden: usize, layers: usize, huge_pages: bool) -> Result<()> {
    // What the program takes with a model of 4 MB.
    let base = peak_of_serving(&workspace().join("data/tiny"), huge_pages)?;
    for format in [Format::Safetensors, Format::Bin] {
        for dtype in [DType::F32, DType::BF16] {
            let folder = tempfile::tempdir()?;
            let sizes = Checkpoint {
                format,
                dtype,
                hidden,
                layers,
                shards: 4,
            }
            .write(folder.path())?;
            let peak = peak_of_serving(folder.path(), huge_pages)?;
            let bound = sizes.model_f32 + sizes.largest_shard * 6 / 5;
            let mb = |bytes: u64| bytes / 1_000_000;
            println!(
                "{format:?} {dtype:?}, huge pages {huge_pages}: model {} MB, largest shard {} MB, peak {} MB, program {} MB, bound {} MB",
                mb(sizes.model_f32),
                mb(sizes.largest_shard),
                mb(peak),
                mb(base),
                mb(bound)
            );
            ensure!(
                peak <= bound + base,
                "{format:?} {dtype:?}: {peak} bytes, allowed {bound} + {base}"
            );
        }
    }
    Ok(())
}

#[test]
fn loading_takes_the_model_and_little_more_than_a_shard() -> Result<()> {
    // No other system counts it in this way.
    if !Path::new("/proc/self/status").exists() {
        return Ok(());
    }
    // Rounding up would be much of tensors as small as these.
    check_peaks(512, 6, false)
}

/// The figures of docs/models.md.
#[test]
#[ignore = "writes checkpoints of 400 MB"]
fn loading_400_mb_takes_the_model_and_little_more_than_a_shard() -> Result<()> {
    check_peaks(2048, 2, false)?;
    check_peaks(2048, 2, true)
}

#[test]
fn bin_and_safetensors_give_the_same_bytes() -> Result<()> {
    for dtype in [DType::F32, DType::BF16] {
        let folders = [tempfile::tempdir()?, tempfile::tempdir()?];
        let mut weights = Vec::new();
        for (folder, format) in folders.iter().zip([Format::Safetensors, Format::Bin]) {
            Checkpoint {
                format,
                dtype,
                hidden: 128,
                layers: 1,
                shards: 2,
            }
            .write(folder.path())?;
            weights.push(Weights::open(folder.path(), dtype, &Device::Cpu)?);
        }
        for (name, shape) in shapes(128, 1) {
            // Widening a bf16 keeps every bit.
            let bits = |weights: &Weights| -> Result<Vec<u32>> {
                let tensor = weights.get(&name, &shape)?;
                ensure!(tensor.dtype() == dtype, "{name}: {:?}", tensor.dtype());
                let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                Ok(values.into_iter().map(f32::to_bits).collect())
            };
            let (a, b) = (bits(&weights[0])?, bits(&weights[1])?);
            assert!(a == b && a.iter().any(|&bits| bits != a[0]), "{name} in {dtype:?}");
        }
    }
    Ok(())
}

#[test]
fn tensors_that_no_layer_takes_are_told_once() -> Result<()> {
    for (format, flags) in [
        (Format::Safetensors, &[][..]),
        (Format::Bin, &["--dtype", "bf16"]),
        (Format::Bin, &["--quantize", "q8_0"]),
    ] {
        let folder = tempfile::tempdir()?;
        let checkpoint = Checkpoint {
            format,
            dtype: DType::F32,
            hidden: 128,
            layers: 2,
            shards: 2,
        };
        checkpoint.write(folder.path())?;
        let model = folder.path().display().to_string();
        let args = ["predict", "-q", "--max-new-tokens", "2", "--model", &model, "Count."];
        let args = [&args[..], flags].concat();
        let whole = run(&args)?;
        assert_eq!((whole.code, whole.stderr.as_str()), (Some(0), ""), "{format:?}");
        // The weights of the second layer are left over.
        let path = folder.path().join("config.json");
        let config = std::fs::read_to_string(&path)?;
        std::fs::write(
            &path,
            config.replace("\"num_hidden_layers\":2", "\"num_hidden_layers\":1"),
        )?;
        let got = run(&args)?;
        assert_eq!((got.code, got.stderr.lines().count()), (Some(0), 1), "{}", got.stderr);
        assert!(
            got.stderr.contains(&model)
                && got.stderr.contains("9 tensors are not used")
                && got.stderr.contains(": model.layers.1.input_layernorm.weight, "),
            "{}",
            got.stderr
        );
    }
    Ok(())
}

/// Answers of the bundled model under another generation_config.json.
fn generate(generation: &str, flags: &[&str], instruction: &str) -> Result<(Option<i32>, String)> {
    generate_within(1024, generation, flags, instruction)
}

/// The same with so many positions.
fn generate_within(
    positions: usize,
    generation: &str,
    flags: &[&str],
    instruction: &str,
) -> Result<(Option<i32>, String)> {
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name).display().to_string();
    for entry in std::fs::read_dir(workspace().join("data/tiny"))? {
        let entry = entry?;
        std::fs::copy(entry.path(), folder.path().join(entry.file_name()))?;
    }
    std::fs::write(path("generation_config.json"), generation)?;
    let config = std::fs::read_to_string(path("config.json"))?;
    let mut config: serde_json::Value = serde_json::from_str(&config)?;
    config["max_position_embeddings"] = positions.into();
    std::fs::write(path("config.json"), config.to_string())?;
    let line = |id: u32| {
        format!(
            "{}\n",
            serde_json::json!({"id": id.to_string(), "instruction": instruction})
        )
    };
    std::fs::write(path("in.jsonl"), (0..4).map(line).collect::<String>())?;
    let (model, input, output) = (path(""), path("in.jsonl"), path("out.jsonl"));
    let args = [
        "generate",
        "--model",
        &model,
        "--input",
        &input,
        "--output",
        &output,
        "--max-new-tokens",
        "60",
        "-q",
    ];
    let got = run(&[&args[..], flags].concat())?;
    match got.code {
        Some(0) => Ok((got.code, std::fs::read_to_string(output)?)),
        code => Ok((code, got.stderr)),
    }
}

#[test]
fn a_model_is_sampled_as_its_makers_say_where_the_user_says_nothing() -> Result<()> {
    let instruction = "Write 30 words about rivers.";
    let of = |generation: &str, flags: &[&str]| {
        let (code, text) = generate(generation, flags, instruction)?;
        ensure!(code == Some(0), "{text}");
        Ok(text)
    };
    let greedy = of("{}", &[])?;
    let hot = r#"{"do_sample": true, "temperature": 1.5}"#;
    assert_ne!(of(hot, &[])?, greedy);
    assert_eq!(of(hot, &[])?, of("{}", &["--temperature", "1.5"])?);
    assert_eq!(of(hot, &["--temperature", "0"])?, greedy, "the user's word comes first");
    assert_eq!(
        of(r#"{"do_sample": true, "temperature": 1.5, "top_k": 1}"#, &[])?,
        greedy
    );
    assert_eq!(of(r#"{"do_sample": false, "temperature": 1.5}"#, &[])?, greedy);
    Ok(())
}

#[test]
fn a_cache_in_16_bits_answers_and_one_that_nothing_runs_is_one_line() -> Result<()> {
    let instruction = "Write 30 words about rivers.";
    let cached = |dtype: &str| generate("{}", &["--kv-cache-dtype", dtype], instruction);
    let (code, text) = cached("f16")?;
    assert_eq!((code, text.lines().count()), (Some(0), 4), "{text}");
    assert_eq!(
        cached("f32")?,
        generate("{}", &[], instruction)?,
        "f32 is what auto is here"
    );
    let (code, text) = cached("bf16")?;
    assert_eq!((code, text.lines().count()), (Some(1), 1), "{text}");
    assert!(
        text.starts_with("error: ") && text.contains("a KV cache in bf16 does not go with weights in f32"),
        "{text}"
    );
    Ok(())
}

#[test]
fn a_prompt_longer_than_the_models_positions_is_one_line() -> Result<()> {
    let (code, text) = generate("{}", &[], &"rivers ".repeat(2000))?;
    assert_eq!((code, text.lines().count()), (Some(1), 1), "{text}");
    assert!(
        text.starts_with("error: ") && text.contains("the model takes at most 1023"),
        "{text}"
    );
    Ok(())
}

#[test]
fn an_answer_ends_at_the_models_last_position() -> Result<()> {
    let tokens = |positions: usize| {
        let (code, text) = generate_within(positions, "{}", &[], "Write 200 words about rivers.")?;
        ensure!(code == Some(0), "{text}");
        let first: serde_json::Value = serde_json::from_str(text.lines().next().unwrap_or_default())?;
        ensure!(first["finish"] == "length", "{text}");
        first["tokens"].as_u64().context("no tokens")
    };
    let (fewer, more) = (tokens(60)?, tokens(70)?);
    assert!(more < 60, "the cap, not the positions, ended it");
    assert_eq!(fewer + 10, more);
    Ok(())
}
