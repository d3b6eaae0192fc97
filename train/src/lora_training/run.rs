//! The training loop.

use lengthwise_core::fixed_hash;
use lengthwise_model::{Adapter, LengthHead, Llama, ModelError, TrainPass};

use super::calibrate::{Calibration, calibrate};
use super::checkpoint::{self, Checkpoint, RunState};
use super::curve::Curve;
use super::data::{Batch, Data, Encoded};
use super::fingerprint::fingerprint;
use super::found::{self, Found};
use super::tuned::Tuned;
use super::{CurvePoint, LoraTrainingConfig, LoraTrainingError, TrainExample, TrainProgress, TrainRun};
use crate::files::lock_folder;
use crate::optim::{AdamW, AdamWConfig, Gradients, LearningRate};
use crate::packed::{Objective, Shard};

/// Parts of a forward pass that run side by side on the CPU.
const SHARDS: usize = 2;

/// What a run ended with.
pub struct TrainOutcome {
    /// The adapter that was saved: the best evaluated one, or the last without evaluation data.
    pub adapter: Adapter,
    /// Its length head, where that was the objective.
    pub head: Option<LengthHead>,
    /// Optimiser steps of the whole run.
    pub steps: usize,
    /// The step that the adapter was taken at.
    pub best_step: usize,
    /// Its loss over the evaluation data.
    pub eval_loss: Option<f64>,
    /// An earlier run had finished it: nothing was trained.
    pub was_finished: bool,
}

/// Tunes an adapter on `examples` and writes it to the run's output folder in PEFT's format, with the length head, if
/// there is one, and the loss curve beside it. With `eval` examples the best of the evaluated adapters is kept, else the last.
///
/// # Errors
/// See [`LoraTrainingError`]; the last checkpoint stays and `resume` goes on from it, exactly as if never stopped. An
/// adapter that is there already is not replaced: with `resume`, and the settings and data that it was trained with, it is
/// the outcome, else an error.
pub fn train(
    run: &TrainRun,
    config: &LoraTrainingConfig,
    examples: &[TrainExample],
    eval: &[TrainExample],
    progress: &mut dyn FnMut(TrainProgress),
) -> Result<TrainOutcome, LoraTrainingError> {
    check(config, examples)?;
    let _lock = lock_folder(&run.output)?;
    found::refuse_what_is_there(&run.output, run.resume)?;
    let _memory = run.model.network.training_memory();
    let data = Data::new(run, config, examples, eval)?;
    let fingerprint = fingerprint(run, config, &data);
    let saved = match found::look(run, &fingerprint)? {
        Found::Finished(state) => return finished(run, &state),
        Found::Checkpoint(saved) => Some(*saved),
        Found::Nothing => None,
    };
    let mut trainer = Trainer::begin(run, config, &data, (fingerprint, saved))?;
    loop {
        let (point, tokens) = match trainer.state.unevaluated.clone() {
            // Its tokens were counted by the run that did the step.
            Some(point) => (trainer.conclude(point, &data)?, 0),
            None if trainer.is_done() => return trainer.finish(&data),
            None => trainer.step(&data)?,
        };
        progress(TrainProgress {
            point,
            total_steps: trainer.rate.total_steps,
            tokens,
        });
        // After the last step it ends anyway.
        if (run.stop)() && !trainer.is_done() {
            return Err(trainer.stopped()?);
        }
    }
}

/// What an earlier run ended with.
fn finished(run: &TrainRun, state: &RunState) -> Result<TrainOutcome, LoraTrainingError> {
    let tuned = Tuned::load(&run.output, &run.model.network)?;
    Ok(outcome(tuned, state, true))
}

fn outcome(tuned: Tuned, state: &RunState, was_finished: bool) -> TrainOutcome {
    TrainOutcome {
        adapter: tuned.adapter,
        head: tuned.head,
        steps: state.step,
        best_step: state.best.map_or(state.step, |(_, step)| step),
        eval_loss: state.best.map(|(loss, _)| loss),
        was_finished,
    }
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

/// A run in progress.
struct Trainer<'a> {
    run: &'a TrainRun<'a>,
    config: &'a LoraTrainingConfig,
    llama: &'a Llama,
    tuned: Tuned,
    adamw: AdamW,
    rate: LearningRate,
    state: RunState,
    curve: Curve,
}

impl<'a> Trainer<'a> {
    /// Begins at the first step, or behind the checkpoint that was found.
    fn begin(
        run: &'a TrainRun,
        config: &'a LoraTrainingConfig,
        data: &Data,
        (fingerprint, saved): (String, Option<Checkpoint>),
    ) -> Result<Self, LoraTrainingError> {
        let llama = run.model.network.as_ref();
        let planned = config.epochs.saturating_mul(data.order.steps_per_epoch());
        let total_steps = config.max_steps.map_or(planned, |max| max.min(planned));
        let warmup_steps = (config.warmup_ratio * total_steps as f64).ceil() as usize;
        let rate = LearningRate {
            peak: config.learning_rate,
            warmup_steps,
            total_steps,
            schedule: config.schedule,
        };
        let tuned = match &saved {
            Some(saved) => saved.tuned.clone(),
            None => Tuned::init(llama, config, &data.train)?,
        };
        let adamw_config = AdamWConfig {
            weight_decay: config.weight_decay,
            ..AdamWConfig::default()
        };
        let mut adamw = AdamW::new(tuned.tensors(), adamw_config)?;
        saved.as_ref().map_or(Ok(()), |saved| saved.restore(&mut adamw))?;
        let state = saved.map_or(
            RunState {
                step: 0,
                best: None,
                unevaluated: None,
                fingerprint,
            },
            |saved| saved.state,
        );
        let in_curve = state.step.saturating_sub(usize::from(state.unevaluated.is_some()));
        let curve = Curve::open(&run.output, in_curve)?;
        Ok(Self {
            run,
            config,
            llama,
            tuned,
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
        let point = CurvePoint {
            step: self.state.step,
            epoch: self.state.step as f64 / data.order.steps_per_epoch() as f64,
            loss,
            learning_rate,
            grad_norm,
            eval_loss: None,
        };
        Ok((self.conclude(point, data)?, tokens))
    }

    /// The evaluation, the curve's line and the checkpoint that fall due after a step.
    fn conclude(&mut self, mut point: CurvePoint, data: &Data) -> Result<CurvePoint, LoraTrainingError> {
        if !data.eval.is_empty() && (self.is_done() || point.step.is_multiple_of(self.config.eval_steps)) {
            // For the checkpoint, where the evaluation is broken off.
            self.state.unevaluated = Some(point.clone());
            point.eval_loss = Some(self.evaluate(&data.eval)?);
            self.state.unevaluated = None;
        }
        self.curve.push(&point)?;
        if self.is_done() || point.step.is_multiple_of(self.config.save_steps) {
            self.save()?;
        }
        Ok(point)
    }

    fn is_done(&self) -> bool {
        self.state.step == self.rate.total_steps
    }

    fn save(&self) -> Result<(), LoraTrainingError> {
        let (output, name) = (&self.run.output, &self.run.model.name);
        checkpoint::save(output, name, &self.tuned, &self.adamw, &self.state)
    }

    /// The run is to end: keeps a checkpoint of what it is at. Returns what is said of it.
    fn stopped(&self) -> Result<LoraTrainingError, LoraTrainingError> {
        let (step, total) = (self.state.step, self.rate.total_steps);
        let is_saved = self.is_done() || step.is_multiple_of(self.config.save_steps);
        if self.state.unevaluated.is_some() || !is_saved {
            self.save()?;
        }
        let path = checkpoint::newest(&self.run.output).unwrap_or_else(|| self.run.output.clone());
        Ok(LoraTrainingError::Stopped { step, total, path })
    }

    fn gradients(&self, data: &Data, step: usize) -> Result<(f64, Gradients, usize), LoraTrainingError> {
        let passes = data.order.step(step);
        let shards = passes.iter().map(|pass| self.shards(&data.train, pass));
        let shards = shards.collect::<Result<Vec<Vec<Batch>>, _>>()?;
        let targets: usize = shards.iter().flatten().map(Batch::targets).sum();
        let parameters = self.tuned.tensors();
        let (mut loss, mut grads) = (0.0, Gradients::default());
        for (pass, shards) in shards.iter().enumerate() {
            let seed = fixed_hash(&(self.config.seed, step, pass));
            let objective = Objective {
                llama: self.llama,
                adapter: Some(&self.tuned.adapter),
                parameters: &parameters,
                dropout: Some((self.config.lora.lora_dropout, seed)),
                checkpointing: self.config.gradient_checkpointing,
            };
            loss += objective.gradients(shards, targets as f64, &mut grads)?;
        }
        Ok((loss, grads, shards.iter().flatten().map(Batch::tokens).sum()))
    }

    /// A forward pass in parts that run side by side on the CPU; on another device it stays whole.
    fn shards<'b>(&'b self, examples: &'b [Encoded], pass: &[usize]) -> Result<Vec<Batch<'b>>, ModelError> {
        let shards = if self.llama.device().is_cpu() { SHARDS } else { 1 };
        let parts = pass.chunks(pass.len().div_ceil(shards));
        parts
            .map(|part| Batch::new(part.iter().map(|&i| &examples[i]), self.tuned.head.as_ref()))
            .collect()
    }

    /// Mean loss over the evaluation data. What is trained is kept where it is the best so far.
    ///
    /// # Errors
    /// The run is to end, which is asked before every batch.
    fn evaluate(&mut self, eval: &[Encoded]) -> Result<f64, LoraTrainingError> {
        let frozen = self.tuned.frozen()?;
        let (mut sum, mut targets) = (0.0, 0);
        for batch in eval.chunks(self.config.batch_size) {
            if (self.run.stop)() {
                return Err(self.stopped()?);
            }
            let batch = Batch::new(batch.iter(), frozen.head.as_ref())?;
            let pass = TrainPass::new(self.llama, Some(&frozen.adapter), None, false);
            let loss = batch.loss(&pass, 1.0)?;
            sum += f64::from(loss.to_scalar::<f32>()?);
            targets += batch.targets();
        }
        let loss = sum / targets as f64;
        if self.state.best.is_none_or(|(best, _)| loss < best) {
            self.state.best = Some((loss, self.state.step));
            frozen.save(&self.run.output.join("best"), &self.run.model.name)?;
        }
        Ok(loss)
    }

    fn finish(self, data: &Data) -> Result<TrainOutcome, LoraTrainingError> {
        let (output, name) = (&self.run.output, &self.run.model.name);
        let held_out = if data.eval.is_empty() {
            &data.calibration
        } else {
            &data.eval
        };
        let calibrated = |mut tuned: Tuned| match calibrate(&mut tuned, self.llama, held_out, self.run.stop)? {
            Calibration::Done => Ok(tuned),
            Calibration::Stopped => Err(self.stopped()?),
        };
        let last = calibrated(self.tuned.frozen()?)?;
        let kept = match self.state.best {
            Some(_) => calibrated(Tuned::load(&output.join("best"), self.llama)?)?,
            None => last.clone(),
        };
        kept.save(output, name)?;
        last.save(&output.join("last"), name)?;
        // Before the checkpoint goes: without either a finished run could not be told from others.
        checkpoint::record(output, &self.state)?;
        checkpoint::clear(output)?;
        Ok(outcome(kept, &self.state, false))
    }
}
