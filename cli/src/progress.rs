//! Progress bars on standard error.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use lengthwise_model::OpenProgress;

use crate::logging;

/// Where there is no terminal for a bar, a line is logged this often.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// What takes less is not worth a bar.
pub const NO_BAR_FOR: Duration = Duration::from_secs(2);

/// What a bar counts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unit {
    Steps,
    Bytes,
}

impl Unit {
    fn template(self) -> &'static str {
        match self {
            Self::Steps => "{prefix} [{bar:30}] {pos}/{len} {msg} {eta} left",
            Self::Bytes => "{prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta} left",
        }
    }

    fn text(self, amount: u64) -> String {
        match self {
            Self::Steps => amount.to_string(),
            Self::Bytes => HumanBytes(amount).to_string(),
        }
    }
}

/// A progress bar: drawn on a terminal, a log line now and then elsewhere.
pub struct Bar {
    bar: Option<ProgressBar>,
    name: String,
    unit: Unit,
    total: u64,
    last: Instant,
    began: Instant,
}

impl Bar {
    /// `total` steps of something.
    pub fn new(name: &str, total: u64) -> Self {
        Self::counting(Unit::Steps, name, total)
    }

    fn counting(unit: Unit, name: &str, total: u64) -> Self {
        let shown = stderr().is_terminal() && tracing::enabled!(tracing::Level::INFO);
        let bar = shown.then(|| {
            let bar = logging::add_bar(ProgressBar::new(total));
            let style = ProgressStyle::with_template(unit.template());
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_prefix(name.to_owned());
            bar
        });
        Self {
            bar,
            name: name.to_owned(),
            unit,
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
            let of = format!("{} of {}", self.unit.text(done), self.unit.text(self.total));
            match message(self.began.elapsed()) {
                message if message.is_empty() => tracing::info!("{}: {of}", self.name),
                message => tracing::info!("{}: {of}, {message}", self.name),
            }
            self.last = Instant::now();
        }
    }

    /// `done` steps were done before the beginning; the rate is that of the others.
    fn resume_at(&self, done: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.reset_eta();
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

/// Shows how far the opening of a model is: a bar for every file that is fetched, one for the loading of the weights.
pub struct OpeningBars {
    began: Instant,
    download: Option<(String, Bar)>,
    loading: Option<Bar>,
}

impl OpeningBars {
    /// Nothing to be seen yet.
    pub fn new() -> Self {
        Self {
            began: Instant::now(),
            download: None,
            loading: None,
        }
    }
}

impl OpenProgress for OpeningBars {
    fn downloaded(&mut self, file: &str, done_bytes: u64, total_bytes: u64) {
        let is_under_way = self.download.as_ref().is_some_and(|(name, _)| name == file);
        if !is_under_way {
            let size = HumanBytes(total_bytes);
            match done_bytes {
                0 => tracing::info!("fetching {file}, {size}"),
                done if done < total_bytes => tracing::info!("fetching {file}, {size}, from {} on", HumanBytes(done)),
                _ => return,
            }
            let bar = Bar::counting(Unit::Bytes, file, total_bytes);
            bar.resume_at(done_bytes);
            self.download = Some((file.to_owned(), bar));
        }
        if done_bytes == total_bytes {
            if let Some((_, bar)) = self.download.take() {
                bar.finish();
            }
        } else if let Some((_, bar)) = &mut self.download {
            bar.set(done_bytes, |_| String::new());
        }
    }

    fn loaded(&mut self, done: usize, total: usize) {
        if done == total {
            if let Some(bar) = self.loading.take() {
                bar.finish();
            }
        } else if done == 0 {
            self.began = Instant::now();
        } else if self.began.elapsed() >= NO_BAR_FOR {
            let new = || Bar::new("loading the weights", total as u64);
            self.loading.get_or_insert_with(new).set(done as u64, |_| String::new());
        }
    }
}
