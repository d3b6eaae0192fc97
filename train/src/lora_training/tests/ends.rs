//! Runs that have ended, are ended, or are not to begin.

use std::cell::Cell;
use std::path::Path;

use super::*;
use crate::lora_training::{TrainOutcome, checkpoint};

fn tiny(dtype: DTypeChoice) -> anyhow::Result<LoadedModel> {
    Ok(LoadedModel::open(TINY, dtype, &Device::Cpu, &mut ())?)
}

/// Four steps.
fn short() -> LoraTrainingConfig {
    LoraTrainingConfig {
        batch_size: 2,
        epochs: 1,
        ..config()
    }
}

fn train_to(
    output: &Path,
    resume: bool,
    config: &LoraTrainingConfig,
    model: &LoadedModel,
) -> Result<TrainOutcome, LoraTrainingError> {
    let run = TrainRun {
        resume,
        ..TrainRun::new(model, output.to_owned())
    };
    train(&run, config, &examples(Split::Train, 8), &[], &mut |_| ())
}

fn refused(result: Result<TrainOutcome, LoraTrainingError>) -> String {
    result.err().expect("refused").to_string()
}

#[test]
fn a_finished_adapter_is_neither_trained_again_nor_replaced() -> anyhow::Result<()> {
    let model = tiny(DTypeChoice::Auto)?;
    let dir = tempfile::tempdir()?;
    train_to(dir.path(), false, &short(), &model)?;
    let files = ["adapter_model.safetensors", "length_head.safetensors", "loss.jsonl"];
    let bytes = || files.map(|name| std::fs::read(dir.path().join(name)).expect("there"));
    let before = bytes();
    let err = refused(train_to(dir.path(), false, &short(), &model));
    assert!(
        err.contains("holds an adapter already: choose another --output"),
        "{err}"
    );
    let again = train_to(dir.path(), true, &short(), &model)?;
    assert!(again.was_finished && again.head.is_some());
    assert_eq!((again.steps, again.best_step), (4, 4));
    let err = refused(train_to(
        dir.path(),
        true,
        &LoraTrainingConfig { seed: 3, ..short() },
        &model,
    ));
    assert!(err.contains("(seed 0, now 3)"), "{err}");
    let err = refused(train_to(
        dir.path(),
        true,
        &LoraTrainingConfig {
            learning_rate: 0.25,
            ..short()
        },
        &model,
    ));
    assert!(err.contains("learning_rate 0.005, now 0.25"), "{err}");
    // An adapter of another program may be anything.
    std::fs::remove_file(dir.path().join("training.json"))?;
    let err = refused(train_to(dir.path(), true, &short(), &model));
    assert!(err.contains("holds an adapter already"), "{err}");
    assert!(before == bytes(), "something was written");
    Ok(())
}

#[test]
fn a_run_that_is_stopped_keeps_its_last_step_and_says_what_it_was_begun_with() -> anyhow::Result<()> {
    let model = tiny(DTypeChoice::Auto)?;
    let dir = tempfile::tempdir()?;
    let (whole, stopped) = (dir.path().join("whole"), dir.path().join("stopped"));
    train_to(&whole, false, &short(), &model)?;
    let steps = Cell::new(0);
    let run = TrainRun {
        model: &model,
        output: stopped.clone(),
        resume: false,
        stop: &|| steps.get() == 3,
    };
    let result = train(&run, &short(), &examples(Split::Train, 8), &[], &mut |p| {
        steps.set(p.point.step)
    });
    let err = refused(result);
    assert!(
        err.starts_with("stopped after step 3 of 4, which ") && err.contains("--resume"),
        "{err}"
    );
    // A dtype changes every number.
    let err = refused(train_to(&stopped, true, &short(), &tiny(DTypeChoice::Bf16)?));
    assert!(err.contains("(dtype \"f32\", now \"bf16\")"), "{err}");
    // The curve is not what a run goes on from.
    std::fs::remove_file(stopped.join("loss.jsonl"))?;
    assert!(!train_to(&stopped, true, &short(), &model)?.was_finished);
    for file in ["adapter_model.safetensors", "length_head.safetensors"] {
        let [a, b] = [&whole, &stopped].map(|run| std::fs::read(run.join(file)));
        assert!(a? == b?, "{file}");
    }
    Ok(())
}

#[test]
fn an_evaluation_is_broken_off_between_batches_and_done_again() -> anyhow::Result<()> {
    let model = tiny(DTypeChoice::Auto)?;
    let dir = tempfile::tempdir()?;
    let config = LoraTrainingConfig {
        eval_steps: 2,
        save_steps: 2,
        ..short()
    };
    let (data, eval) = (examples(Split::Train, 8), examples(Split::HeldOut, 6));
    let train_until = |output: &Path, resume, stop: &dyn Fn() -> bool| {
        let run = TrainRun {
            model: &model,
            output: output.to_owned(),
            resume,
            stop,
        };
        train(&run, &config, &data, &eval, &mut |_| ())
    };
    let whole = dir.path().join("whole");
    let undisturbed = train_until(&whole, false, &|| false)?;
    // It is asked after steps 1 to 4, of which the last ends it anyway, before the three batches of the evaluations after
    // 2 and 4, and before both heads are calibrated.
    let (mut stops, mut in_evaluation) = (0, 0);
    for place in 0..12 {
        let (output, asked) = (dir.path().join(place.to_string()), Cell::new(0));
        let stop = || asked.replace(asked.get() + 1) == place;
        if let Err(err) = train_until(&output, false, &stop) {
            assert!(err.to_string().starts_with("stopped after step "), "{err}");
            let state = checkpoint::newest(&output).expect("it is kept").join("state.json");
            in_evaluation += usize::from(std::fs::read_to_string(state)?.contains("unevaluated"));
            stops += 1;
        }
        if place == 2 {
            // Once more before the first batch of the same evaluation.
            train_until(&output, true, &|| true).err().expect("it is to end");
        }
        let outcome = train_until(&output, true, &|| false)?;
        assert_eq!(
            (outcome.best_step, outcome.eval_loss),
            (undisturbed.best_step, undisturbed.eval_loss)
        );
        for file in [
            "adapter_model.safetensors",
            "length_head.json",
            "length_head.safetensors",
            "loss.jsonl",
            "training.json",
        ] {
            let [a, b] = [&whole, &output].map(|run| std::fs::read(run.join(file)));
            assert!(a? == b?, "{file}, stopped at {place}");
        }
    }
    assert_eq!((stops, in_evaluation), (11, 6));
    Ok(())
}

#[test]
fn two_runs_do_not_write_one_folder() -> anyhow::Result<()> {
    let model = tiny(DTypeChoice::Auto)?;
    let dir = tempfile::tempdir()?;
    let run = TrainRun::new(&model, dir.path().to_owned());
    let mut second = Vec::new();
    train(&run, &short(), &examples(Split::Train, 8), &[], &mut |_| {
        second.push(refused(train_to(dir.path(), false, &short(), &model)));
    })?;
    assert_eq!(second.len(), 4);
    assert!(second[0].ends_with("another process is writing it"), "{}", second[0]);
    Ok(())
}

#[test]
fn a_head_that_was_left_behind_is_not_taken_for_this_adapters() -> anyhow::Result<()> {
    let model = tiny(DTypeChoice::Auto)?;
    let dir = tempfile::tempdir()?;
    train_to(dir.path(), false, &short(), &model)?;
    // Somebody removes the adapter, and not what its run kept besides.
    for name in ["adapter_config.json", "length_head.json", "length_head.safetensors"] {
        std::fs::remove_file(dir.path().join(name))?;
    }
    let number = TrainExample {
        id: "x".into(),
        prompt: Prompt::Instruction("x".to_owned()),
        target: TrainTarget::Answer("5".to_owned()),
    };
    let run = TrainRun::new(&model, dir.path().to_owned());
    let config = LoraTrainingConfig {
        objective: TrainObjective::Number,
        ..short()
    };
    train(&run, &config, &[number], &[], &mut |_| ())?;
    assert!(!LengthHead::is_in(&dir.path().join("last")));
    Ok(())
}
