//! Whole passes on the emulator against the CPU path.
#![cfg(feature = "kernel-emulation")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device};
use lengthwise_core::SamplingParams;

use crate::gpu::emulated::EmulatedGpu;
use crate::gpu::{Gpu, GpuCache};
use crate::testing::adapter;
use crate::{Adapter, BlockTable, KvCache, Llama, ModelConfig, Sampler, Segment, Wanted, drawn_token};

/// A prompt, a longer one than a tile, and a single token.
fn prompts() -> [Vec<u32>; 3] {
    [vec![3, 9, 4, 1, 7], (0..40).map(|i| (i * 7) % 50).collect(), vec![6]]
}

/// The models whose differences the kernels know.
fn configs() -> Vec<ModelConfig> {
    let base = ModelConfig {
        head_dim: 16,
        hidden_size: 64,
        ..crate::testing::config()
    };
    let heads_without_tiles = ModelConfig {
        head_dim: 8,
        hidden_size: 32,
        ..base.clone()
    };
    let window = ModelConfig {
        sliding_window: Some(9),
        ..base.clone()
    };
    let untied = ModelConfig {
        num_key_value_heads: 4,
        ..base.clone()
    };
    vec![base, heads_without_tiles, window, untied]
}

/// The tokens of each sequence behind those that are cached, the first two with the adapter.
fn new_tokens<'a>(sequences: &'a [Vec<u32>; 3], cached: [usize; 3], tables: &'a [BlockTable]) -> Vec<Segment<'a>> {
    let segment = |i: usize| Segment {
        tokens: &sequences[i][cached[i]..],
        start: cached[i],
        table: &tables[i],
        adapted_from: if i < 2 { 0 } else { usize::MAX },
    };
    (0..3).map(segment).collect()
}

/// Logits of a prefill of all prompts, the first ones with the adapter, and of three steps on top, and the tokens drawn in
/// those.
fn run(llama: &Llama, mut cache: KvCache, adapter: Option<&Adapter>) -> anyhow::Result<(Vec<Vec<f32>>, Vec<u32>)> {
    let mut sequences = prompts();
    let mut tables = vec![BlockTable::default(); sequences.len()];
    let mut samplers: Vec<Sampler> = (0..3u64)
        .map(|seed| {
            Sampler::new(SamplingParams {
                temperature: seed as f32 / 2.0,
                top_k: 20,
                top_p: 0.9,
                seed,
            })
        })
        .collect();
    let (mut logits, mut drawn) = (Vec::new(), Vec::new());
    let mut cached = [0; 3];
    for step in 0..4 {
        for (table, sequence) in tables.iter_mut().zip(&sequences) {
            assert!(cache.reserve(table, sequence.len()));
        }
        let segments = new_tokens(&sequences, cached, &tables);
        if step % 2 == 0 {
            logits.push(llama.forward(&segments, &mut cache, adapter)?.to_vec());
        }
        let mut wanted: Vec<Wanted> = samplers.iter_mut().map(Wanted::Token).collect();
        let tokens = llama
            .launch(&segments, &mut cache, adapter, &mut wanted)?
            .land()?
            .tokens;
        for (i, token) in tokens.iter().enumerate() {
            cached[i] = sequences[i].len();
            sequences[i].push(*token);
        }
        drawn.extend(tokens);
    }
    Ok((logits, drawn))
}

#[test]
fn passes_give_the_logits_and_tokens_of_the_cpu_path() -> anyhow::Result<()> {
    for config in configs() {
        let llama = crate::testing::network(&config)?;
        let adapter = adapter(&llama)?;
        for adapter in [None, Some(&adapter)] {
            let (want, want_drawn) = run(&llama, KvCache::new(&llama, 256)?, adapter)?;
            let (got, drawn) = run(&llama, KvCache::emulated(&llama, 256)?, adapter)?;
            for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
                assert!((got - want).abs() < 1e-4, "{got}, want {want}: {config:?}");
            }
            assert_eq!(drawn, want_drawn, "{config:?}");
        }
    }
    Ok(())
}

#[test]
fn caches_of_a_network_share_what_one_measured() -> anyhow::Result<()> {
    let config = configs().remove(0);
    let weights = crate::testing::weights(&config, DType::BF16, &Device::Cpu)?;
    let timed = Arc::new(AtomicUsize::new(0));
    // Three ways of five products, each of 8, 16 and 32 rows.
    let all = 3 * 5 * 3;
    for network in 1..=2 {
        let llama = Llama::new(&config, &weights)?;
        for llama in [&llama, &llama, &llama.clone()] {
            let gpu = Gpu::Emulated(EmulatedGpu {
                timed: Some(timed.clone()),
                ..EmulatedGpu::default()
            });
            GpuCache::new(gpu, llama, 64)?.reserve(300, 256)?;
        }
        assert_eq!(timed.load(Ordering::Relaxed), network * all);
    }
    Ok(())
}

/// Logits of a prefill of all prompts and of two steps on top with given tokens, the first two with the adapter.
fn given_steps(llama: &Llama, mut cache: KvCache, adapter: Option<&Adapter>) -> anyhow::Result<Vec<f32>> {
    let mut sequences = prompts();
    let mut tables = vec![BlockTable::default(); 3];
    let (mut logits, mut cached) = (Vec::new(), [0; 3]);
    for step in 0..3 {
        for (table, sequence) in tables.iter_mut().zip(&sequences) {
            assert!(cache.reserve(table, sequence.len()));
        }
        let segments = new_tokens(&sequences, cached, &tables);
        logits.extend_from_slice(llama.forward(&segments, &mut cache, adapter)?);
        for (i, sequence) in sequences.iter_mut().enumerate() {
            cached[i] = sequence.len();
            sequence.push((11 * step + 5 * i + 2) as u32);
        }
    }
    Ok(logits)
}

/// Steps multiply by the kernel of few rows here, the prefill by cuBLAS' stand-in; gate and up have terms of the adapter
/// between product and activation, or have not.
#[test]
fn passes_in_16_bits_are_those_of_the_cpu_path_but_for_rounding() -> anyhow::Result<()> {
    for config in configs() {
        for (dtype, tolerance) in [(DType::BF16, 8e-2), (DType::F16, 1e-2)] {
            let llama = Llama::new(&config, &crate::testing::weights(&config, dtype, &Device::Cpu)?)?;
            let (every, some) = (adapter(&llama)?, crate::testing::adapter_of(&llama, "q_proj,v_proj")?);
            for adapter in [None, Some(&every), Some(&some)] {
                let want = given_steps(&llama, KvCache::new(&llama, 256)?, adapter)?;
                let got = given_steps(&llama, KvCache::emulated(&llama, 256)?, adapter)?;
                let far = want.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                let large = want.iter().fold(0f32, |most, x| most.max(x.abs()));
                assert!(far < tolerance * large, "{dtype:?}: {far} of {large}: {config:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_pass_takes_tokens_that_the_one_before_drew_and_the_host_does_not_know() -> anyhow::Result<()> {
    const STEPS: usize = 4;
    let llama = crate::testing::network(&configs()[0])?;
    let run = |ahead: bool| -> anyhow::Result<Vec<u32>> {
        let mut cache = KvCache::emulated(&llama, 256)?;
        let prompts = prompts();
        let mut tables = vec![BlockTable::default(); 3];
        for (table, prompt) in tables.iter_mut().zip(&prompts) {
            assert!(cache.reserve(table, prompt.len() + STEPS));
        }
        // Who is where in the next pass: another order each time, so a token's place in one is not that in the next.
        let mut order = [0, 1, 2];
        let (mut next, mut starts) = (prompts.to_vec(), [0; 3]);
        let (mut flights, mut drawn) = (Vec::new(), Vec::new());
        for _ in 0..STEPS {
            let segment = |&who: &usize| Segment {
                tokens: &next[who],
                start: starts[who],
                table: &tables[who],
                adapted_from: usize::MAX,
            };
            let segments: Vec<Segment> = order.iter().map(segment).collect();
            let mut samplers = vec![Sampler::new(SamplingParams::GREEDY); 3];
            let mut wanted: Vec<Wanted> = samplers.iter_mut().map(Wanted::Token).collect();
            let flight = llama.launch(&segments, &mut cache, None, &mut wanted)?;
            (0..3).for_each(|who| starts[who] += next[who].len());
            let tokens = if ahead {
                flights.push(flight);
                (0..3).map(drawn_token).collect()
            } else {
                let tokens = flight.land()?.tokens;
                drawn.extend_from_slice(&tokens);
                tokens
            };
            for (who, token) in order.iter().zip(tokens) {
                next[*who] = vec![token];
            }
            order.rotate_left(1);
        }
        for flight in flights {
            drawn.extend(flight.land()?.tokens);
        }
        Ok(drawn)
    };
    assert_eq!(run(true)?, run(false)?);
    Ok(())
}

#[test]
fn tokens_that_no_pass_drew_are_refused() -> anyhow::Result<()> {
    let llama = crate::testing::network(&configs()[0])?;
    for mut cache in [KvCache::new(&llama, 64)?, KvCache::emulated(&llama, 64)?] {
        let mut table = BlockTable::default();
        assert!(cache.reserve(&mut table, 1));
        let segment = Segment {
            tokens: &[drawn_token(0)],
            start: 0,
            table: &table,
            adapted_from: usize::MAX,
        };
        let mut wanted = [Wanted::Nothing];
        assert!(llama.launch(&[segment], &mut cache, None, &mut wanted).is_err());
    }
    Ok(())
}

#[test]
fn segments_with_and_without_the_adapter_share_a_pass() -> anyhow::Result<()> {
    let llama = crate::testing::network(&configs()[0])?;
    let adapter = adapter(&llama)?;
    let sequences = prompts();
    let alone = |i: usize, adapter: Option<&Adapter>| -> anyhow::Result<Vec<f32>> {
        let mut cache = KvCache::new(&llama, 64)?;
        let mut table = BlockTable::default();
        assert!(cache.reserve(&mut table, sequences[i].len()));
        let segment = Segment {
            tokens: &sequences[i],
            start: 0,
            table: &table,
            adapted_from: 0,
        };
        Ok(llama.forward(&[segment], &mut cache, adapter)?.to_vec())
    };
    for mut cache in [KvCache::new(&llama, 256)?, KvCache::emulated(&llama, 256)?] {
        let mut tables = vec![BlockTable::default(); 3];
        for (table, sequence) in tables.iter_mut().zip(&sequences) {
            assert!(cache.reserve(table, sequence.len()));
        }
        let segments: Vec<Segment> = (0..3)
            .map(|i| Segment {
                tokens: &sequences[i],
                start: 0,
                table: &tables[i],
                adapted_from: if i == 1 { usize::MAX } else { 0 },
            })
            .collect();
        let together = llama.forward(&segments, &mut cache, Some(&adapter))?;
        for (i, got) in together.chunks_exact(llama.config().vocab_size).enumerate() {
            let want = alone(i, (i != 1).then_some(&adapter))?;
            let other = alone(i, (i == 1).then_some(&adapter))?;
            let far = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(far(got, &want) < 1e-4, "row {i}: {}", far(got, &want));
            assert!(far(got, &other) > 1e-2, "row {i}: the adapter makes no difference");
        }
    }
    Ok(())
}

/// Passes in which some segments are asked for their hidden states, in every form of the cache and in every dtype.
#[test]
fn hidden_states_come_with_the_tokens_in_the_order_of_their_segments() -> anyhow::Result<()> {
    let sequences = prompts();
    // In 16 bits both sides round in every layer; another row's state is off by one and more.
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::BF16, 6e-2), (DType::F16, 6e-2)] {
        let llama = Llama::new(
            &configs()[0],
            &crate::testing::weights(&configs()[0], dtype, &Device::Cpu)?,
        )?;
        let adapter = adapter(&llama)?;
        let of = |i: usize, adapter| -> anyhow::Result<Vec<f32>> {
            let hidden = llama.last_hidden(&[&sequences[i]], adapter, None)?;
            Ok(hidden.get(0)?.to_vec1()?)
        };
        for mut cache in [KvCache::new(&llama, 256)?, KvCache::emulated(&llama, 256)?] {
            let mut tables = vec![BlockTable::default(); 3];
            for (table, sequence) in tables.iter_mut().zip(&sequences) {
                assert!(cache.reserve(table, sequence.len()));
            }
            let segment = |i: usize| Segment {
                tokens: &sequences[i],
                start: 0,
                table: &tables[i],
                adapted_from: if i == 0 { usize::MAX } else { 0 },
            };
            let segments: Vec<Segment> = (0..3).map(segment).collect();
            let mut sampler = Sampler::new(SamplingParams::GREEDY);
            for asked in [vec![0, 2], vec![1], vec![1, 2]] {
                let mut wanted: Vec<Wanted> = (0..3).map(|_| Wanted::Nothing).collect();
                asked.iter().for_each(|&i| wanted[i] = Wanted::Hidden);
                if asked[0] == 1 {
                    wanted[0] = Wanted::Token(&mut sampler);
                }
                let landed = llama
                    .launch(&segments, &mut cache, Some(&adapter), &mut wanted)?
                    .land()?;
                assert_eq!((landed.tokens.len(), landed.hidden.len()), (3, asked.len()));
                for (got, &i) in landed.hidden.iter().zip(&asked) {
                    let want = of(i, (i != 0).then_some(&adapter))?;
                    assert_eq!(got.len(), want.len());
                    for (got, want) in got.iter().zip(&want) {
                        assert!(
                            (got - want).abs() <= tolerance,
                            "{dtype:?}, segment {i}: {got}, want {want}"
                        );
                    }
                }
            }
        }
    }
    Ok(())
}
