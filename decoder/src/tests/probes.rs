//! Lengths that are predicted in the passes that decode.

use std::cell::RefCell;

use lengthwise_core::LengthEstimate;
use lengthwise_model::{Adapter, KvCache, LengthBins, LengthHead, LengthHeadConfig, LoraConfig};

use super::*;
use crate::probes::Probes;
use crate::{Cancellation, Controls, Prober, run_controlled};

/// Asks a question of four tokens behind a request's prompt, and reads the length off a head.
pub(super) struct HeadProber {
    adapter: Adapter,
    head: LengthHead,
    prompts: HashMap<RequestId, Vec<u32>>,
    /// What a request is scheduled by instead, where that is known.
    lengths: HashMap<RequestId, u32>,
    told: RefCell<BTreeMap<RequestId, LengthEstimate>>,
}

/// Waves of different lengths: weights that tell prompts apart.
fn wave(shape: (usize, usize), step: f32) -> anyhow::Result<Tensor> {
    let values: Vec<f32> = (0..shape.0 * shape.1).map(|i| (i as f32 * step).sin() * 0.2).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// An adapter that changes what its layers give.
pub(super) fn adapter_of(model: &Llama, config: LoraConfig) -> anyhow::Result<Adapter> {
    let adapter = Adapter::init(model.config(), config, 5, &Device::Cpu)?;
    for (name, tensor) in adapter.tensors() {
        if name.contains("lora_B") {
            tensor.slice_set(&wave(tensor.dims2()?, 0.7)?, 0, 0)?;
        }
    }
    Ok(adapter)
}

impl HeadProber {
    pub fn new(model: &Llama, requests: &[SequenceRequest]) -> anyhow::Result<Self> {
        Self::with_adapter(model, requests, LoraConfig::default())
    }

    /// The adapter begins with the question.
    pub fn activated(model: &Llama, requests: &[SequenceRequest]) -> anyhow::Result<Self> {
        let config = LoraConfig {
            invocation_tokens: vec![30, 31],
            ..LoraConfig::default()
        };
        Self::with_adapter(model, requests, config)
    }

    fn with_adapter(model: &Llama, requests: &[SequenceRequest], config: LoraConfig) -> anyhow::Result<Self> {
        let adapter = adapter_of(model, config)?;
        let config = LengthHeadConfig {
            bins: LengthBins::new(60),
            asks_length: true,
            smoothing: 0.05,
            samples: 4,
            temperature: 1.0,
            point_probability: 0.8,
        };
        let (bins, hidden) = (config.bins.len(), model.config().hidden_size);
        let head = LengthHead::init(config, hidden, &vec![1.0 / bins as f32; bins], &Device::Cpu)?;
        head.tensors()["length_head.weight"].slice_set(&wave((bins, hidden), 0.37)?, 0, 0)?;
        let prompt = |r: &SequenceRequest| (r.id.clone(), [&r.prompt[..], &[30, 31, 32, 33]].concat());
        Ok(Self {
            adapter,
            head,
            prompts: requests.iter().map(prompt).collect(),
            lengths: HashMap::new(),
            told: RefCell::default(),
        })
    }

    fn estimate(&self, logits: Vec<f32>) -> anyhow::Result<LengthEstimate> {
        Ok(self.head.distributions(&[logits])?[0].estimate(0.8))
    }

    /// That as many requests as `at_least` were predicted, and all of them what one prefill of their prompts predicts.
    pub fn check(&self, model: &Llama, at_least: usize) -> anyhow::Result<()> {
        let told = self.told.borrow();
        assert!(told.len() >= at_least, "{} predicted", told.len());
        let mut different = std::collections::BTreeSet::new();
        for (id, got) in told.iter() {
            let logits = self
                .head
                .predict(model, Some(&self.adapter), &[&self.prompts[id]], 2048)?;
            let want = self.estimate(logits.concat())?;
            assert_eq!(*got, want, "{id}");
            different.insert(want.max_tokens);
        }
        assert!(different.len() > 1 || at_least < 2, "the head tells prompts apart");
        Ok(())
    }
}

impl Prober for HeadProber {
    fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    fn prompt(&self, id: &RequestId) -> Option<Vec<u32>> {
        self.prompts.get(id).cloned()
    }

    fn length(&self, id: &RequestId, hidden: &[f32]) -> Option<u32> {
        let logits = self.head.read(hidden).expect("a state of the model's width");
        let estimate = self.estimate(logits).expect("finite");
        let length = self.lengths.get(id).copied().unwrap_or(estimate.max_tokens);
        assert!(
            self.told.borrow_mut().insert(id.clone(), estimate).is_none(),
            "told twice"
        );
        Some(length)
    }
}

/// The continuous mode on four slots, first come first served; lengths count as `predicted` until a prober tells them.
pub(super) fn run_probed(
    engine: &mut Engine,
    requests: &[SequenceRequest],
    predicted: u32,
    controls: Controls,
) -> anyhow::Result<(Answers, StrategyStats)> {
    let config = ScheduleConfig {
        order: AdmissionOrder::FirstCome,
        ..config(Strategy::Continuous)
    };
    let with = |request: &SequenceRequest| PredictedRequest {
        request: request.clone(),
        predicted,
    };
    let mut answers = Answers::new();
    let mut sink = |SequenceOutput { id, tokens, finish }| {
        assert!(answers.insert(id, (tokens, finish)).is_none(), "answered twice");
        Ok(())
    };
    let stats = run_controlled(
        engine,
        requests.iter().map(with).collect(),
        &config,
        controls,
        &mut sink,
    )?;
    assert_eq!(engine.cache.free_tokens(), engine.cache_tokens(), "blocks were lost");
    Ok((answers, stats))
}

pub(super) fn probed_by(prober: &HeadProber) -> Controls<'_> {
    Controls {
        cancellation: None,
        prober: Some(prober),
    }
}

#[test]
fn probes_tell_what_the_predictor_tells_and_change_no_answer() -> anyhow::Result<()> {
    let model = model()?;
    for temperature in [0.0, 1.2] {
        let requests = requests(24, temperature);
        let want = alone(&mut engine(&model, 4096)?, &requests)?;
        // Room for all; and for one long sequence and little else. Where far too many are admitted, so that sequences are
        // preempted all the time, there is hardly ever room for a probe.
        for (cache, predicted, at_least) in [(4096, 1, 23), (96, 60, 15), (96, 1, 0)] {
            let prober = HeadProber::new(&model, &requests)?;
            let (got, stats) = run_probed(&mut engine(&model, cache)?, &requests, predicted, probed_by(&prober))?;
            assert_eq!(got, want, "{cache} tokens of cache, temperature {temperature}");
            prober.check(&model, at_least)?;
            let told: usize = prober.told.borrow().keys().map(|id| prober.prompts[id].len()).sum();
            assert!(stats.probe_tokens >= told as u64, "{} of {told}", stats.probe_tokens);
        }
    }
    Ok(())
}

#[test]
fn probes_cost_no_row_a_step() -> anyhow::Result<()> {
    // They tell what is known already: whatever they take of the cache, every step is what it is without them.
    let model = model()?;
    let requests = requests(24, 1.2);
    for cache in [96, 128, 4096] {
        for predicted in [1, 20, 60] {
            let (_, want) = run_probed(&mut engine(&model, cache)?, &requests, predicted, Controls::default())?;
            let mut prober = HeadProber::new(&model, &requests)?;
            prober.lengths = requests.iter().map(|r| (r.id.clone(), predicted)).collect();
            let (_, got) = run_probed(&mut engine(&model, cache)?, &requests, predicted, probed_by(&prober))?;
            assert!(got.probe_tokens > 0);
            assert_eq!(
                StrategyStats { probe_tokens: 0, ..got },
                want,
                "{cache} tokens, {predicted} predicted"
            );
        }
    }
    Ok(())
}

#[test]
fn lengths_that_are_told_admit_more_at_a_time() -> anyhow::Result<()> {
    // Answers of 8 tokens behind prompts of one: by the cap of 60 one at a time takes four of five blocks, in truth one.
    let mut requests = requests(12, 0.0);
    for request in &mut requests {
        request.prompt.truncate(1);
        request.replay_tokens = Some(8);
    }
    let model = model()?;
    let (_, without) = run_probed(&mut engine(&model, 80)?, &requests, 60, Controls::default())?;
    assert_eq!(without.steps, 12 * 8);
    let mut prober = HeadProber::new(&model, &requests)?;
    prober.lengths = requests.iter().map(|r| (r.id.clone(), 8)).collect();
    // r0 runs alone in the first step, and four probes ride beside it, a block each. Then it gives back what it does not need,
    // and r1 to r3 join it: steps 1 to 8 and 2 to 9, and so on with r4 and r8.
    let (_, with) = run_probed(&mut engine(&model, 80)?, &requests, 60, probed_by(&prober))?;
    assert_eq!((with.steps, prober.told.borrow().len()), (25, 12));
    Ok(())
}

#[test]
fn probes_give_way_the_last_first_and_begin_anew() -> anyhow::Result<()> {
    let model = model()?;
    let mut requests = requests(3, 0.0);
    requests.iter_mut().for_each(|request| request.prompt = vec![5; 20]);
    let prober = HeadProber::new(&model, &requests)?;
    let mut cache = KvCache::new(&model, 80)?;
    let mut probes = Probes::new(Some(&prober));
    for (number, request) in requests[..2].iter().enumerate() {
        assert_eq!(probes.look(2), Some(number));
        probes.open(number as u32, &request.id, Some(&request.prompt), 80);
    }
    assert_eq!(probes.look(2), None, "two are predicted ahead");
    // 24 tokens each, two blocks: the first whole and four of the second.
    probes.reserve(&mut cache, 28);
    let parts = |probes: &Probes| -> Vec<(usize, usize, bool)> {
        let part = |(segment, last): (lengthwise_model::Segment, bool)| (segment.start, segment.tokens.len(), last);
        probes.segments().map(part).collect()
    };
    assert_eq!(parts(&probes), [(0, 24, true), (0, 4, false)]);
    assert_eq!(cache.free_tokens(), 16);
    assert_eq!(probes.advance(&mut cache), (28, vec![0]));
    assert_eq!(
        cache.free_tokens(),
        48,
        "the first has been through, and holds nothing while its state is waited for"
    );
    assert!(probes.give_way(&mut cache) && !probes.give_way(&mut cache));
    assert_eq!(cache.free_tokens(), 80);
    probes.reserve(&mut cache, 28);
    assert_eq!(parts(&probes), [(0, 24, true)], "from its beginning");
    // Its request was admitted, so that another is looked at; then nobody wants to know.
    assert!(probes.admitted(1).is_none(), "the adapter changes all of a probe");
    assert_eq!(probes.look(2), Some(2));
    probes.drop(1, &mut cache);
    assert_eq!(cache.free_tokens(), 80);
    assert!(probes.landed(0) && !probes.landed(0) && !probes.landed(1));
    Ok(())
}

#[test]
fn a_probe_without_room_waits_and_one_that_never_fits_is_not_opened() -> anyhow::Result<()> {
    let model = model()?;
    let mut requests = requests(2, 0.0);
    requests[0].prompt = vec![5; 40];
    let prober = HeadProber::new(&model, &requests)?;
    let mut cache = KvCache::new(&model, 48)?;
    let mut held = lengthwise_model::BlockTable::default();
    assert!(cache.reserve(&mut held, 16));
    let mut probes = Probes::new(Some(&prober));
    probes.open(0, &requests[0].id, Some(&requests[0].prompt), 43);
    probes.reserve(&mut cache, 100);
    assert_eq!(probes.advance(&mut cache), (0, vec![]), "44 tokens are too many");
    probes.open(0, &requests[0].id, Some(&requests[0].prompt), 44);
    probes.open(1, &requests[1].id, Some(&requests[1].prompt), 44);
    probes.reserve(&mut cache, 100);
    assert_eq!(
        probes.advance(&mut cache),
        (0, vec![]),
        "there is room for 32, and nobody overtakes"
    );
    cache.release(held);
    probes.reserve(&mut cache, 100);
    assert_eq!(probes.advance(&mut cache), (44, vec![0]));
    Ok(())
}

#[test]
fn whoever_is_cancelled_the_others_are_predicted_and_answered() -> anyhow::Result<()> {
    let model = model()?;
    let requests = requests(24, 1.2);
    let want = alone(&mut engine(&model, 4096)?, &requests)?;
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for (cache, activated) in [(4096, false), (96, false), (4096, true), (96, true)] {
        let of = || match activated {
            true => HeadProber::activated(&model, &requests),
            false => HeadProber::new(&model, &requests),
        };
        let prober = of()?;
        let cancellation = Cancellation::new();
        let gone: Vec<String> = (0..10).map(|_| format!("r{}", rng.random_range(0..24))).collect();
        gone.iter()
            .for_each(|id| cancellation.cancel_before(rng.random_range(1..40), id));
        let controls = Controls {
            cancellation: Some(&cancellation),
            prober: Some(&prober),
        };
        let (got, _) = run_probed(&mut engine(&model, cache)?, &requests, 60, controls)?;
        check_answers(&got, &want, gone.iter().map(String::as_str));
        prober.check(&model, 10)?;
        // All before the third step, with probes under way: three prompts and their questions take more than two passes.
        let prober = of()?;
        let cancellation = Cancellation::new();
        requests
            .iter()
            .for_each(|r| cancellation.cancel_before(3, r.id.as_str()));
        let controls = Controls {
            cancellation: Some(&cancellation),
            prober: Some(&prober),
        };
        let (got, stats) = run_probed(&mut engine(&model, cache)?, &requests, 60, controls)?;
        assert!(stats.steps <= 2 && prober.told.borrow().len() < 24);
        check_answers(&got, &want, requests.iter().map(|r| r.id.as_str()));
    }
    Ok(())
}

#[test]
fn an_engine_whose_answers_have_an_adapter_takes_no_prober() -> anyhow::Result<()> {
    let model = model()?;
    let requests = requests(2, 0.0);
    let prober = HeadProber::new(&model, &requests)?;
    let adapter = Adapter::init(model.config(), LoraConfig::default(), 1, &Device::Cpu)?;
    let mut engine = Engine::new(model, Some(Arc::new(adapter)), vec![1], EngineConfig::default())?;
    let err = run_probed(&mut engine, &requests, 9, probed_by(&prober)).expect_err("one adapter too many");
    assert!(err.to_string().contains("one adapter"), "{err}");
    Ok(())
}
