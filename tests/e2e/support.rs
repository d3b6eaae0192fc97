//! Running the binary as a user does.

use std::fs::DirEntry;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::SystemTime;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// The workspace's folder.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The binary of this build's profile. `cargo test --workspace` has built it for the tests in `cli/tests`; with these
/// tests alone it may be missing or older than the sources, and is built here.
pub fn binary() -> Result<&'static Path> {
    static BINARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BINARY.get_or_init(|| find_or_build().map_err(|err| format!("{err:#}")));
    built.as_deref().map_err(|err| anyhow::anyhow!("{err}"))
}

fn find_or_build() -> Result<PathBuf> {
    // target/<profile>/deps/e2e-0123456789abcdef
    let test = std::env::current_exe()?;
    let folder = test
        .parent()
        .and_then(Path::parent)
        .context("the test lies in target/<profile>/deps")?;
    let binary = folder.join(format!("lengthwise{}", std::env::consts::EXE_SUFFIX));
    let modified = |path: &Path| path.metadata().and_then(|m| m.modified()).ok();
    if modified(&binary).is_some_and(|built| Some(built) > newest_source(&workspace())) {
        return Ok(binary);
    }
    build(folder)?;
    Ok(binary)
}

/// When a source of any crate was last changed.
fn newest_source(workspace: &Path) -> Option<SystemTime> {
    let crates = std::fs::read_dir(workspace).ok()?.flatten();
    crates.filter_map(|entry| newest_in(&entry.path().join("src"))).max()
}

fn newest_in(folder: &Path) -> Option<SystemTime> {
    let newest = |entry: DirEntry| {
        let metadata = entry.metadata().ok()?;
        if metadata.is_dir() {
            newest_in(&entry.path())
        } else {
            metadata.modified().ok()
        }
    };
    std::fs::read_dir(folder).ok()?.flatten().filter_map(newest).max()
}

fn build(folder: &Path) -> Result<()> {
    let profile = match folder.file_name().and_then(|name| name.to_str()) {
        Some("debug") => "dev",
        Some(profile) => profile,
        None => anyhow::bail!("{} has no name", folder.display()),
    };
    let target = folder
        .parent()
        .context("a profile's folder lies in the target folder")?;
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .current_dir(workspace())
        .args([
            "build",
            "--quiet",
            "-p",
            "lengthwise-cli",
            "--profile",
            profile,
            "--target-dir",
        ])
        .arg(target)
        .output()?;
    ensure!(
        built.status.success(),
        "cargo build failed: {}",
        String::from_utf8_lossy(&built.stderr)
    );
    Ok(())
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
    finish(Command::new(binary()?).args(args))
}

/// Runs a command of the binary, with what else it was given, to its end.
pub fn finish(command: &mut Command) -> Result<Run> {
    let command = command.current_dir(workspace()).env_remove("RUST_LOG");
    let Output { status, stdout, stderr } = command.output()?;
    Ok(Run {
        code: status.code(),
        stdout: String::from_utf8(stdout)?,
        stderr: String::from_utf8(stderr)?,
    })
}

/// A temporary folder with some instructions.
pub struct Folder {
    dir: tempfile::TempDir,
}

impl Folder {
    /// Writes `in.jsonl` with this many instructions of the bundled model's language.
    pub fn new(instructions: usize) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let split = lengthwise_train::language::Split::Train;
        let questions = lengthwise_train::language::instructions(split, 3, instructions);
        let line = |(i, q): (usize, &lengthwise_train::language::Question)| {
            format!(
                "{}\n",
                serde_json::json!({"id": format!("q{i}"), "instruction": q.instruction})
            )
        };
        let text: String = questions.iter().enumerate().map(line).collect();
        std::fs::write(dir.path().join("in.jsonl"), text)?;
        Ok(Self { dir })
    }

    /// A file in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Its path as a flag.
    pub fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Its text.
    pub fn read(&self, name: &str) -> Result<String> {
        std::fs::read_to_string(self.path(name)).with_context(|| name.to_owned())
    }
}

/// A run that must end with 0.
pub fn succeed(args: &[&str]) -> Result<Run> {
    let run = run(args)?;
    ensure!(run.code == Some(0), "{args:?}: {}", run.stderr);
    Ok(run)
}

/// Waits until the server says where it listens.
pub fn start_server(args: &[&str]) -> Result<(Child, String)> {
    let (child, said) = start_server_that_says(args)?;
    let address = said["listening"].as_str().context("there is an address")?;
    Ok((child, format!("http://{address}")))
}

/// Waits until the server, with `--json`, says where it listens: `listening` and `metrics`.
pub fn start_server_that_says(args: &[&str]) -> Result<(Child, Value)> {
    let mut child = Command::new(binary()?)
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("it is piped")?).read_line(&mut line)?;
    let said = serde_json::from_str(&line).with_context(|| format!("the server said \"{line}\""))?;
    Ok((child, said))
}
