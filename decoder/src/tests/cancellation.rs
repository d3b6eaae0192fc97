//! A request that is taken back: while it waits, while it runs, after it was preempted.

use super::*;
use crate::{Cancellation, run_continuous};

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
    let stats = run_continuous(engine, predicted, &config, &cancellation, &mut sink)?;
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
            assert_eq!(answers.len(), 24, "every request is handed back");
            for (id, (tokens, finish)) in &answers {
                let (whole, ended) = &want[id];
                match finish {
                    FinishReason::Cancelled => assert!(cancelled.contains(&id.as_str()) && whole.starts_with(tokens)),
                    _ => assert_eq!((tokens, finish), (whole, ended), "{id}"),
                }
            }
            assert!(answers.values().any(|(_, finish)| *finish == FinishReason::Cancelled));
        }
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
