//! A small run with a head on the bundled model.

mod ends;

use candle_core::Device;
use lengthwise_core::{LengthEstimate, Prompt};
use lengthwise_model::{DTypeChoice, LengthHead, LoadedModel, TINY};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::{
    HeadObjective, LoraTrainingConfig, LoraTrainingError, TrainExample, TrainObjective, TrainRun, TrainTarget, train,
};
use crate::coverage_90;
use crate::language::{Question, Split, instructions};

/// Instructions with the lengths of four right answers, in words: one length where only one answer is right.
fn examples(split: Split, n: usize) -> Vec<TrainExample> {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut example = |question: Question| {
        let mut words = || question.answer(&mut rng).split_whitespace().count() as u32;
        TrainExample {
            id: question.instruction.as_str().into(),
            target: TrainTarget::Lengths((0..4).map(|_| words()).collect()),
            prompt: Prompt::Instruction(question.instruction.clone()),
        }
    };
    instructions(split, 5, n).into_iter().map(&mut example).collect()
}

fn config() -> LoraTrainingConfig {
    LoraTrainingConfig {
        objective: TrainObjective::Head(HeadObjective::default()),
        learning_rate: 5e-3,
        epochs: 5,
        ..LoraTrainingConfig::default()
    }
}

fn lengths(example: &TrainExample) -> Vec<u32> {
    match &example.target {
        TrainTarget::Lengths(lengths) => lengths.clone(),
        TrainTarget::Answer(_) => Vec::new(),
    }
}

#[test]
fn a_head_beats_the_marginal_on_instructions_it_has_not_seen() -> anyhow::Result<()> {
    let model = LoadedModel::open(TINY, DTypeChoice::Auto, &Device::Cpu, &mut ())?;
    let dir = tempfile::tempdir()?;
    let run = TrainRun::new(&model, dir.path().to_owned());
    let outcome = train(&run, &config(), &examples(Split::Train, 400), &[], &mut |_| ())?;
    let head = LengthHead::load(dir.path(), model.network.config().hidden_size, &Device::Cpu)?;
    assert_eq!(head.config, outcome.head.expect("it was the objective").config);
    assert_eq!(head.config.samples, 4);

    let test = examples(Split::HeldOut, 100);
    let tokens: Vec<Vec<u32>> = test
        .iter()
        .map(|e| model.template.encode(&model.tokenizer, &e.prompt))
        .collect::<Result<_, _>>()?;
    let prompts: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
    let logits = head.predict(&model.network, Some(&outcome.adapter), &prompts, 2048)?;
    let estimates: Vec<LengthEstimate> = head
        .distributions(&logits)?
        .iter()
        .map(|f| f.estimate(head.config.point_probability))
        .collect();
    let samples: Vec<Vec<u32>> = test.iter().map(lengths).collect();
    let largest: Vec<u32> = samples.iter().map(|l| l.iter().copied().max().unwrap_or(0)).collect();
    let error = |predicted: &dyn Fn(usize) -> u32| -> u32 {
        (0..largest.len()).map(|i| predicted(i).abs_diff(largest[i])).sum()
    };
    let of_head = error(&|i| estimates[i].max_tokens);
    let mut sorted = largest.clone();
    sorted.sort_unstable();
    let of_median = error(&|_| sorted[sorted.len() / 2]);
    assert!(
        of_head * 2 < of_median,
        "head {of_head}, the median of the truth {of_median}"
    );
    let coverage = coverage_90(&estimates, &samples).expect("it has quantiles");
    assert!((0.8..=1.0).contains(&coverage), "{coverage}");
    Ok(())
}

#[test]
fn an_example_without_lengths_is_named() -> anyhow::Result<()> {
    let model = LoadedModel::open(TINY, DTypeChoice::Auto, &Device::Cpu, &mut ())?;
    let dir = tempfile::tempdir()?;
    let run = TrainRun::new(&model, dir.path().to_owned());
    let mut data = examples(Split::Train, 2);
    data[1].target = TrainTarget::Lengths(Vec::new());
    let err = train(&run, &config(), &data, &[], &mut |_| ())
        .err()
        .expect("no lengths");
    assert!(
        matches!(&err, LoraTrainingError::NoLengths { id, set: "training" } if *id == data[1].id),
        "{err}"
    );
    Ok(())
}

/// A killed run on the GPU path's kernels goes on as if it had not been: no sum depends on chance.
#[cfg(feature = "kernel-emulation")]
#[test]
fn emulated_runs_end_in_the_same_bits_resumed_or_not() -> anyhow::Result<()> {
    let mut model = LoadedModel::open(TINY, DTypeChoice::Auto, &Device::Cpu, &mut ())?;
    model.network = std::sync::Arc::new((*model.network).clone().trained_on_emulator()?);
    let data = examples(Split::Train, 6);
    let dir = tempfile::tempdir()?;
    let mut losses = [Vec::new(), Vec::new()];
    for (which, losses) in ["whole", "killed"].into_iter().zip(&mut losses) {
        let config = LoraTrainingConfig {
            batch_size: 2,
            epochs: 1,
            save_steps: 1,
            gradient_checkpointing: true,
            ..config()
        };
        let mut run = TrainRun::new(&model, dir.path().join(which));
        if which == "killed" {
            let killed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                train(&run, &config, &data, &[], &mut |progress| {
                    assert!(progress.point.step < 2, "killed");
                })
            }));
            assert!(killed.is_err());
            run.resume = true;
        }
        train(&run, &config, &data, &[], &mut |progress| {
            losses.push((
                progress.point.step,
                progress.point.loss.to_bits(),
                progress.point.grad_norm.to_bits(),
            ));
        })?;
    }
    let [whole, killed] = losses;
    assert_eq!(whole.len(), 3);
    assert_eq!(killed, whole[2..], "the step that was killed was saved");
    for file in ["adapter_model.safetensors", "length_head.safetensors"] {
        let bytes = |which: &str| std::fs::read(dir.path().join(which).join(file));
        assert_eq!(bytes("whole")?, bytes("killed")?, "{file}");
    }
    Ok(())
}
