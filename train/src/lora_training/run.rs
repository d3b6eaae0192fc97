//! The training loop.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use lengthwise_model::{Adapter, Llama};

use super::checkpoint::{self, RunState};
use super::curve::Curve;
use super::order::Order;
use super::{CurvePoint, LoraTrainingConfig, LoraTrainingError, TrainExample, TrainProgress, TrainRun};
use crate::optim::{AdamW, AdamWConfig, Gradients, LearningRate};
use crate::packed::{EncodedExample, Objective, PackedExamples};

/// Parts of a forward pass that run side by side on the CPU.
const SHARDS: usize = 2;

/// What a run ended with.
pub struct TrainOutcome {
    /// The adapter that was saved: the best evaluated one, or the last without evaluation data.
    pub adapter: Adapter,
    /// Optimiser steps of the whole run.
    pub steps: usize,
    /// The step that the adapter was taken at.
    pub best_step: usize,
    /// Its loss over the evaluation data.
    pub eval_loss: Option<f64>,
}

/// Tunes an adapter on `examples` and writes it to the run's output folder in PEFT's format, with the loss curve
/// beside it. With `eval` examples the best of the evaluated adapters is kept, else the last.
///
/// # Errors
/// See [`LoraTrainingError`]; the last checkpoint stays and `resume` goes on from it, exactly as if never stopped.
pub fn train(
    run: &TrainRun,
    config: &LoraTrainingConfig,
    examples: &[TrainExample],
    eval: &[TrainExample],
    progress: &mut dyn FnMut(TrainProgress),
) -> Result<TrainOutcome, LoraTrainingError> {
    check(config, examples)?;
    std::fs::create_dir_all(&run.output).map_err(|source| LoraTrainingError::Io {
        path: run.output.clone(),
        source,
    })?;
    let data = Data {
        train: encode(run, examples)?,
        eval: encode(run, eval)?,
        order: Order {
            examples: examples.len(),
            batch_size: config.batch_size,
            accumulation: config.gradient_accumulation_steps,
            seed: config.seed,
        },
    };
    let mut trainer = Trainer::begin(run, config, &data)?;
    while trainer.state.step < trainer.rate.total_steps {
        let (point, tokens) = trainer.step(&data)?;
        progress(TrainProgress {
            point,
            total_steps: trainer.rate.total_steps,
            tokens,
        });
    }
    trainer.finish()
}

fn check(config: &LoraTrainingConfig, examples: &[TrainExample]) -> Result<(), LoraTrainingError> {
    if examples.is_empty() {
        return Err(LoraTrainingError::NoExamples);
    }
    let settings = [
        ("batch size", config.batch_size),
        ("gradient accumulation", config.gradient_accumulation_steps),
        ("epochs", config.epochs),
        ("steps between checkpoints", config.save_steps),
        ("steps between evaluations", config.eval_steps),
        ("rank", config.lora.r),
    ];
    match settings.iter().find(|(_, value)| *value == 0) {
        Some(&(name, got)) => Err(LoraTrainingError::Setting { name, got, least: 1 }),
        None => Ok(()),
    }
}

struct Data {
    train: Vec<EncodedExample>,
    eval: Vec<EncodedExample>,
    order: Order,
}

fn encode(run: &TrainRun, examples: &[TrainExample]) -> Result<Vec<EncodedExample>, LoraTrainingError> {
    let max = run.model.network.config().max_position_embeddings;
    let encode = |(index, example): (usize, &TrainExample)| {
        let encoded = EncodedExample::new(
            &run.model.tokenizer,
            &run.model.template,
            &example.prompt,
            &example.answer,
        )?;
        match encoded.tokens.len() {
            got if got > max => Err(LoraTrainingError::ExampleTooLong { index, got, max }),
            _ => Ok(encoded),
        }
    };
    examples.iter().enumerate().map(encode).collect()
}

/// A run in progress.
struct Trainer<'a> {
    run: &'a TrainRun<'a>,
    config: &'a LoraTrainingConfig,
    llama: &'a Llama,
    adapter: Adapter,
    adamw: AdamW,
    rate: LearningRate,
    state: RunState,
    curve: Curve,
}

impl<'a> Trainer<'a> {
    fn begin(run: &'a TrainRun, config: &'a LoraTrainingConfig, data: &Data) -> Result<Self, LoraTrainingError> {
        let llama = run.model.network.as_ref();
        let planned = config.epochs * data.order.steps_per_epoch();
        let total_steps = config.max_steps.map_or(planned, |max| max.min(planned));
        let warmup_steps = (config.warmup_ratio * total_steps as f64).ceil() as usize;
        let rate = LearningRate {
            peak: config.learning_rate,
            warmup_steps,
            total_steps,
            schedule: config.schedule,
        };
        let fingerprint = fingerprint(run, config, data);
        let saved = match checkpoint::newest(&run.output) {
            Some(path) if run.resume => {
                let saved = checkpoint::load(&path, llama.config(), llama.device())?;
                let pairs = saved.state.fingerprint.iter().zip(&fingerprint);
                if let Some((_, (what, _))) = pairs.into_iter().find(|(a, b)| a != b) {
                    return Err(LoraTrainingError::OtherRun {
                        path,
                        what: what.clone(),
                    });
                }
                Some(saved)
            }
            Some(_) => {
                return Err(LoraTrainingError::Unfinished {
                    path: run.output.clone(),
                });
            }
            None => None,
        };
        let adapter = match &saved {
            Some(saved) => saved.adapter.clone(),
            None => Adapter::init(llama.config(), config.lora.clone(), config.seed, llama.device())?,
        };
        let adamw_config = AdamWConfig {
            weight_decay: config.weight_decay,
            ..AdamWConfig::default()
        };
        let mut adamw = AdamW::new(adapter.tensors(), adamw_config)?;
        saved.as_ref().map_or(Ok(()), |saved| saved.restore(&mut adamw))?;
        let state = saved.map_or(
            RunState {
                step: 0,
                best: None,
                fingerprint,
            },
            |saved| saved.state,
        );
        let curve = Curve::open(&run.output, state.step)?;
        Ok(Self {
            run,
            config,
            llama,
            adapter,
            adamw,
            rate,
            state,
            curve,
        })
    }

    /// One optimiser step, with the evaluation and the checkpoint that fall due after it.
    fn step(&mut self, data: &Data) -> Result<(CurvePoint, usize), LoraTrainingError> {
        let step = self.state.step;
        let (loss, mut grads, tokens) = self.gradients(data, step)?;
        let grad_norm = grads.clip(self.config.max_grad_norm)?;
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(LoraTrainingError::Diverged { step: step + 1, loss });
        }
        let learning_rate = self.rate.at(step);
        self.adamw.step(&grads, learning_rate)?;
        self.state.step += 1;
        let done = self.state.step == self.rate.total_steps;
        let eval_loss = match !data.eval.is_empty() && (done || self.state.step.is_multiple_of(self.config.eval_steps))
        {
            true => Some(self.evaluate(&data.eval)?),
            false => None,
        };
        let epoch = self.state.step as f64 / data.order.steps_per_epoch() as f64;
        let point = CurvePoint {
            step: self.state.step,
            epoch,
            loss,
            learning_rate,
            grad_norm,
            eval_loss,
        };
        self.curve.push(&point)?;
        if done || self.state.step.is_multiple_of(self.config.save_steps) {
            checkpoint::save(
                &self.run.output,
                &self.run.model.name,
                &self.adapter,
                &self.adamw,
                &self.state,
            )?;
        }
        Ok((point, tokens))
    }

    fn gradients(&self, data: &Data, step: usize) -> Result<(f64, Gradients, usize), LoraTrainingError> {
        let passes = data.order.step(step);
        let shards: Vec<Vec<PackedExamples>> = passes.iter().map(|pass| self.shards(&data.train, pass)).collect();
        let answers: usize = shards.iter().flatten().map(PackedExamples::answer_tokens).sum();
        let parameters = self.adapter.tensors();
        let (mut loss, mut grads) = (0.0, Gradients::default());
        for (pass, shards) in shards.iter().enumerate() {
            let seed = hash(&(self.config.seed, step, pass));
            let objective = Objective {
                llama: self.llama,
                adapter: Some(&self.adapter),
                parameters: &parameters,
                dropout: Some((self.config.lora.lora_dropout, seed)),
            };
            loss += objective.gradients(shards, answers as f64, &mut grads)?;
        }
        Ok((loss, grads, shards.iter().flatten().map(PackedExamples::tokens).sum()))
    }

    /// A forward pass in parts that run side by side on the CPU; on another device it stays whole.
    fn shards(&self, examples: &[EncodedExample], pass: &[usize]) -> Vec<PackedExamples> {
        let shards = if self.llama.device().is_cpu() { SHARDS } else { 1 };
        let parts = pass.chunks(pass.len().div_ceil(shards));
        parts
            .map(|part| part.iter().map(|&i| examples[i].clone()).collect())
            .collect()
    }

    /// Mean loss over the evaluation data. The adapter is kept where it is the best so far.
    fn evaluate(&mut self, eval: &[EncodedExample]) -> Result<f64, LoraTrainingError> {
        let frozen = self.adapter.frozen()?;
        let (mut sum, mut tokens) = (0.0, 0);
        for batch in eval.chunks(self.config.batch_size) {
            let packed: PackedExamples = batch.iter().cloned().collect();
            let loss = packed.loss(self.llama, Some(&frozen), None, 1.0)?;
            sum += f64::from(loss.to_scalar::<f32>()?);
            tokens += packed.answer_tokens();
        }
        let loss = sum / tokens as f64;
        if self.state.best.is_none_or(|(best, _)| loss < best) {
            self.state.best = Some((loss, self.state.step));
            self.adapter.save(&self.run.output.join("best"), &self.run.model.name)?;
        }
        Ok(loss)
    }

    fn finish(self) -> Result<TrainOutcome, LoraTrainingError> {
        let best = self.run.output.join("best");
        let adapter = match self.state.best {
            Some(_) => Adapter::load(&best, self.llama.config(), self.llama.device())?,
            None => self.adapter.frozen()?,
        };
        adapter.save(&self.run.output, &self.run.model.name)?;
        self.adapter.save(&self.run.output.join("last"), &self.run.model.name)?;
        checkpoint::clear(&self.run.output)?;
        Ok(TrainOutcome {
            adapter,
            steps: self.rate.total_steps,
            best_step: self.state.best.map_or(self.rate.total_steps, |(_, step)| step),
            eval_loss: self.state.best.map(|(loss, _)| loss),
        })
    }
}

/// Whatever changes the course of a run, by name; what may differ between a run and its resumption is left out.
fn fingerprint(run: &TrainRun, config: &LoraTrainingConfig, data: &Data) -> Vec<(String, String)> {
    let tokens = |examples: &[EncodedExample]| hash(&examples.iter().map(|e| &e.tokens).collect::<Vec<_>>());
    let settings = LoraTrainingConfig {
        save_steps: 0,
        ..config.clone()
    };
    vec![
        ("model".to_owned(), run.model.name.clone()),
        ("training data".to_owned(), format!("{:016x}", tokens(&data.train))),
        ("evaluation data".to_owned(), format!("{:016x}", tokens(&data.eval))),
        ("setting".to_owned(), format!("{settings:?}")),
    ]
}

/// SipHash with fixed keys: the same in every process.
fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
