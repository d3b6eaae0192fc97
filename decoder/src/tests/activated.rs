//! Adapters that begin within a sequence, at their invocation tokens.

use lengthwise_model::{Adapter, KvCache, LoraConfig};

use super::probes::{HeadProber, adapter_of, probed_by, run_probed};
use super::*;
use crate::probes::Probes;

/// What a request gets greedily of whole passes over all its tokens, without a cache.
fn greedy(model: &Llama, adapter: &Adapter, request: &SequenceRequest) -> anyhow::Result<Vec<u32>> {
    let mut tokens = request.prompt.clone();
    while tokens.len() < request.prompt.len() + request.max_new_tokens as usize {
        let last = [tokens.len() as u32 - 1];
        let logits = model.forward_train(&[&tokens], &last, Some(adapter), None)?;
        let next = logits.argmax(1)?.to_vec1::<u32>()?[0];
        tokens.push(next);
        if model.config().eos_token_ids.contains(&next) {
            break;
        }
    }
    Ok(tokens.split_off(request.prompt.len()))
}

#[test]
fn an_engines_adapter_begins_in_each_prompt_where_its_invocation_tokens_stand() -> anyhow::Result<()> {
    let model = model()?;
    let mut requests = requests(12, 0.0);
    for (i, request) in requests.iter_mut().enumerate() {
        request.max_new_tokens = 12;
        // Some without, and some in chunks, of which a later one has the place.
        match i % 3 {
            0 => request.prompt.extend([38, 39, 7]),
            1 => request.prompt = [&vec![9; 40][..], &[38, 39]].concat(),
            _ => {}
        }
    }
    // No answer says them.
    let config = LoraConfig {
        invocation_tokens: vec![38, 39],
        ..LoraConfig::default()
    };
    let adapter = Arc::new(adapter_of(&model, config)?);
    let mut want = Answers::new();
    let mut changed = 0;
    let plain = alone(&mut engine(&model, 4096)?, &requests)?;
    for request in &requests {
        let tokens = greedy(&model, &adapter, request)?;
        let ends = model
            .config()
            .eos_token_ids
            .contains(tokens.last().expect("an answer has a token"));
        let finish = if ends { FinishReason::Stop } else { FinishReason::Length };
        changed += usize::from(tokens != plain[&request.id].0);
        want.insert(request.id.clone(), (tokens, finish));
    }
    assert!((4..=8).contains(&changed), "{changed} of 12 answers are changed");
    let engine_config = EngineConfig {
        kv_budget: KvBudget::Tokens(256),
        max_prefill_tokens: 32,
        ..EngineConfig::default()
    };
    let eos = model.config().eos_token_ids.clone();
    let mut engine = Engine::new(model, Some(adapter), eos, engine_config)?;
    for strategy in Strategy::ALL {
        let (got, _) = run(&mut engine, &requests, |_| 9, &super::config(strategy))?;
        assert_eq!(got, want, "{strategy}");
    }
    Ok(())
}

#[test]
fn an_adapter_that_begins_with_the_question_shares_the_requests_own_prefill() -> anyhow::Result<()> {
    let model = model()?;
    for temperature in [0.0, 1.2] {
        let requests = requests(24, temperature);
        let want = alone(&mut engine(&model, 4096)?, &requests)?;
        for (cache, predicted) in [(4096, 1), (4096, 60), (96, 60), (96, 20), (96, 1)] {
            let prober = HeadProber::activated(&model, &requests)?;
            let (got, stats) = run_probed(&mut engine(&model, cache)?, &requests, predicted, probed_by(&prober))?;
            assert_eq!(got, want, "{cache} tokens of cache, temperature {temperature}");
            // Each waits for its probe, so that all are told; of what the probes took the questions alone come on top, and
            // the last token of each prompt, behind which the request's first token is drawn as well.
            prober.check(&model, 24)?;
            let questions = 24 * 5;
            match cache {
                4096 => assert_eq!(stats.probe_tokens, questions),
                _ => assert!(stats.probe_tokens >= questions, "{} tokens", stats.probe_tokens),
            }
        }
    }
    Ok(())
}

#[test]
fn a_request_goes_on_with_what_its_probe_has_left_unless_that_gave_way() -> anyhow::Result<()> {
    let model = model()?;
    let mut requests = requests(3, 0.0);
    requests.iter_mut().for_each(|request| request.prompt = vec![5; 20]);
    let prober = HeadProber::activated(&model, &requests)?;
    let mut cache = KvCache::new(&model, 96)?;
    let mut probes = Probes::new(Some(&prober));
    for (number, request) in requests.iter().enumerate() {
        probes.open(number as u32, &request.id, Some(&request.prompt), 96);
    }
    assert!(probes.holds(0) && probes.holds(2));
    // 24 tokens each, two blocks; 19 of them, two blocks, are kept.
    probes.reserve(&mut cache, 48);
    assert_eq!(probes.advance(&mut cache), (48, vec![0, 1]));
    assert_eq!(cache.free_tokens(), 32);
    assert!(probes.landed(0) && probes.landed(1) && !probes.holds(1));
    probes.reserve(&mut cache, 48);
    assert_eq!(probes.advance(&mut cache), (24, vec![2]));
    assert_eq!(cache.free_tokens(), 0);
    // The last first; what is left is the request's.
    assert!(probes.give_way(&mut cache) && cache.free_tokens() == 32);
    let (table, tokens) = probes.admitted(0).expect("its probe has been through");
    assert_eq!((table.capacity(), tokens), (32, 19));
    cache.release(table);
    assert!(probes.admitted(2).is_none());
    probes.drop(1, &mut cache);
    assert_eq!(cache.free_tokens(), 96);
    // A probe that has no room takes it from those behind it, and from none before it.
    let mut probes = Probes::new(Some(&prober));
    probes.open(1, &requests[1].id, Some(&requests[1].prompt), 96);
    probes.reserve(&mut cache, 48);
    assert_eq!(probes.advance(&mut cache), (24, vec![1]));
    let mut held = lengthwise_model::BlockTable::default();
    assert!(cache.reserve(&mut held, 64));
    probes.open(2, &requests[2].id, Some(&requests[2].prompt), 96);
    probes.reserve(&mut cache, 48);
    assert_eq!(probes.advance(&mut cache), (0, vec![]));
    probes.drop(2, &mut cache);
    probes.open(0, &requests[0].id, Some(&requests[0].prompt), 96);
    probes.reserve(&mut cache, 48);
    assert_eq!(probes.advance(&mut cache), (24, vec![0]));
    assert!(probes.admitted(1).is_none());
    Ok(())
}
