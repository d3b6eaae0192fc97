//! Reading what a report is made of; what a file is shows in its content.

use std::path::Path;

use anyhow::{Context, bail};
use lengthwise_train::files::read_lengths;
use serde::Deserialize;
use serde_json::Value;

use super::data::{ReportData, StepTime, ThroughputPoint};

/// Keys of which a result has at least one; `points` is a profile's.
const KEYS: [&str; 9] = [
    "strategies",
    "predictors",
    "predictions",
    "length_samples",
    "throughput",
    "step_times",
    "points",
    "engines",
    "products",
];

/// What one file holds: the result of a command, or recorded lengths.
///
/// # Errors
/// The file cannot be read, is neither, or is damaged.
pub fn read(path: &Path) -> anyhow::Result<ReportData> {
    let name = path.display();
    let text = std::fs::read_to_string(path).with_context(|| name.to_string())?;
    let value: Option<Value> = serde_json::from_str(&text).ok();
    let data = match &value {
        Some(Value::Object(object)) if KEYS.iter().any(|key| object.contains_key(*key)) => {
            result(value.unwrap_or_default()).with_context(|| format!("{name} is a damaged result"))?
        }
        _ if holds_lengths(value.as_ref(), &text) => ReportData {
            length_samples: lengths(path)?,
            ..ReportData::default()
        },
        _ => bail!(
            "{name} is nothing that can be drawn: expected what bench, simulate, eval or profile printed with --json, \
             a demo.json, a summary of bench_decode, or recorded lengths"
        ),
    };
    if data.is_empty() {
        bail!("{name} holds nothing to report: its lists are empty");
    }
    Ok(data)
}

/// Whether the first record is one of lengths: an array's first element, or a line of its own.
fn holds_lengths(value: Option<&Value>, text: &str) -> bool {
    let line = || serde_json::from_str(text.lines().find(|line| !line.trim().is_empty())?).ok();
    let first: Option<Value> = match value {
        Some(Value::Array(records)) => records.first().cloned(),
        Some(other) => Some(other.clone()),
        None => line(),
    };
    let Some(Value::Object(record)) = first else {
        return false;
    };
    record.contains_key("samples") || record.keys().any(|key| key.starts_with("L_t"))
}

fn lengths(path: &Path) -> anyhow::Result<Vec<Vec<u32>>> {
    let records = read_lengths(path)?.into_iter();
    Ok(records.map(|r| r.samples.iter().map(|s| s.tokens).collect()).collect())
}

/// A result; the points of a profile become speeds and step times.
fn result(value: Value) -> anyhow::Result<ReportData> {
    /// What `profile` measured at one batch size and context.
    #[derive(Deserialize)]
    struct Point {
        batch_size: u32,
        context: u32,
        step_ms: f64,
    }
    let points: Vec<Point> = match value.get("points") {
        Some(points) => Deserialize::deserialize(points).context("points")?,
        None => Vec::new(),
    };
    let model = value.get("model").filter(|model| model.is_string()).cloned();
    let mut data: ReportData = serde_json::from_value(value)?;
    for point in points {
        data.step_times.push(StepTime {
            batch_size: point.batch_size,
            position: point.context,
            milliseconds: point.step_ms,
        });
        // Two runs whose difference is no time at all say nothing about a rate.
        if point.step_ms > 0.0 {
            data.throughput.push(ThroughputPoint {
                series: format!("context {}", point.context),
                batch_size: point.batch_size,
                tokens_per_s: f64::from(point.batch_size) / point.step_ms * 1000.0,
            });
        }
    }
    if let Some(model) = model {
        data.setup.insert("model".to_owned(), model);
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> anyhow::Result<ReportData> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("a.json");
        std::fs::write(&path, text)?;
        read(&path)
    }

    #[test]
    fn a_profile_becomes_speeds_and_step_times() -> anyhow::Result<()> {
        let data = read_text(
            r#"{"model":"tiny","points":[{"batch_size":4,"context":32,"prefill_ms":9.0,"step_ms":2.0},
                {"batch_size":1,"context":32,"prefill_ms":1.0,"step_ms":0.0}],
                "products":{"weight_bytes":10,"linears":[{"batch_size":4,"linear":"qkv","outputs":2,"inputs":2,"times":1,
                "ms":1.0,"gflops":1.0,"peak_gflops":2.0,"share":0.5}],"steps":[]}}"#,
        )?;
        assert_eq!(data.setup["model"], "tiny");
        let [point] = data.throughput.as_slice() else {
            panic!("{:?}", data.throughput);
        };
        assert_eq!((point.series.as_str(), point.batch_size), ("context 32", 4));
        assert_eq!(point.tokens_per_s, 2000.0);
        assert_eq!(data.step_times.len(), 2);
        assert_eq!(data.products.map(|p| p.linears[0].share), Some(0.5));
        // The products are null where the CPU path does not run the model.
        let bare =
            r#"{"model":"m","points":[{"batch_size":1,"context":8,"prefill_ms":1.0,"step_ms":1.0}],"products":null}"#;
        assert_eq!(read_text(bare)?.products, None);
        Ok(())
    }

    #[test]
    fn lengths_are_known_in_both_forms() -> anyhow::Result<()> {
        let published = r#"[{"id":1,"L_t0.0":10,"L_t0.7":30,"L_gt":5}]"#;
        assert_eq!(read_text(published)?.length_samples, [[10, 30]]);
        let sample = |n| format!(r#"{{"temperature":0.0,"tokens":{n},"finish":"stop"}}"#);
        let line = |id, n| format!(r#"{{"id":"{id}","instruction":"x","samples":[{}]}}"#, sample(n)) + "\n";
        assert_eq!(read_text(&line("a", 7))?.length_samples, [[7]]);
        let two = line("a", 7) + &line("b", 8);
        assert_eq!(read_text(&two)?.length_samples, [[7], [8]]);
        Ok(())
    }

    #[test]
    fn anything_else_is_an_error_that_says_what_is_expected() {
        for text in ["", "no JSON", "[]", "{}", "3", r#"{"id":"a","text":"b"}"#, "[1, 2]"] {
            let error = read_text(text).expect_err(text).to_string();
            assert!(error.contains("a.json is nothing that can be drawn"), "{text}: {error}");
        }
        let error = read_text(r#"{"strategies":[]}"#).expect_err("empty").to_string();
        assert!(error.contains("holds nothing"), "{error}");
        let error = read_text(r#"{"strategies":[{"strategy":1}]}"#).expect_err("damaged");
        assert!(
            format!("{error:#}").contains("a.json is a damaged result: invalid type"),
            "{error:#}"
        );
    }
}
