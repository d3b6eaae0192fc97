//! The rules between the crates, read from their manifests.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// A crate and the crates of ours that it may depend on.
const MAY_DEPEND_ON: [(&str, &[&str]); 10] = [
    ("core", &[]),
    ("scheduler", &["core"]),
    ("proto", &[]),
    ("model", &["core"]),
    ("decoder", &["core", "scheduler", "model"]),
    ("train", &["core", "model", "decoder"]),
    ("predictor", &["core", "model", "decoder", "proto"]),
    ("gateway", &["core", "scheduler", "predictor", "decoder"]),
    (
        "cli",
        &[
            "core",
            "scheduler",
            "proto",
            "model",
            "decoder",
            "train",
            "predictor",
            "gateway",
        ],
    ),
    // Everything that it uses is for tests.
    ("tests", &[]),
];

/// Crates from elsewhere, by the beginning of their name, and the only crates of ours that may use them.
const ONLY_IN: [(&str, &[&str]); 5] = [
    ("candle", &["model", "decoder", "train", "predictor", "gateway", "cli"]),
    ("tonic", &["proto", "predictor", "gateway", "cli"]),
    ("prost", &["proto", "predictor", "gateway", "cli"]),
    ("tokio", &["predictor", "gateway", "cli"]),
    ("clap", &["cli"]),
];

const PREFIX: &str = "lengthwise-";

/// Every crate of the workspace with what it needs to be built and run; what only its tests need is left out.
///
/// The crate `cargo_metadata` would read this too, but it changes serde_json's features, and with them candle would be
/// compiled again for every command that includes these tests.
fn manifests() -> Result<BTreeMap<String, Vec<String>>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(crate::support::workspace())
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .output()?;
    ensure!(
        output.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout)?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata has no packages")?;
    packages.iter().map(manifest).collect()
}

/// A crate and its dependencies; of those for builds and runs `kind` is null or "build".
fn manifest(package: &Value) -> Result<(String, Vec<String>)> {
    let full = package["name"].as_str().context("a package has no name")?;
    let name = full
        .strip_prefix(PREFIX)
        .with_context(|| format!("{full} is no name of ours"))?;
    let dependencies = package["dependencies"]
        .as_array()
        .context("a package has no list of dependencies")?;
    let needed = dependencies.iter().filter(|d| d["kind"] != "dev");
    let names = needed.map(|d| Ok(d["name"].as_str().context("a dependency has no name")?.to_owned()));
    Ok((name.to_owned(), names.collect::<Result<_>>()?))
}

/// What breaks a rule, one line each.
fn violations(crates: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut found = Vec::new();
    for (name, dependencies) in crates {
        let Some((_, allowed)) = MAY_DEPEND_ON.iter().find(|(known, _)| known == name) else {
            found.push(format!("{name} is not in the list of crates"));
            continue;
        };
        for dependency in dependencies {
            let ours = dependency.strip_prefix(PREFIX);
            let foreign = ONLY_IN.iter().find(|(start, _)| dependency.starts_with(start));
            let fits = match (ours, foreign) {
                (Some(ours), _) => allowed.contains(&ours),
                (None, Some((_, only_in))) => only_in.contains(&name.as_str()),
                (None, None) => true,
            };
            if !fits {
                found.push(format!("{name} must not depend on {dependency}"));
            }
        }
    }
    found
}

#[test]
fn crates_depend_on_those_below_them_only() -> Result<()> {
    let crates = manifests()?;
    assert!(crates.len() >= 9, "{crates:?}");
    assert_eq!(violations(&crates), Vec::<String>::new());
    Ok(())
}

#[test]
fn a_breach_of_each_rule_is_found() {
    let crates = [
        ("core", "lengthwise-model"),
        ("scheduler", "candle-core"),
        ("train", "tokio"),
        ("extra", "serde"),
    ];
    let crates = crates.map(|(name, dependency)| (name.to_owned(), vec![dependency.to_owned()]));
    let want = [
        "core must not depend on lengthwise-model",
        "extra is not in the list of crates",
        "scheduler must not depend on candle-core",
        "train must not depend on tokio",
    ];
    assert_eq!(violations(&BTreeMap::from(crates)), want);
}
