//! Ctrl-C and SIGTERM.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use lengthwise_decoder::Cancellation;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signals that ask a process to end.
pub struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
}

impl StopSignals {
    /// From now on they no longer end the process by themselves. In a tokio runtime.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    /// Waits for the next.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Lets a long job end in good order: the first signal cancels what it decodes, the second ends the process at once.
pub struct Interrupt {
    asked: Arc<AtomicBool>,
    /// For the run that is to end.
    pub cancellation: Cancellation,
}

impl Interrupt {
    /// Watches for signals to the end of the process.
    pub fn watch() -> anyhow::Result<Self> {
        let (asked, cancellation) = (Arc::new(AtomicBool::new(false)), Cancellation::new());
        let watched = Self {
            asked: asked.clone(),
            cancellation: cancellation.clone(),
        };
        at_first_signal(move || {
            asked.store(true, Ordering::SeqCst);
            cancellation.cancel_all();
        })?;
        Ok(watched)
    }

    /// Whether the end was asked for.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }
}

/// For a job whose files are whole at any time: the first signal ends the process, in one line that says what is kept.
pub fn end_saying(what_is_kept: String) -> anyhow::Result<()> {
    at_first_signal(move || {
        crate::logging::above_bars(|| eprintln!("error: stopped: {what_is_kept}"));
        std::process::exit(1)
    })
}

/// Watches on a thread of its own; the second signal ends the process.
fn at_first_signal(act: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    let mut signals = {
        let _inside = runtime.enter();
        StopSignals::new().context("signals cannot be watched for")?
    };
    let watch = async move {
        signals.next().await;
        act();
        signals.next().await;
        std::process::exit(1)
    };
    let thread = std::thread::Builder::new().name("signals".to_owned());
    thread.spawn(move || runtime.block_on(watch))?;
    Ok(())
}
