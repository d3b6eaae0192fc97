//! `demo`: the whole loop on the bundled model, each step as its own command does it.

mod figures;
mod served;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;
use lengthwise_core::{Prompt, Request, SamplingParams};
use lengthwise_decoder::{EngineConfig, LocalDecoder};
use lengthwise_model::{LoadedModel, LoraConfig};
use lengthwise_predictor::{ConstantPredictor, Question};
use lengthwise_scheduler::{ScheduleConfig, Strategy, StrategyReport, StrategyRow};
use lengthwise_train::collect::{CollectConfig, CollectJob};
use lengthwise_train::files::{
    InstructionRecord, LengthRecord, Pair, PairFormat, pair_line, read_instructions, write_atomic,
};
use lengthwise_train::language::{Split, instructions};
use lengthwise_train::lora_training::{HeadObjective, LoraTrainingConfig, TrainObjective, TrainRun};
use lengthwise_train::{LabelTarget, PredictorRow, label};

use super::bench::{Lengths, time_strategy};
use super::collect::collect_with_bar;
use super::eval::{measure, median};
use super::train::train_with_bar;
use crate::args::Global;
use crate::inputs::{default_slots, local_decoder};
use crate::interrupt::end_saying;
use crate::output::{print, print_json};
use crate::parse;
use crate::predictions::{ADMIT_QUANTILE, ask, local_predictor, scheduled_length};
use crate::report::{ReportData, Source};
use crate::table::Table;

/// Flags of `demo`.
#[derive(Args)]
pub struct DemoArgs {
    /// Folder for the data on the way, the adapter and the report; an earlier demo in it is replaced
    #[arg(long, default_value = "lengthwise-demo")]
    output: PathBuf,
    /// Instructions that the adapter is tuned on
    #[arg(long, default_value = "2400", value_parser = parse::up_to(1_000_000))]
    train_instructions: NonZeroUsize,
    /// Other instructions, which the predictors are tested on and the strategies answer
    #[arg(long, default_value = "256", value_parser = parse::up_to(1_000_000))]
    test_instructions: NonZeroUsize,
    /// Sequences in a batch
    #[arg(long, default_value = "16")]
    batch_size: NonZeroUsize,
    /// Passes over the pairs
    #[arg(long, default_value = "7", value_parser = parse::up_to(1_000_000))]
    epochs: NonZeroUsize,
}

/// Cap on every answer, in tokens: the longest answers of the bundled model's language have about 430.
const MAX_NEW_TOKENS: u32 = 512;
/// Labels are rounded up to this; the bundled model's answers are shorter than Vicuna's, for which 50 was published.
const BUCKET: u32 = 10;
/// Peak learning rate of the adapter. A model of a million parameters takes a higher one than the published 2e-5.
const LEARNING_RATE: f64 = 5e-3;
/// The same where a head is trained; chosen on the instructions of seed 7.
const HEAD_LEARNING_RATE: f64 = 2e-3;
/// The file that tells a demo's folder from others.
const MARK: &str = "demo.json";

pub fn run(global: &Global, args: &DemoArgs) -> anyhow::Result<()> {
    check_is_ours(&args.output)?;
    let began = Instant::now();
    let demo = Demo {
        global,
        args,
        model: global.open_model()?,
    };
    // An earlier demo stays until nothing but this one can fail.
    prepare(&args.output)?;
    end_saying("the same command begins the demo anew".to_owned())?;
    let train = demo.lengths("train", Split::Train, args.train_instructions)?;
    let test = demo.lengths("test", Split::HeldOut, args.test_instructions)?;
    let train_pairs = demo.pairs("train", &train)?;
    let test_pairs = demo.pairs("test", &test)?;
    let adapter = demo.train("adapter", TrainObjective::Number, &train_pairs)?;
    let head = demo.train("head", TrainObjective::Head(HeadObjective::default()), &train_pairs)?;
    let (predictors, points) = demo.evaluate([&adapter, &head], &train_pairs, &test_pairs)?;
    let strategies = demo.schedule(&head, &test_pairs)?;
    let seconds = began.elapsed().as_secs_f64();
    let data = ReportData {
        setup: demo.setup(seconds)?,
        strategies,
        predictors,
        predictions: points,
        length_samples: test
            .iter()
            .map(|r| r.samples.iter().map(|s| s.tokens).collect())
            .collect(),
        ..figures::speed(&demo.model)?
    };
    write_atomic(&args.output.join(MARK), &(serde_json::to_string_pretty(&data)? + "\n"))?;
    let index = super::report::write(&[Source::alone(data.clone())], &args.output.join("report"))?;
    if global.json {
        // What there is beyond the strategies is in the folder.
        return print_json(&StrategyReport {
            strategies: data.strategies,
        });
    }
    print(&Table::predictors(&data.predictors).text())?;
    print("")?;
    print(&Table::strategies(&data.strategies).text())?;
    print(&format!(
        "\nThe figures are in {} ({seconds:.0} s in all).",
        index.display()
    ))
}

fn is_in_use(folder: &Path) -> anyhow::Result<bool> {
    Ok(folder.is_dir() && std::fs::read_dir(folder)?.next().is_some())
}

/// The folder is new, empty, or an earlier demo's.
fn check_is_ours(folder: &Path) -> anyhow::Result<()> {
    if is_in_use(folder)? && !folder.join(MARK).is_file() {
        bail!("{} has other files in it: choose another --output", folder.display());
    }
    Ok(())
}

/// Makes the folder, or empties one that an earlier demo made.
fn prepare(folder: &Path) -> anyhow::Result<()> {
    // Again: a model takes its time to load.
    check_is_ours(folder)?;
    if is_in_use(folder)? {
        std::fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    // Marked first, so that a demo that was stopped is replaced too.
    Ok(write_atomic(&folder.join(MARK), "{}\n")?)
}

struct Demo<'a> {
    global: &'a Global,
    args: &'a DemoArgs,
    model: LoadedModel,
}

impl Demo<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.args.output.join(name)
    }

    fn decoder(&self, slots: NonZeroUsize) -> anyhow::Result<LocalDecoder> {
        local_decoder(&self.model, None, slots, EngineConfig::default())
    }

    /// Writes instructions of one split, samples the model's answers and keeps their lengths.
    fn lengths(&self, name: &str, split: Split, n: NonZeroUsize) -> anyhow::Result<Vec<LengthRecord>> {
        let line = |(i, question): (usize, &lengthwise_train::language::Question)| {
            let value = serde_json::json!({"id": format!("{name}-{i}"), "instruction": question.instruction});
            format!("{value}\n")
        };
        let questions = instructions(split, self.global.seed.wrapping_add(1), n.get());
        let path = self.path(&format!("{name}-instructions.jsonl"));
        write_atomic(&path, questions.iter().enumerate().map(line).collect::<String>())?;
        let records: Vec<InstructionRecord> = read_instructions(&path)?;
        let config = CollectConfig {
            model: self.model.name.clone(),
            dtype: Some(self.model.network.dtype().as_str().to_owned()),
            kv_cache_dtype: None,
            temperatures: vec![0.0, 0.3, 0.5, 0.7],
            top_p: self.model.sampling.top_p,
            top_k: self.model.sampling.top_k,
            samples_per_temperature: 1,
            max_new_tokens: MAX_NEW_TOKENS,
            seed: self.global.seed,
            save_text: false,
        };
        tracing::info!(
            "collect: four samples of the answer to each of {} {name} instructions",
            records.len()
        );
        let output = self.path(&format!("{name}-lengths.jsonl"));
        let job = CollectJob {
            instructions: &records,
            config: &config,
            output: &output,
            skip_too_long: false,
        };
        Ok(collect_with_bar(job, &mut self.decoder(default_slots())?)?.records)
    }

    fn pairs(&self, name: &str, lengths: &[LengthRecord]) -> anyhow::Result<Vec<Pair>> {
        let pairs = label(lengths, LabelTarget::Max, BUCKET)?;
        let text: String = pairs.iter().map(|pair| pair_line(pair, PairFormat::Pairs)).collect();
        write_atomic(&self.path(&format!("{name}-pairs.jsonl")), &text)?;
        Ok(pairs)
    }

    fn train(&self, name: &str, objective: TrainObjective, pairs: &[Pair]) -> anyhow::Result<PathBuf> {
        let learning_rate = match objective {
            TrainObjective::Number => LEARNING_RATE,
            TrainObjective::Head(_) => HEAD_LEARNING_RATE,
        };
        let config = LoraTrainingConfig {
            objective,
            lora: LoraConfig::default(),
            epochs: self.args.epochs.get(),
            learning_rate,
            seed: self.global.seed,
            ..LoraTrainingConfig::default()
        };
        let (rank, n) = (config.lora.r, pairs.len());
        tracing::info!("train: an adapter of rank {rank} on {n} pairs, {name}");
        let output = self.path(name);
        let run = TrainRun::new(&self.model, output.clone());
        train_with_bar(&run, &config, pairs, &[])?;
        Ok(output)
    }

    /// The adapters, perception in advance, and always the training data's median, on instructions never trained on.
    fn evaluate(
        &self,
        [number, head]: [&Path; 2],
        train: &[Pair],
        test: &[Pair],
    ) -> anyhow::Result<(Vec<PredictorRow>, Vec<crate::report::PredictionSeries>)> {
        tracing::info!("eval: {} instructions that were not trained on", test.len());
        let cap = MAX_NEW_TOKENS;
        let (mut rows, mut series) = (Vec::new(), Vec::new());
        for (name, adapter) in [("adapter", number), ("head", head)] {
            let mut tuned = local_predictor(&self.model, Some(adapter), Question::Length, cap)?;
            let (row, points) = measure(name, tuned.as_mut(), test, cap)?;
            rows.push(row);
            series.push(crate::report::PredictionSeries {
                predictor: name.to_owned(),
                points,
            });
        }
        let mut pia = local_predictor(&self.model, None, Question::Pia, cap)?;
        rows.push(measure("pia", pia.as_mut(), test, cap)?.0);
        let mut constant = ConstantPredictor {
            max_tokens: median(train),
        };
        rows.push(measure("median", &mut constant, test, cap)?.0);
        Ok((rows, series))
    }

    /// The test instructions under each strategy, scheduled by the adapter that a server on loopback holds.
    fn schedule(&self, adapter: &Path, test: &[Pair]) -> anyhow::Result<Vec<StrategyRow>> {
        let mut server = served::ServedPredictor::start(&self.model, adapter, MAX_NEW_TOKENS)?;
        tracing::info!("serve: the adapter answers at {}", server.url());
        let mut decoder = self.decoder(self.args.batch_size)?;
        let request = |pair: &Pair| {
            decoder.tokenize(&Request {
                id: pair.id.clone(),
                prompt: Prompt::Instruction(pair.instruction.clone()),
                max_new_tokens: MAX_NEW_TOKENS,
                sampling: SamplingParams::GREEDY,
            })
        };
        let sequences = test.iter().map(request).collect::<Result<Vec<_>, _>>()?;
        let prompts: Vec<Prompt> = test
            .iter()
            .map(|p| Prompt::Instruction(p.instruction.clone()))
            .collect();
        let largest: Vec<u32> = test.iter().map(super::eval::truth).collect();
        let mut rows = Vec::new();
        for (strategy, predicts) in [
            (Strategy::Vanilla, false),
            (Strategy::SeqSch, true),
            (Strategy::Oracle, false),
            (Strategy::Continuous, true),
        ] {
            let began = Instant::now();
            let predicted = match predicts {
                true => ask(server.predictor(), &prompts, test.iter().map(|p| &p.id), MAX_NEW_TOKENS)?
                    .iter()
                    .map(|e| scheduled_length(e, strategy, ADMIT_QUANTILE))
                    .collect(),
                false => largest.clone(),
            };
            // An oracle is asked for free; a predictor's time counts.
            let seconds = if predicts { began.elapsed().as_secs_f64() } else { 0.0 };
            let config = ScheduleConfig {
                batch_size: self.args.batch_size,
                max_new_tokens: MAX_NEW_TOKENS,
                ..ScheduleConfig::new(strategy)
            }
            .with(true, true);
            let lengths = Lengths {
                predicted: &predicted,
                seconds,
                in_passes: None,
            };
            rows.push(time_strategy(&mut decoder, &sequences, &lengths, &config)?);
        }
        server.stop()?;
        Ok(rows)
    }

    fn setup(&self, seconds: f64) -> anyhow::Result<serde_json::Map<String, serde_json::Value>> {
        let value = serde_json::json!({
            "model": self.model.name,
            "device": if self.model.network.device().is_cpu() { "cpu" } else { "cuda" },
            "dtype": format!("{:?}", self.model.network.dtype()).to_lowercase(),
            "version": env!("CARGO_PKG_VERSION"),
            "seed": self.global.seed,
            "seconds": seconds.round(),
        });
        value.as_object().cloned().context("an object was just made")
    }
}
