//! Standard output: results and nothing else.

use std::io::Write;

use serde::Serialize;

/// Standard output is closed or full.
#[derive(Debug, thiserror::Error)]
#[error("standard output: {0}")]
pub struct PrintError(#[from] std::io::Error);

/// Prints text and a line end.
///
/// # Errors
/// Standard output is closed, where `println!` would panic.
pub fn print(text: &str) -> anyhow::Result<()> {
    let write = |text: &str| {
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{}", text.trim_end_matches('\n'))?;
        stdout.flush()
    };
    crate::logging::above_bars(|| write(text)).map_err(PrintError)?;
    Ok(())
}

/// Prints one JSON object on one line.
///
/// # Errors
/// As [`print`].
pub fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    print(&serde_json::to_string(value)?)
}
