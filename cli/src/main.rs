//! The lengthwise command line: parse, run one command, print the error, set the exit code.

mod args;
mod commands;
mod device;
mod error;
mod inputs;
mod logging;
mod output;
mod predictions;
mod progress;
mod report;
mod table;

use std::process::ExitCode;

use clap::Parser;

/// glibc gives large buffers back to the kernel at every free; this one keeps them, and tensors are large buffers.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // Wrong usage is printed and exits with 2 in here.
    let cli = args::Cli::parse();
    logging::init(&cli.global);
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => error::report(&err),
    }
}
