//! What must hold of decoding whatever the strategy, on a small random model.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroUsize;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use lengthwise_core::{DecodeError, FinishReason, RequestId, SamplingParams};
use lengthwise_model::{DTypeChoice, LinearKind, Llama, ModelConfig, Weights};
use lengthwise_scheduler::{AdmissionOrder, CostModel, Planning, ScheduleConfig, Strategy, StrategyStats};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Engine, EngineConfig, KvBudget, PredictedRequest, SequenceOutput, SequenceRequest, run_strategy};

mod activated;
mod cancellation;
#[cfg(feature = "kernel-emulation")]
mod emulated;
mod probes;
mod timeline;

const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128, "tie_word_embeddings": true, "eos_token_id": [1, 2, 3]}"#;

/// Random weights; with three of forty tokens ending an answer, lengths vary.
fn model() -> anyhow::Result<Arc<Llama>> {
    let config = ModelConfig::from_json(CONFIG)?;
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let mut random = |shape: (usize, usize)| {
        let data: Vec<f32> = (0..shape.0 * shape.1).map(|_| rng.random_range(-0.4..0.4)).collect();
        Tensor::from_vec(data, shape, &Device::Cpu)
    };
    let mut tensors = HashMap::new();
    tensors.insert(
        "model.embed_tokens.weight".to_owned(),
        random((config.vocab_size, config.hidden_size))?,
    );
    for layer in 0..config.num_hidden_layers {
        for kind in LinearKind::ALL {
            tensors.insert(
                format!("model.layers.{layer}.{}.weight", kind.path()),
                random(kind.shape(&config))?,
            );
        }
    }
    let norms = (0..config.num_hidden_layers)
        .flat_map(|i| ["input", "post_attention"].map(|n| format!("model.layers.{i}.{n}_layernorm.weight")));
    for name in norms.chain(["model.norm.weight".to_owned()]) {
        tensors.insert(name, Tensor::ones(config.hidden_size, DType::F32, &Device::Cpu)?);
    }
    Ok(Arc::new(Llama::new(
        &config,
        &Weights::from_tensors(tensors, DType::F32, &Device::Cpu),
    )?))
}

fn engine(model: &Arc<Llama>, cache_tokens: usize) -> anyhow::Result<Engine> {
    let config = EngineConfig {
        kv_budget: KvBudget::Tokens(cache_tokens),
        max_prefill_tokens: 32,
        ..EngineConfig::default()
    };
    Ok(Engine::new(
        model.clone(),
        None,
        model.config().eos_token_ids.clone(),
        config,
    )?)
}

fn requests(n: usize, temperature: f32) -> Vec<SequenceRequest> {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let request = |i: usize| SequenceRequest {
        id: format!("r{i}").into(),
        prompt: (0..rng.random_range(1..20)).map(|_| rng.random_range(4..40)).collect(),
        max_new_tokens: 60,
        sampling: SamplingParams {
            temperature,
            seed: i as u64,
            ..SamplingParams::GREEDY
        },
        replay_tokens: None,
    };
    (0..n).map(request).collect()
}

type Answers = BTreeMap<RequestId, (Vec<u32>, FinishReason)>;

fn run(
    engine: &mut Engine,
    requests: &[SequenceRequest],
    predicted: impl Fn(usize) -> u32,
    config: &ScheduleConfig,
) -> anyhow::Result<(Answers, StrategyStats)> {
    let predicted_requests = requests
        .iter()
        .enumerate()
        .map(|(i, request)| PredictedRequest {
            request: request.clone(),
            predicted: predicted(i),
        })
        .collect();
    let mut answers = Answers::new();
    let stats = run_strategy(
        engine,
        predicted_requests,
        config,
        &mut |SequenceOutput { id, tokens, finish }| {
            assert!(answers.insert(id, (tokens, finish)).is_none(), "answered twice");
            Ok(())
        },
    )?;
    assert_eq!(answers.len(), requests.len());
    assert_eq!(
        engine.cache.free_tokens(),
        engine.cache_tokens(),
        "a run gives all of its cache back"
    );
    Ok((answers, stats))
}

fn config(strategy: Strategy) -> ScheduleConfig {
    ScheduleConfig {
        batch_size: NonZeroUsize::new(4).expect("not 0"),
        group_size: NonZeroUsize::new(16).expect("not 0"),
        max_new_tokens: 60,
        ..ScheduleConfig::new(strategy)
    }
}

fn alone(engine: &mut Engine, requests: &[SequenceRequest]) -> anyhow::Result<Answers> {
    let mut answers = Answers::new();
    for request in requests {
        answers.extend(
            run(
                engine,
                std::slice::from_ref(request),
                |_| 60,
                &config(Strategy::Vanilla),
            )?
            .0,
        );
    }
    Ok(answers)
}

/// That each answer is the one that its request gets alone or, for some that were `cancelled`, the beginning of that.
/// Returns how many of these there are.
fn check_answers<'a>(answers: &Answers, alone: &Answers, cancelled: impl IntoIterator<Item = &'a str>) -> usize {
    let cancelled: Vec<&str> = cancelled.into_iter().collect();
    assert_eq!(answers.len(), alone.len(), "every request is handed back once");
    for (id, (tokens, finish)) in answers {
        let (whole, ended) = &alone[id];
        match finish {
            FinishReason::Cancelled => assert!(cancelled.contains(&id.as_str()) && whole.starts_with(tokens), "{id}"),
            _ => assert_eq!((tokens, finish), (whole, ended), "{id}"),
        }
    }
    let ends = answers.values().map(|(_, finish)| *finish);
    ends.filter(|finish| *finish == FinishReason::Cancelled).count()
}

#[test]
fn every_strategy_gives_what_each_request_gets_alone() -> anyhow::Result<()> {
    let model = model()?;
    for temperature in [0.0, 1.2] {
        let requests = requests(24, temperature);
        let want = alone(&mut engine(&model, 4096)?, &requests)?;
        let lengths: Vec<usize> = want.values().map(|(tokens, _)| tokens.len()).collect();
        assert!(
            lengths.iter().min() != lengths.iter().max(),
            "lengths must vary for the test to mean anything"
        );
        for strategy in Strategy::ALL {
            for (vbs, fcr) in [(false, false), (true, false), (false, true), (true, true)] {
                // Predictions from far too short to too long, so that FCR has failures to collect.
                let config = config(strategy).with(vbs, fcr);
                let (got, stats) = run(&mut engine(&model, 4096)?, &requests, |i| (i as u32 * 7) % 50, &config)?;
                assert_eq!(got, want, "{strategy} vbs {vbs} fcr {fcr} at temperature {temperature}");
                let useful: usize = lengths.iter().sum();
                assert_eq!(stats.useful_tokens, useful as u64);
                assert!(stats.slot_steps >= stats.useful_tokens);
                assert_eq!(stats.failures > 0, config.fcr, "{strategy} vbs {vbs} fcr {fcr}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_small_cache_changes_no_answer() -> anyhow::Result<()> {
    let model = model()?;
    let requests = requests(20, 1.2);
    let want = alone(&mut engine(&model, 4096)?, &requests)?;
    for strategy in [Strategy::Continuous, Strategy::SeqSch, Strategy::Vanilla] {
        // 96 tokens hold one long sequence and little else; predictions of 1 admit far too many.
        let config = config(strategy).with(false, true);
        let (got, _) = run(&mut engine(&model, 96)?, &requests, |_| 1, &config)?;
        assert_eq!(got, want, "{strategy}");
    }
    Ok(())
}

#[test]
fn a_cache_of_16_bits_holds_twice_the_tokens_and_gives_every_request_what_it_gets_alone() -> anyhow::Result<()> {
    let model = model()?;
    let half = EngineConfig {
        kv_budget: KvBudget::Bytes(256 * 80),
        kv_dtype: DTypeChoice::F16,
        max_prefill_tokens: 32,
    };
    let new = || Engine::new(model.clone(), None, model.config().eos_token_ids.clone(), half);
    assert_eq!(new()?.cache_tokens(), 160);
    let requests = requests(24, 0.0);
    let want = alone(&mut new()?, &requests)?;
    for strategy in [Strategy::Continuous, Strategy::Vanilla] {
        let (got, _) = run(&mut new()?, &requests, |i| (i as u32 * 7) % 50, &config(strategy))?;
        assert_eq!(got, want, "{strategy}");
    }
    Ok(())
}

#[test]
fn a_budget_in_bytes_holds_as_many_tokens_as_fit() -> anyhow::Result<()> {
    let model = model()?;
    // Keys and values of two layers, two heads of 8 floats each: 256 bytes a token, 16 tokens a block.
    for (bytes, tokens) in [(256 * 160, 160), (256 * 176 - 1, 160)] {
        let config = EngineConfig {
            kv_budget: KvBudget::Bytes(bytes),
            ..EngineConfig::default()
        };
        let engine = Engine::new(model.clone(), None, Vec::new(), config)?;
        assert_eq!(engine.cache_tokens(), tokens);
    }
    Ok(())
}

#[test]
fn every_order_of_admission_gives_the_same_answers() -> anyhow::Result<()> {
    let model = model()?;
    let requests = requests(20, 1.2);
    let want = alone(&mut engine(&model, 4096)?, &requests)?;
    for order in [
        AdmissionOrder::FirstCome,
        AdmissionOrder::ShortestFirst,
        AdmissionOrder::LongestFirst,
    ] {
        let config = ScheduleConfig {
            order,
            ..config(Strategy::Continuous)
        };
        assert_eq!(
            run(&mut engine(&model, 4096)?, &requests, |i| i as u32, &config)?.0,
            want,
            "{order}"
        );
    }
    Ok(())
}

#[test]
fn batches_planned_by_cost_give_the_same_answers_also_in_a_cache_too_small() -> anyhow::Result<()> {
    let model = model()?;
    let requests = requests(40, 1.0);
    let want = alone(&mut engine(&model, 4096)?, &requests)?;
    // Dear steps ask for large batches, dear rows for small ones.
    for (step, row) in [(1e-3, 1e-6), (1e-9, 1e-3), (1e-4, 1e-4)] {
        let cost = CostModel {
            step,
            row,
            cached_token: 1e-7,
            prompt_token: 1e-5,
            ..CostModel::default()
        };
        let planning = Planning {
            cost,
            history: vec![(10, 8), (60, 20)],
            distributions: HashMap::new(),
        };
        let config = config(Strategy::SeqSch).planned_by(Some(Arc::new(planning)));
        for cache in [4096, 96] {
            let (got, stats) = run(&mut engine(&model, cache)?, &requests, |i| 1 + i as u32 % 60, &config)?;
            assert_eq!(got, want, "step {step}, row {row}, cache {cache}");
            assert_eq!(stats.requests, 40);
        }
    }
    Ok(())
}

#[test]
fn a_replayed_answer_ends_at_its_recorded_length() -> anyhow::Result<()> {
    let mut requests = requests(6, 0.0);
    for (i, request) in requests.iter_mut().enumerate() {
        request.replay_tokens = Some(10 * i as u32 + 5);
    }
    let (answers, stats) = run(
        &mut engine(&model()?, 4096)?,
        &requests,
        |_| 60,
        &config(Strategy::Vanilla),
    )?;
    for (i, request) in requests.iter().enumerate() {
        assert_eq!(answers[&request.id].0.len(), 10 * i + 5);
    }
    // Batches of four and two: 4 × 35 + 2 × 55.
    assert_eq!((stats.steps, stats.slot_steps), (90, 250));
    Ok(())
}

#[test]
fn what_cannot_run_is_refused_before_anything_is_decoded() -> anyhow::Result<()> {
    let model = model()?;
    let refused = |change: fn(&mut SequenceRequest), cache| -> anyhow::Result<DecodeError> {
        let mut requests = requests(3, 0.0);
        change(&mut requests[2]);
        let predicted = requests
            .into_iter()
            .map(|request| PredictedRequest { request, predicted: 9 })
            .collect();
        let mut sink = |_| panic!("nothing may be decoded");
        let result = run_strategy(
            &mut engine(&model, cache)?,
            predicted,
            &config(Strategy::Continuous),
            &mut sink,
        );
        Ok(result.expect_err("refused"))
    };
    let err = refused(|r| r.prompt = vec![5; 128], 4096)?.to_string();
    assert!(
        err.contains("r2") && err.contains("128 tokens") && err.contains("at most 127"),
        "{err}"
    );
    assert!(matches!(
        refused(|r| r.prompt.clear(), 4096)?,
        DecodeError::EmptyPrompt { .. }
    ));
    assert!(matches!(
        refused(|r| r.max_new_tokens = 0, 4096)?,
        DecodeError::NothingToGenerate { .. }
    ));
    assert!(matches!(
        refused(|r| r.id = "r0".into(), 4096)?,
        DecodeError::DuplicateId { .. }
    ));
    assert!(matches!(
        refused(|r| r.prompt = vec![5; 60], 96)?,
        DecodeError::CacheTooSmall { .. }
    ));
    Ok(())
}
