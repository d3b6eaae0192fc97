//! `train`: tune an adapter.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use clap::{Args, ValueEnum};
use lengthwise_model::{LoadedModel, LoraConfig, TargetModules};
use lengthwise_train::files::{Pair, read_pairs};
use lengthwise_train::lora_training::{
    HeadObjective, LoraTrainingConfig, TrainExample, TrainObjective, TrainOutcome, TrainRun, check_output,
    invocation_tokens, train,
};
use lengthwise_train::optim::Schedule;

use crate::args::Global;
use crate::interrupt::Interrupt;
use crate::output::print_json;
use crate::parse;
use crate::progress::{Bar, rate};

/// Flags of `train`; the defaults are the published settings.
#[derive(Args)]
pub struct TrainArgs {
    /// Pairs to train on, pairs.jsonl
    #[arg(long)]
    data: PathBuf,
    /// Folder for the adapter, in PEFT's format
    #[arg(long)]
    output: PathBuf,
    /// Pairs to evaluate on; the best adapter is kept
    #[arg(long)]
    eval_data: Option<PathBuf>,
    /// Go on from the last checkpoint in the output folder; a run that is finished stays as it is
    #[arg(long)]
    resume: bool,
    /// What is learnt: to print the label, or the distribution of the sampled lengths
    #[arg(long, value_enum, default_value_t = ObjectiveArg::Number)]
    objective: ObjectiveArg,
    /// With --objective head: the cap that the lengths were sampled under, in tokens
    #[arg(long, default_value_t = HeadObjective::default().max_tokens, value_parser = clap::value_parser!(u32).range(2..))]
    max_tokens: u32,
    /// With --objective head: how far a sample is spread over the bins, in the logarithm of the length
    #[arg(long, default_value_t = HeadObjective::default().smoothing, value_parser = parse::fraction::<f64>)]
    smoothing: f64,
    /// With --objective head: whether the length question is asked after the instruction
    #[arg(long, default_value_t = HeadObjective::default().asks_length, action = clap::ArgAction::Set)]
    length_question: bool,
    /// With --objective head: share of the data held out for calibration, where there is no --eval-data
    #[arg(long, default_value_t = HeadObjective::default().calibration_share, value_parser = parse::fraction_below_one)]
    calibration_share: f64,
    /// Rank
    #[arg(long, default_value = "8", value_parser = parse::up_to(8192))]
    lora_r: NonZeroUsize,
    /// The low-rank term is multiplied by alpha / r
    #[arg(long, default_value_t = 16.0, value_parser = parse::positive::<f64>)]
    lora_alpha: f64,
    /// Share of the low-rank term's inputs that is dropped
    #[arg(long, default_value_t = 0.05, value_parser = parse::fraction_below_one)]
    lora_dropout: f64,
    /// Multiply by alpha / sqrt(r) instead
    #[arg(long)]
    use_rslora: bool,
    /// Linear layers to adapt, with commas, or all-linear
    #[arg(long, default_value = "q_proj,v_proj")]
    target_modules: TargetModules,
    /// Activated LoRA: the adapter begins behind the instruction (PEFT's alora_invocation_tokens), so that a prediction in the
    /// decoder's passes costs the tokens behind it alone
    #[arg(long)]
    alora: bool,
    /// Passes over the data [default: 3, with --objective head 7]
    #[arg(long, value_parser = parse::up_to(1_000_000))]
    epochs: Option<NonZeroUsize>,
    /// Most optimiser steps
    #[arg(long)]
    max_steps: Option<NonZeroUsize>,
    /// Peak learning rate [default: 2e-5; with --objective head 2e-3, which suits the bundled model: less for a larger one]
    #[arg(long, value_parser = parse::positive::<f64>)]
    learning_rate: Option<f64>,
    /// How it falls after the warm-up
    #[arg(long, value_enum, default_value_t = SchedulerArg::Cosine)]
    lr_scheduler: SchedulerArg,
    /// Share of the steps in which it rises
    #[arg(long, default_value_t = 0.03, value_parser = parse::fraction::<f64>)]
    warmup_ratio: f64,
    /// Examples in one forward pass
    #[arg(long, default_value = "16")]
    batch_size: NonZeroUsize,
    /// Forward passes per optimiser step
    #[arg(long, default_value = "2")]
    gradient_accumulation_steps: NonZeroUsize,
    /// Keep no activations but those between layers: a fraction of the memory, a third more arithmetic
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Largest joint norm of a step's gradients; 0: not clipped
    #[arg(long, default_value_t = 1.0, value_parser = parse::not_negative::<f64>)]
    max_grad_norm: f64,
    /// Weight decay of AdamW
    #[arg(long, default_value_t = 0.0, value_parser = parse::not_negative::<f64>)]
    weight_decay: f64,
    /// Steps between checkpoints
    #[arg(long, default_value = "100")]
    save_steps: NonZeroUsize,
    /// Steps between evaluations
    #[arg(long, default_value = "100")]
    eval_steps: NonZeroUsize,
}

/// Objectives by name.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ObjectiveArg {
    /// The model prints the label, as published
    Number,
    /// A head on the last hidden state gives the distribution of the length, without decoding
    Head,
}

/// Schedules by name.
#[derive(Clone, Copy, ValueEnum)]
enum SchedulerArg {
    Cosine,
    Linear,
    Constant,
}

impl TrainArgs {
    fn config(&self, model: &LoadedModel, seed: u64) -> anyhow::Result<LoraTrainingConfig> {
        let (epochs, learning_rate) = match self.objective {
            ObjectiveArg::Number => (3, 2e-5),
            // Chosen on the bundled model among rates from 2e-4 to 1e-2 and 4 to 10 epochs.
            ObjectiveArg::Head => (7, 2e-3),
        };
        let objective = match self.objective {
            ObjectiveArg::Number => TrainObjective::Number,
            ObjectiveArg::Head => TrainObjective::Head(HeadObjective {
                max_tokens: self.max_tokens,
                asks_length: self.length_question,
                smoothing: self.smoothing,
                calibration_share: self.calibration_share,
            }),
        };
        let invocation_tokens = match self.alora {
            true => invocation_tokens(model, &objective)?,
            false => Vec::new(),
        };
        Ok(LoraTrainingConfig {
            objective,
            lora: LoraConfig {
                r: self.lora_r.get(),
                lora_alpha: self.lora_alpha,
                lora_dropout: self.lora_dropout,
                use_rslora: self.use_rslora,
                target_modules: self.target_modules.clone(),
                invocation_tokens,
            },
            epochs: self.epochs.map_or(epochs, NonZeroUsize::get),
            max_steps: self.max_steps.map(NonZeroUsize::get),
            learning_rate: self.learning_rate.unwrap_or(learning_rate),
            schedule: match self.lr_scheduler {
                SchedulerArg::Cosine => Schedule::Cosine,
                SchedulerArg::Linear => Schedule::Linear,
                SchedulerArg::Constant => Schedule::Constant,
            },
            warmup_ratio: self.warmup_ratio,
            batch_size: self.batch_size.get(),
            gradient_accumulation_steps: self.gradient_accumulation_steps.get(),
            gradient_checkpointing: self.gradient_checkpointing,
            max_grad_norm: self.max_grad_norm,
            weight_decay: self.weight_decay,
            seed,
            save_steps: self.save_steps.get(),
            eval_steps: self.eval_steps.get(),
        })
    }
}

pub fn run(global: &Global, args: &TrainArgs) -> anyhow::Result<()> {
    check_output(&args.output, args.resume)?;
    let data = read_pairs(&args.data)?;
    let eval = args
        .eval_data
        .as_deref()
        .map(read_pairs)
        .transpose()?
        .unwrap_or_default();
    let model = global.open_model()?;
    let config = args.config(&model, global.seed)?;
    let began = Instant::now();
    let interrupt = Interrupt::watch()?;
    let run = TrainRun {
        model: &model,
        output: args.output.clone(),
        resume: args.resume,
        stop: &|| interrupt.is_asked(),
    };
    let (outcome, tokens) = train_with_bar(&run, &config, &data, &eval)?;
    let (step, output) = (outcome.best_step, args.output.display());
    match outcome.was_finished {
        true => tracing::info!("{output} holds the adapter of step {step} of this run, which is finished"),
        false => tracing::info!("adapter of step {step} written to {output}"),
    }
    match global.json {
        true => print_json(&serde_json::json!({
            "output": args.output, "steps": outcome.steps, "best_step": outcome.best_step,
            "eval_loss": outcome.eval_loss, "tokens": tokens, "seconds": began.elapsed().as_secs_f64(),
        })),
        false => Ok(()),
    }
}

/// Trains under a progress bar. Returns the tokens that went through the network too.
pub fn train_with_bar(
    run: &TrainRun,
    config: &LoraTrainingConfig,
    data: &[Pair],
    eval: &[Pair],
) -> anyhow::Result<(TrainOutcome, u64)> {
    let examples =
        |pairs: &[Pair]| -> Vec<TrainExample> { pairs.iter().map(|pair| config.objective.example(pair)).collect() };
    let mut bar: Option<Bar> = None;
    let mut tokens = 0;
    let outcome = train(run, config, &examples(data), &examples(eval), &mut |p| {
        tokens += p.tokens as u64;
        let bar = bar.get_or_insert_with(|| Bar::new("train", p.total_steps as u64));
        bar.set(p.point.step as u64, |elapsed| {
            format!("loss {:.4}, {:.0} tokens/s", p.point.loss, rate(tokens, elapsed))
        });
    })?;
    if let Some(bar) = bar {
        bar.finish();
    }
    Ok((outcome, tokens))
}
