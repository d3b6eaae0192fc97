//! A request that is taken back: while it waits, while it runs, after it was preempted.

use super::*;
use crate::{Cancellation, run_controlled};

/// Answers, those that were cancelled among them, and what the run counted.
struct Ran {
    answers: Answers,
    stats: StrategyStats,
}

/// Runs all requests and cancels `cancelled` when the first answer comes out, or before anything runs.
fn run_and_cancel(
    engine: &mut Engine,
    requests: &[SequenceRequest],
    slots: usize,
    cancelled: &[&str],
    at_first_answer: bool,
) -> anyhow::Result<Ran> {
    let predicted = |request: &SequenceRequest| PredictedRequest {
        request: request.clone(),
        predicted: 1,
    };
    let config = ScheduleConfig {
        batch_size: NonZeroUsize::new(slots).expect("not 0"),
        order: AdmissionOrder::FirstCome,
        ..config(Strategy::Continuous)
    };
    let cancellation = Cancellation::new();
    let cancel = |now: bool| {
        for id in cancelled.iter().filter(|_| now) {
            // From another thread, as a client that goes away does.
            let (from_elsewhere, id) = (cancellation.clone(), (*id).to_owned());
            std::thread::spawn(move || from_elsewhere.cancel(id))
                .join()
                .expect("it does not panic");
        }
    };
    cancel(!at_first_answer);
    let mut answers = Answers::new();
    let predicted = requests.iter().map(predicted).collect();
    let mut sink = |SequenceOutput { id, tokens, finish }| {
        cancel(at_first_answer && answers.is_empty());
        assert!(answers.insert(id, (tokens, finish)).is_none(), "answered twice");
        Ok(())
    };
    let stats = run_controlled(engine, predicted, &config, &cancellation, &mut sink)?;
    assert_eq!(engine.cache.free_tokens(), engine.cache_tokens(), "blocks were lost");
    Ok(Ran { answers, stats })
}

/// Requests of one prompt token each whose answers end at these lengths.
fn replayed(lengths: &[u32]) -> Vec<SequenceRequest> {
    let mut requests = requests(lengths.len(), 1.2);
    for (request, &length) in requests.iter_mut().zip(lengths) {
        request.prompt.truncate(1);
        request.replay_tokens = Some(length);
    }
    requests
}

#[test]
fn one_that_waits_is_handed_back_without_a_token() -> anyhow::Result<()> {
    let requests = replayed(&[5, 10, 10]);
    let mut engine = engine(&model()?, 4096)?;
    let Ran { answers, stats } = run_and_cancel(&mut engine, &requests, 1, &["r1", "no such request"], false)?;
    assert_eq!(answers[&"r1".into()], (Vec::new(), FinishReason::Cancelled));
    // One slot: 5 and 10 steps.
    assert_eq!((stats.requests, stats.steps, stats.slot_steps), (2, 15, 15));
    assert_eq!(stats.useful_tokens, 15);
    Ok(())
}

#[test]
fn a_cancelled_one_frees_its_slot_before_the_next_step() -> anyhow::Result<()> {
    // r0 ends after 5 steps; r1, in the other slot, is then cancelled with its 5 tokens. r2 and r3 take both slots in the
    // sixth step. Were r1's slot free a step later, the run would take a step more.
    let requests = replayed(&[5, 40, 10, 10]);
    let mut engine = engine(&model()?, 4096)?;
    let alone = alone(&mut engine, &requests)?;
    let Ran { answers, stats } = run_and_cancel(&mut engine, &requests, 2, &["r1"], true)?;
    let (tokens, finish) = &answers[&"r1".into()];
    assert_eq!(*finish, FinishReason::Cancelled);
    assert_eq!(*tokens, alone[&"r1".into()].0[..5]);
    assert_eq!((stats.requests, stats.steps, stats.slot_steps), (3, 15, 30));
    assert_eq!((stats.useful_tokens, stats.wasted_tokens()), (25, 5));
    Ok(())
}

#[test]
fn a_preempted_one_is_handed_back_with_the_tokens_it_has() -> anyhow::Result<()> {
    // Two blocks of 16 tokens: r0 and r1 are admitted with one each. At its 17th token r0 needs the second, and r1 goes
    // back to the queue behind r2, with 16 tokens. r2 finds no room until r0 ends, and then r1 is cancelled.
    let mut requests = replayed(&[20, 31, 5]);
    let (mut small, mut large) = (engine(&model()?, 32)?, engine(&model()?, 4096)?);
    for request in &mut requests {
        request.max_new_tokens = 31;
    }
    let alone = alone(&mut large, &requests)?;
    let Ran { answers, stats } = run_and_cancel(&mut small, &requests, 2, &["r1"], true)?;
    let (tokens, finish) = &answers[&"r1".into()];
    assert_eq!((tokens.len(), *finish), (16, FinishReason::Cancelled));
    assert_eq!(*tokens, alone[&"r1".into()].0[..16]);
    assert_eq!(answers[&"r0".into()], alone[&"r0".into()]);
    assert_eq!(answers[&"r2".into()], alone[&"r2".into()]);
    // 20 steps of r0 and 5 of r2, two slots each; nothing is computed a second time for r1.
    assert_eq!((stats.requests, stats.steps, stats.slot_steps), (2, 25, 50));
    Ok(())
}

#[test]
fn whoever_is_cancelled_the_others_answers_are_what_they_get_alone() -> anyhow::Result<()> {
    let model = model()?;
    let requests = requests(24, 1.2);
    let want = alone(&mut engine(&model, 4096)?, &requests)?;
    for cache in [4096, 96] {
        for cancelled in [["r1", "r2", "r17"], ["r0", "r3", "r23"], ["r5", "r6", "r7"]] {
            let mut engine = engine(&model, cache)?;
            let Ran { answers, .. } = run_and_cancel(&mut engine, &requests, 6, &cancelled, true)?;
            assert!(check_answers(&answers, &want, cancelled) > 0);
        }
    }
    Ok(())
}

/// Runs all requests, predicted to be `predicted` tokens long, with those of `script` cancelled before the given steps.
fn run_script(
    engine: &mut Engine,
    requests: &[SequenceRequest],
    predicted: &[u32],
    config: &ScheduleConfig,
    script: &[(u64, &str)],
) -> anyhow::Result<Ran> {
    let cancellation = Cancellation::new();
    script
        .iter()
        .for_each(|&(step, id)| cancellation.cancel_before(step, id));
    let with = |(request, &predicted): (&SequenceRequest, &u32)| PredictedRequest {
        request: request.clone(),
        predicted,
    };
    let mut answers = Answers::new();
    let mut sink = |SequenceOutput { id, tokens, finish }| {
        assert!(answers.insert(id, (tokens, finish)).is_none(), "answered twice");
        Ok(())
    };
    let requests = requests.iter().zip(predicted).map(with).collect();
    let stats = run_controlled(engine, requests, config, &cancellation, &mut sink)?;
    assert_eq!(engine.cache.free_tokens(), engine.cache_tokens(), "blocks were lost");
    Ok(Ran { answers, stats })
}

fn batches_of_two(strategy: Strategy, fcr: bool) -> ScheduleConfig {
    ScheduleConfig {
        batch_size: NonZeroUsize::new(2).expect("not 0"),
        ..config(strategy).with(false, fcr)
    }
}

#[test]
fn a_static_batch_goes_on_without_a_cancelled_row() -> anyhow::Result<()> {
    // r0 | r1 run until r1 is cancelled with 12 tokens: 2 × 12. r2 | r3: 2 × 10.
    let requests = replayed(&[5, 40, 10, 10]);
    let mut engine = engine(&model()?, 4096)?;
    let alone = alone(&mut engine, &requests)?;
    let config = batches_of_two(Strategy::Vanilla, false);
    let ran = run_script(&mut engine, &requests, &[60; 4], &config, &[(13, "r1")])?;
    let (tokens, finish) = &ran.answers[&"r1".into()];
    assert_eq!((tokens.len(), *finish), (12, FinishReason::Cancelled));
    assert_eq!(*tokens, alone[&"r1".into()].0[..12]);
    let stats = ran.stats;
    assert_eq!((stats.requests, stats.steps, stats.slot_steps), (3, 22, 44));
    assert_eq!((stats.useful_tokens, stats.wasted_tokens()), (25, 19));
    // The row that goes on is no longer padded for: r0 is cancelled with 3 tokens, then r1 has 37 steps alone.
    let ran = run_script(&mut engine, &requests, &[60; 4], &config, &[(4, "r0")])?;
    assert_eq!(ran.answers[&"r1".into()], alone[&"r1".into()]);
    assert_eq!((ran.stats.steps, ran.stats.slot_steps), (50, 3 + 40 + 20));
    Ok(())
}

#[test]
fn what_waits_for_its_batch_or_has_been_stopped_is_cancelled_too() -> anyhow::Result<()> {
    // Sorted and stopped at the predictions: r2 | r3 for 2 steps, r0 | r1 for 4; r0 and r3 fail and run to their ends.
    let requests = replayed(&[10, 3, 2, 9]);
    let mut engine = engine(&model()?, 4096)?;
    let alone = alone(&mut engine, &requests)?;
    let config = batches_of_two(Strategy::SeqSch, true);
    let whole = run_script(&mut engine, &requests, &[4, 4, 2, 2], &config, &[])?;
    assert_eq!(whole.answers, alone);
    assert_eq!(
        (whole.stats.failures, whole.stats.steps, whole.stats.slot_steps),
        (2, 13, 26)
    );
    // Each batch takes note before each step, and once more when there is none left: r3 is stopped before the 4th time.
    let ran = run_script(&mut engine, &requests, &[4, 4, 2, 2], &config, &[(1, "r1"), (4, "r3")])?;
    assert_eq!(ran.answers[&"r1".into()], (Vec::new(), FinishReason::Cancelled));
    let (tokens, finish) = &ran.answers[&"r3".into()];
    assert_eq!(*finish, FinishReason::Cancelled);
    assert_eq!(*tokens, alone[&"r3".into()].0[..2]);
    // 2 × 2, then r0 alone: 4 and 6.
    assert_eq!((ran.stats.requests, ran.stats.steps, ran.stats.slot_steps), (2, 12, 14));
    assert_eq!((ran.stats.useful_tokens, ran.stats.wasted_tokens()), (12, 2));
    Ok(())
}

#[test]
fn whoever_is_cancelled_under_whatever_strategy_the_others_answers_are_what_they_get_alone() -> anyhow::Result<()> {
    let model = model()?;
    let requests = requests(24, 1.2);
    let want = alone(&mut engine(&model, 4096)?, &requests)?;
    let predicted: Vec<u32> = (0..24).map(|i| i * 7 % 50).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for strategy in Strategy::ALL {
        for (fcr, cache) in [(false, 4096), (true, 4096), (true, 96)] {
            let names: Vec<String> = (0..8).map(|_| format!("r{}", rng.random_range(0..24))).collect();
            let script: Vec<_> = names
                .iter()
                .map(|name| (rng.random_range(1..60), name.as_str()))
                .collect();
            let config = config(strategy).with(fcr, fcr);
            let Ran { answers, stats } =
                run_script(&mut engine(&model, cache)?, &requests, &predicted, &config, &script)?;
            assert!(check_answers(&answers, &want, names.iter().map(String::as_str)) > 0);
            let ended = answers
                .values()
                .filter(|(_, finish)| *finish != FinishReason::Cancelled);
            let ended: u64 = ended.map(|(tokens, _)| tokens.len() as u64).sum();
            assert_eq!(stats.useful_tokens, ended, "{strategy}");
            let computed: u64 = answers.values().map(|(tokens, _)| tokens.len() as u64).sum();
            assert!(stats.slot_steps >= computed, "{strategy}");
        }
    }
    Ok(())
}

#[test]
fn all_can_be_cancelled_at_once() -> anyhow::Result<()> {
    let model = model()?;
    for strategy in Strategy::ALL {
        let requests = replayed(&[5, 40, 10, 10, 20, 30]);
        let cancellation = Cancellation::new();
        let mut answers = Answers::new();
        let mut sink = |SequenceOutput { id, tokens, finish }| {
            // Asked for twice by then, which makes no difference.
            cancellation.cancel_all();
            assert!(answers.insert(id, (tokens, finish)).is_none(), "answered twice");
            Ok(())
        };
        let predicted = requests.iter().map(|request| PredictedRequest {
            request: request.clone(),
            predicted: 60,
        });
        let mut engine = engine(&model, 4096)?;
        let config = batches_of_two(strategy, true);
        let stats = run_controlled(&mut engine, predicted.collect(), &config, &cancellation, &mut sink)?;
        assert_eq!(engine.cache.free_tokens(), engine.cache_tokens(), "blocks were lost");
        let ended = answers
            .values()
            .filter(|(_, finish)| *finish != FinishReason::Cancelled);
        // The first slot to end, or the first batch.
        assert_eq!(ended.count() as u64, stats.requests, "{strategy}");
        assert!(
            (1..=2).contains(&stats.requests) && answers.len() == 6,
            "{strategy}: {stats:?}"
        );
    }
    Ok(())
}

#[test]
fn a_hundred_thousand_requests_may_wait() -> anyhow::Result<()> {
    let request = |i: usize| PredictedRequest {
        request: SequenceRequest {
            id: i.to_string().into(),
            prompt: vec![5],
            max_new_tokens: 1,
            sampling: SamplingParams::GREEDY,
            replay_tokens: None,
        },
        predicted: 1,
    };
    let config = ScheduleConfig {
        batch_size: NonZeroUsize::new(200).expect("not 0"),
        ..config(Strategy::Continuous)
    };
    // The cache has room for 64, whatever the slots.
    let mut engine = engine(&model()?, 64 * 16)?;
    let mut answered = 0;
    let requests = (0..100_000).map(request).collect();
    let stats = run_strategy(&mut engine, requests, &config, &mut |_| {
        answered += 1;
        Ok(())
    })?;
    // 64 in every step, however many wait.
    assert_eq!((answered, stats.requests), (100_000, 100_000));
    assert_eq!(stats.steps, 100_000_u64.div_ceil(64));
    Ok(())
}
