//! `report`: the figures of a result, and one page with all of them.

use std::path::PathBuf;

use anyhow::Context;
use lengthwise_train::files::write_atomic;
use serde_json::json;

use crate::args::Global;
use crate::output;
use crate::report::{ReportData, figures, page};

/// Draws the figures of a result as SVG and puts them with its tables on one HTML page, which needs no other file.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What `bench`, `simulate`, `eval` or `demo` printed with --json
    #[arg(short, long, value_name = "FILE")]
    pub input: PathBuf,

    /// Folder for index.html and the figures
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
}

/// Draws.
///
/// # Errors
/// The input is no result, or the folder cannot be written.
pub fn run(global: &Global, args: Args) -> anyhow::Result<()> {
    let name = args.input.display();
    let text = std::fs::read_to_string(&args.input).with_context(|| name.to_string())?;
    let data: ReportData = serde_json::from_str(&text).with_context(|| format!("{name} is no result"))?;
    if data.is_empty() {
        anyhow::bail!("{name} holds nothing to report: give what `bench --json` or `eval --json` printed");
    }
    let index = write(&data, &args.output)?;
    tracing::info!("the report is {}", index.display());
    if global.json {
        output::print_json(&json!({ "report": index }))?;
    }
    Ok(())
}

/// Writes index.html and the figures into a folder and returns the page's path.
///
/// # Errors
/// The folder cannot be written.
pub fn write(data: &ReportData, folder: &std::path::Path) -> anyhow::Result<PathBuf> {
    let figures = figures(data)?;
    for figure in &figures {
        write_atomic(&folder.join(format!("{}.svg", figure.name)), &figure.svg)?;
    }
    let index = folder.join("index.html");
    write_atomic(&index, &page(data, &figures))?;
    Ok(index)
}
