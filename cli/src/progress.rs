//! Progress bars on standard error.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::logging;

/// Where there is no terminal for a bar, a line is logged this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// A progress bar: drawn on a terminal, a log line now and then elsewhere.
pub struct Bar {
    bar: Option<ProgressBar>,
    name: &'static str,
    total: u64,
    last: Instant,
    began: Instant,
}

impl Bar {
    /// `total` steps of something.
    pub fn new(name: &'static str, total: u64) -> Self {
        let shown = stderr().is_terminal() && tracing::enabled!(tracing::Level::INFO);
        let bar = shown.then(|| {
            let bar = logging::add_bar(ProgressBar::new(total));
            let template = "{prefix} [{bar:30}] {pos}/{len} {msg} {eta} left";
            bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(name);
            bar
        });
        Self {
            bar,
            name,
            total,
            last: Instant::now(),
            began: Instant::now(),
        }
    }

    /// `done` steps are done; `message` says what else is worth knowing, given the time since the beginning.
    pub fn set(&mut self, done: u64, message: impl FnOnce(Duration) -> String) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(message(self.began.elapsed()));
        } else if self.last.elapsed() >= LINE_EVERY {
            tracing::info!(
                "{}: {done} of {}, {}",
                self.name,
                self.total,
                message(self.began.elapsed())
            );
            self.last = Instant::now();
        }
    }

    /// Takes the bar away.
    pub fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `amount` per second, for messages.
pub fn rate(amount: u64, elapsed: Duration) -> f64 {
    amount as f64 / elapsed.as_secs_f64().max(1e-9)
}
