//! The lengthwise command line: parse, run one command, print the error, set the exit code.

mod address;
mod args;
mod commands;
mod cost;
mod device;
mod error;
mod history;
mod identity;
mod in_passes;
mod inputs;
mod interrupt;
mod kept;
mod logging;
mod output;
mod parse;
mod predictions;
mod progress;
mod report;
mod slots;
mod sweep;
mod table;

use std::process::ExitCode;

use clap::Parser;

/// glibc gives large buffers back to the kernel at every free; this one keeps them, and tensors are large buffers.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    say_threads();
    // Wrong usage is printed and exits with 2 in here.
    let cli = args::Cli::parse();
    logging::init(&cli.global);
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => error::report(&err),
    }
}

/// Sets `RAYON_NUM_THREADS` where the user has not: candle looks for it at every operation, and counts the processors
/// in /proc/cpuinfo each time where it is not set.
fn say_threads() {
    const NAME: &str = "RAYON_NUM_THREADS";
    if std::env::var_os(NAME).is_none() {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        // SAFETY: the first thing in the process, before there is another thread.
        unsafe { std::env::set_var(NAME, threads.to_string()) };
    }
}
