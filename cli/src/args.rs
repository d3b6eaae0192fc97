//! The flags that every command takes.

use std::sync::OnceLock;

use candle_core::Device;
use clap::{Args, Parser};
use lengthwise_model::{DTypeChoice, LoadedModel, Precision, Quantization, TINY};

use crate::commands::Command;
use crate::device::{self, DeviceChoice};
use crate::progress::OpeningBars;

/// Knows how long a language model's answer will be before it is written, and makes inference faster by it.
#[derive(Parser)]
#[command(name = "lengthwise", version, propagate_version = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Args, Clone)]
pub struct Global {
    /// A Hugging Face model folder, a model of the hub (org/name or org/name@revision, fetched into the cache that
    /// HF_HOME or HF_HUB_CACHE names), or `tiny`, the bundled model
    #[arg(long, global = true, default_value = TINY)]
    pub model: String,
    /// cpu, cuda, or cuda:N [default: cuda where built in and present]
    #[arg(long, global = true)]
    pub device: Option<DeviceChoice>,
    /// auto, f32, bf16 or f16; auto is f32 on the CPU, else the checkpoint's own
    #[arg(long, global = true, default_value = "auto", value_parser = parse_dtype)]
    pub dtype: DTypeChoice,
    /// Everything random comes from it
    #[arg(long, global = true, default_value_t = 0)]
    pub seed: u64,
    /// Print one JSON object on standard output instead of tables
    #[arg(long, global = true)]
    pub json: bool,
    /// More on standard error; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Only warnings on standard error; twice for errors alone
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub quiet: u8,
    /// What [`Global::device`] has opened.
    #[arg(skip)]
    opened: OnceLock<Device>,
}

pub fn parse_dtype(text: &str) -> Result<DTypeChoice, String> {
    match text {
        "auto" => Ok(DTypeChoice::Auto),
        "f32" => Ok(DTypeChoice::F32),
        "bf16" => Ok(DTypeChoice::Bf16),
        "f16" => Ok(DTypeChoice::F16),
        _ => Err("expected auto, f32, bf16 or f16".to_owned()),
    }
}

impl Global {
    /// The device asked for, or the best there is; opened once, however often it is asked for.
    pub fn device(&self) -> anyhow::Result<Device> {
        if let Some(opened) = self.opened.get() {
            return Ok(opened.clone());
        }
        let device = device::open(self.device)?;
        Ok(self.opened.get_or_init(|| device).clone())
    }

    /// The model asked for.
    pub fn open_model(&self) -> anyhow::Result<LoadedModel> {
        self.open_quantized(QuantizeArgs::default())
    }

    /// The model asked for, with weights of fewer bits where that is asked for too.
    pub fn open_quantized(&self, weights: QuantizeArgs) -> anyhow::Result<LoadedModel> {
        let mut bars = OpeningBars::new();
        let precision = Precision {
            dtype: self.dtype,
            quantization: weights.quantize,
        };
        Ok(LoadedModel::open(&self.model, precision, &self.device()?, &mut bars)?)
    }
}

/// For the commands that run a model and do not train it.
#[derive(Args, Clone, Copy, Default)]
pub struct QuantizeArgs {
    /// q8_0: weights of the linear layers and the head in 8 bits, rounded while loading; on the CPU, about a quarter of the
    /// memory
    #[arg(long, value_parser = parse_quantization)]
    pub quantize: Option<Quantization>,
}

fn parse_quantization(text: &str) -> Result<Quantization, String> {
    text.parse()
}
