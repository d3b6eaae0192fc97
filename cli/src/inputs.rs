//! What several commands read and open in the same way.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use lengthwise_core::RequestId;
use lengthwise_decoder::{EngineConfig, KvBudget, LocalDecoder};
use lengthwise_model::{Adapter, DTypeChoice, LoadedModel};
use lengthwise_scheduler::{AdmissionOrder, Planning, ScheduleConfig, Strategy};
use lengthwise_train::files::{LengthRecord, read_lengths};

use crate::args::parse_dtype;

/// How requests are scheduled.
#[derive(Args, Clone)]
pub struct ScheduleArgs {
    /// Variable batch size: the shorter the prediction, the larger the batch
    #[arg(long)]
    pub vbs: bool,
    /// Failure collection and recomputation: a batch stops at its largest prediction
    #[arg(long)]
    pub fcr: bool,
    /// Requests that are planned together
    #[arg(long, default_value = "256")]
    pub group_size: NonZeroUsize,
    /// Sequences in a batch; slots of the continuous mode
    #[arg(long, default_value = "16")]
    pub batch_size: NonZeroUsize,
    /// Cap on every answer, in tokens
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_new_tokens: u32,
    /// Order in which the continuous mode admits: fcfs, sjf or ljf (by predicted length)
    #[arg(long, default_value = "ljf")]
    pub order: AdmissionOrder,
    /// What plans the batches of strategies that sort: `published` rules (see --vbs, --fcr), or `cost`, a model of this
    /// device's speed, measured once, which chooses batch sizes and stopping lengths; several with commas in bench
    /// and simulate
    #[arg(long, value_delimiter = ',', default_value = "published")]
    pub planner: Vec<PlannerChoice>,
    /// For the cost planner: what came of earlier predictions, an output of generate or recorded lengths (of which the
    /// largest stands for the prediction, disturbed as --noise-mae says)
    #[arg(long)]
    pub history: Option<PathBuf>,
}

/// What plans the batches of strategies that sort.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PlannerChoice {
    /// The published rules.
    Published,
    /// A cost model of this device.
    Cost,
}

impl ScheduleArgs {
    /// Whether a cost model is needed.
    pub fn wants_cost(&self, strategies: &[Strategy]) -> bool {
        self.planner.contains(&PlannerChoice::Cost) && strategies.iter().any(|s| s.sorts())
    }

    /// The schedules of one strategy: one for each planner where it sorts. `planning` is there where
    /// [`ScheduleArgs::wants_cost`] says so.
    pub fn configs(&self, strategy: Strategy, planning: Option<&Arc<Planning>>) -> Vec<ScheduleConfig> {
        let planned = |planner: &PlannerChoice| match planner {
            PlannerChoice::Published => self.config(strategy),
            PlannerChoice::Cost => self.config(strategy).planned_by(planning.cloned()),
        };
        match strategy.sorts() {
            true => self.planner.iter().map(planned).collect(),
            false => vec![self.config(strategy)],
        }
    }

    fn config(&self, strategy: Strategy) -> ScheduleConfig {
        ScheduleConfig {
            batch_size: self.batch_size,
            group_size: self.group_size,
            max_new_tokens: self.max_new_tokens,
            order: self.order,
            ..ScheduleConfig::new(strategy)
        }
        .with(self.vbs, self.fcr)
    }
}

/// Size and dtype of the KV cache.
#[derive(Args, Clone, Copy)]
pub struct CacheArgs {
    /// Tokens that the KV cache holds [default: what fits 1 GiB, or nine tenths of a GPU's free memory]
    #[arg(long, value_parser = parse_tokens)]
    pub kv_cache_tokens: Option<usize>,
    /// The same in bytes; K, M and G stand for 1024, 1024² and 1024³
    #[arg(long, value_parser = parse_bytes, conflicts_with = "kv_cache_tokens")]
    pub kv_cache_bytes: Option<usize>,
    /// dtype of the KV cache: auto is the weights' own; f16 halves it where the weights are f32 on the CPU, and a step there
    /// takes less time
    #[arg(long, default_value = "auto", value_parser = parse_dtype)]
    pub kv_cache_dtype: DTypeChoice,
}

impl CacheArgs {
    /// The engine's settings.
    pub fn engine(self) -> EngineConfig {
        let tokens = self.kv_cache_tokens.map(KvBudget::Tokens);
        let bytes = self.kv_cache_bytes.map(KvBudget::Bytes);
        EngineConfig {
            kv_budget: tokens.or(bytes).unwrap_or(KvBudget::Memory),
            kv_dtype: self.kv_cache_dtype,
            ..EngineConfig::default()
        }
    }
}

/// Tokens: as many as some machine has the memory for.
fn parse_tokens(text: &str) -> Result<usize, String> {
    let tokens = text.parse::<usize>().ok().filter(|n| (1..=1 << 40).contains(n));
    tokens.ok_or_else(|| "expected a number of tokens from 1 to 2^40".to_owned())
}

/// Bytes, with a unit or without.
fn parse_bytes(text: &str) -> Result<usize, String> {
    let (number, unit) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 1 << 10),
        Some((at, 'M' | 'm')) => (&text[..at], 1 << 20),
        Some((at, 'G' | 'g')) => (&text[..at], 1 << 30),
        _ => (text, 1_usize),
    };
    let bytes = number.parse::<usize>().ok().and_then(|n| n.checked_mul(unit));
    let bytes = bytes.filter(|n| (1..=1 << 50).contains(n));
    bytes.ok_or_else(|| "expected a number of bytes, such as 1500000, 512M or 2G".to_owned())
}

/// Sequences that run at once where it is not the user's to say: enough to fill a CPU.
pub fn default_slots() -> NonZeroUsize {
    NonZeroUsize::new(64).expect("64 is not 0")
}

/// A decoder on the model, with the adapter in a folder or without.
pub fn local_decoder(
    model: &LoadedModel,
    adapter: Option<&Path>,
    slots: NonZeroUsize,
    config: EngineConfig,
) -> anyhow::Result<LocalDecoder> {
    let load = |path: &Path| Adapter::load(path, model.network.config(), model.network.device());
    let adapter = adapter.map(load).transpose()?.map(Arc::new);
    Ok(LocalDecoder::new(model.clone(), adapter, slots, config)?)
}

/// True largest length of every request in a lengths file, cut at `cap`.
pub fn largest_lengths(path: &Path, cap: u32) -> anyhow::Result<HashMap<RequestId, u32>> {
    Ok(read_lengths(path)?
        .into_iter()
        .map(|r| (r.id.clone(), r.largest().min(cap)))
        .collect())
}

/// The recorded sample that `--actual` names: `t0.0`, `t0.3`, …
pub fn actual_length(record: &LengthRecord, actual: &str) -> anyhow::Result<u32> {
    let temperature: f32 = actual
        .strip_prefix('t')
        .and_then(|t| t.parse().ok())
        .with_context(|| format!("--actual is \"{actual}\", expected t0.0 or another temperature"))?;
    let sample = record.at_temperature(temperature);
    Ok(sample
        .with_context(|| format!("record {} has no sample at temperature {temperature}", record.id))?
        .tokens)
}

#[cfg(test)]
mod tests {
    use super::{parse_bytes, parse_tokens};

    #[test]
    fn a_cache_has_room_for_something_and_not_for_more_than_there_is() {
        assert_eq!((parse_tokens("1"), parse_tokens("4096")), (Ok(1), Ok(4096)));
        for text in ["0", "-1", "", "2G", "1099511627777", "18446744073709551615"] {
            parse_tokens(text).expect_err(text);
        }
    }

    #[test]
    fn bytes_have_a_unit_or_none() {
        let read: Vec<_> = ["1", "1500", "3K", "512M", "2g"].map(parse_bytes).into();
        assert_eq!(read, [Ok(1), Ok(1500), Ok(3072), Ok(512 << 20), Ok(2 << 30)]);
        for text in [
            "",
            "0",
            "M",
            "-1",
            "1.5G",
            "2GB",
            "99999999999999999999",
            "99999999999G",
        ] {
            parse_bytes(text).expect_err(text);
        }
    }
}
