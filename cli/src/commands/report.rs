//! `report`: the figures of results, and one page with all of them.

use std::path::{Path, PathBuf};

use lengthwise_train::files::write_atomic;
use serde_json::json;

use crate::args::Global;
use crate::output;
use crate::progress::Bar;
use crate::report::{Source, figures, page, png, read};

/// Draws the figures of results as SVG and PNG, and puts them with the results' tables on one HTML page, which needs no
/// other file.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What bench, simulate, eval or profile printed with --json, a demo.json, a summary of scripts/bench_decode, or
    /// recorded lengths (lengths.jsonl or the published array), told apart by their content; give it again for more
    #[arg(short, long, value_name = "FILE", required = true)]
    pub input: Vec<PathBuf>,

    /// Folder for index.html and the figures
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
}

/// Draws.
///
/// # Errors
/// An input is nothing that can be drawn, or the folder cannot be written.
pub fn run(global: &Global, args: &Args) -> anyhow::Result<()> {
    // All are read before anything is written.
    let sources = read(&args.input)?;
    let index = write(&sources, &args.output)?;
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
pub fn write(sources: &[Source], folder: &Path) -> anyhow::Result<PathBuf> {
    let figures = figures(sources);
    let mut bar = Bar::new("figures", figures.len() as u64);
    for (done, figure) in figures.iter().enumerate() {
        bar.set(done as u64, |_| figure.name.clone());
        write_atomic(&folder.join(format!("{}.svg", figure.name)), &figure.svg)?;
        write_atomic(&folder.join(format!("{}.png", figure.name)), png(&figure.svg)?)?;
    }
    bar.finish();
    let index = folder.join("index.html");
    write_atomic(&index, page(sources, &figures))?;
    Ok(index)
}
