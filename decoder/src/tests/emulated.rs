//! The GPU path's passes, launched ahead of their tokens, on the emulator of its kernels.

use super::probes::{HeadProber, probed_by, run_probed};
use super::*;
use crate::{Cancellation, run_controlled};

fn emulated(model: &Arc<Llama>, cache_tokens: usize) -> anyhow::Result<Engine> {
    let config = EngineConfig {
        kv_budget: KvBudget::Tokens(cache_tokens),
        max_prefill_tokens: 32,
        ..EngineConfig::default()
    };
    let cache = lengthwise_model::KvCache::emulated(model, cache_tokens)?;
    let eos = model.config().eos_token_ids.clone();
    Ok(Engine::with_cache(model.clone(), None, eos, config, cache)?)
}

/// Few and short: the emulator is slow. One answer's length is recorded, the others end at a token or at the cap.
fn short_requests(temperature: f32) -> Vec<SequenceRequest> {
    let mut requests = requests(8, temperature);
    requests.iter_mut().for_each(|r| r.max_new_tokens = 14);
    requests[2].replay_tokens = Some(9);
    requests
}

#[test]
fn answers_are_those_of_the_cpu_also_where_sequences_are_preempted() -> anyhow::Result<()> {
    let model = model()?;
    for temperature in [0.0, 1.2] {
        let requests = short_requests(temperature);
        let want = alone(&mut engine(&model, 4096)?, &requests)?;
        // Room for all, and for two at most.
        for cache_tokens in [4096, 64] {
            let mut engine = emulated(&model, cache_tokens)?;
            // Batches that wait for their longest, and such that stop at what was predicted and go on later.
            let stopping = config(Strategy::SeqSch).with(true, true);
            for config in [config(Strategy::Continuous), config(Strategy::SeqSch), stopping] {
                let (got, _) = run(&mut engine, &requests, |_| 2, &config)?;
                assert_eq!(got, want, "{config:?}, {cache_tokens} tokens of cache");
                assert_eq!(engine.cache.free_tokens(), engine.cache_tokens(), "blocks were lost");
            }
        }
    }
    Ok(())
}

#[test]
fn an_end_is_seen_one_pass_late_and_a_known_one_costs_no_pass() -> anyhow::Result<()> {
    let model = model()?;
    for strategy in [Strategy::Continuous, Strategy::Vanilla] {
        let requests = &short_requests(0.0)[2..3];
        let (_, stats) = run(&mut emulated(&model, 256)?, requests, |_| 9, &config(strategy))?;
        assert_eq!((stats.steps, stats.useful_tokens), (9, 9), "its length is recorded");
        let mut requests = short_requests(0.0);
        requests.remove(2);
        for request in &requests {
            let one = std::slice::from_ref(request);
            let (answers, stats) = run(&mut emulated(&model, 256)?, one, |_| 9, &config(strategy))?;
            let (tokens, finish) = &answers[&request.id];
            let late = u64::from(*finish == FinishReason::Stop && tokens.len() < 14);
            // The first token comes with the prompt, which is one pass of at most 32 tokens.
            assert_eq!(stats.steps, tokens.len() as u64 + late, "{strategy}, {}", request.id);
        }
    }
    Ok(())
}

#[test]
fn a_cancelled_one_leaves_the_others_what_they_get_alone() -> anyhow::Result<()> {
    let model = model()?;
    let requests = short_requests(1.2);
    let want = alone(&mut engine(&model, 4096)?, &requests)?;
    for config in [
        config(Strategy::Continuous),
        config(Strategy::Vanilla),
        config(Strategy::SeqSch).with(false, true),
    ] {
        cancel_most(&mut emulated(&model, 4096)?, &config, &requests, &want)?;
    }
    Ok(())
}

/// Cancels the first five at the first answer.
fn cancel_most(
    engine: &mut Engine,
    config: &ScheduleConfig,
    requests: &[SequenceRequest],
    want: &Answers,
) -> anyhow::Result<()> {
    let cancellation = Cancellation::new();
    let predicted = |request: &SequenceRequest| PredictedRequest {
        request: request.clone(),
        predicted: 5,
    };
    let mut answers = Answers::new();
    let mut sink = |SequenceOutput { id, tokens, finish }| {
        if answers.is_empty() {
            requests.iter().take(5).for_each(|r| cancellation.cancel(r.id.clone()));
        }
        answers.insert(id, (tokens, finish));
        Ok(())
    };
    let predicted = requests.iter().map(predicted).collect();
    run_controlled(engine, predicted, config, &cancellation, &mut sink)?;
    assert_eq!(engine.cache.free_tokens(), engine.cache_tokens(), "blocks were lost");
    let cancelled = requests.iter().take(5).map(|r| r.id.as_str());
    assert!(check_answers(&answers, want, cancelled) > 0, "{config:?}");
    Ok(())
}

#[test]
fn probes_tell_what_the_predictor_tells_a_pass_late_and_change_no_answer() -> anyhow::Result<()> {
    let model = model()?;
    let requests = short_requests(0.0);
    let want = alone(&mut engine(&model, 4096)?, &requests)?;
    // Room for all, and for two at most; an adapter that begins with the question has each request wait for its probe.
    for (cache_tokens, activated, at_least) in [(4096, false, 8), (64, false, 4), (4096, true, 8), (64, true, 8)] {
        let prober = match activated {
            true => HeadProber::activated(&model, &requests)?,
            false => HeadProber::new(&model, &requests)?,
        };
        let (got, _) = run_probed(&mut emulated(&model, cache_tokens)?, &requests, 14, probed_by(&prober))?;
        assert_eq!(got, want, "{cache_tokens} tokens of cache");
        prober.check(&model, at_least)?;
    }
    Ok(())
}
