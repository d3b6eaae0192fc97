//! Running the binary as a user does.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

/// The workspace's folder.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The binary of this build's profile. Cargo builds it for tests of its own package only, so it is built here: once,
/// in no time where it is up to date.
pub fn binary() -> Result<&'static Path> {
    static BINARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BINARY.get_or_init(|| build().map_err(|err| format!("{err:#}")));
    built.as_deref().map_err(|err| anyhow::anyhow!("{err}"))
}

fn build() -> Result<PathBuf> {
    // target/<profile>/deps/e2e-0123456789abcdef
    let test = std::env::current_exe()?;
    let folder = test.parent().and_then(Path::parent).context("the test lies in target/<profile>/deps")?;
    let target = folder.parent().context("the test lies in target/<profile>/deps")?;
    let profile = match folder.file_name().and_then(|name| name.to_str()) {
        Some("debug") => "dev",
        Some(profile) => profile,
        None => anyhow::bail!("{} has no name", folder.display()),
    };
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .current_dir(workspace())
        .args(["build", "--quiet", "--workspace", "--bin", "lengthwise", "--profile", profile, "--target-dir"])
        .arg(target)
        .output()?;
    ensure!(built.status.success(), "cargo build failed: {}", String::from_utf8_lossy(&built.stderr));
    Ok(folder.join(format!("lengthwise{}", std::env::consts::EXE_SUFFIX)))
}

/// What a run of the binary left behind.
#[derive(Debug)]
pub struct Run {
    /// The exit code.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs the binary to its end.
pub fn run(args: &[&str]) -> Result<Run> {
    let Output { status, stdout, stderr } =
        Command::new(binary()?).current_dir(workspace()).env_remove("RUST_LOG").args(args).output()?;
    Ok(Run { code: status.code(), stdout: String::from_utf8(stdout)?, stderr: String::from_utf8(stderr)? })
}
