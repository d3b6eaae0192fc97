//! What must hold of the network whatever its weights: independence of rows, of chunks, and of merging.

use candle_core::{DType, Device, Tensor};

use crate::ops::testing::assert_close;
use crate::{Adapter, BlockTable, Dropout, KvCache, Llama, Quantization, Segment, TrainPass, Wanted, cross_entropy};

const PROMPTS: [&[u32]; 3] = [&[3, 9, 4, 1, 7, 8, 20, 21, 22, 23, 5], &[6], &[30, 31, 32]];

use crate::testing::{adapter, adapter_from};

fn network() -> anyhow::Result<Llama> {
    crate::testing::network(&crate::testing::config())
}

/// Logits after every prefix end given by `chunks`, each chunk one forward pass; the last chunk's are returned.
fn run(llama: &Llama, prompts: &[&[u32]], chunk: usize, adapter: Option<&Adapter>) -> anyhow::Result<Vec<Tensor>> {
    run_with(KvCache::new(llama, 256)?, llama, prompts, chunk, adapter)
}

fn run_with(
    mut cache: KvCache,
    llama: &Llama,
    prompts: &[&[u32]],
    chunk: usize,
    adapter: Option<&Adapter>,
) -> anyhow::Result<Vec<Tensor>> {
    let mut tables = vec![BlockTable::default(); prompts.len()];
    for (table, prompt) in tables.iter_mut().zip(prompts) {
        assert!(cache.reserve(table, prompt.len()));
    }
    let mut done = vec![0; prompts.len()];
    let mut last = vec![None; prompts.len()];
    while done.iter().zip(prompts).any(|(d, p)| *d < p.len()) {
        let mut segments = Vec::new();
        let mut who = Vec::new();
        for i in (0..prompts.len()).filter(|&i| done[i] < prompts[i].len()) {
            let end = (done[i] + chunk).min(prompts[i].len());
            segments.push(Segment {
                tokens: &prompts[i][done[i]..end],
                start: done[i],
                table: &tables[i],
                adapted_from: adapter.map_or(0, |a| a.config().active_from(prompts[i]).saturating_sub(done[i])),
            });
            who.push((i, end));
        }
        let logits = llama.forward(&segments, &mut cache, adapter)?;
        for (row, (i, end)) in who.into_iter().enumerate() {
            done[i] = end;
            let vocab = llama.config().vocab_size;
            last[i] = Some(Tensor::new(&logits[row * vocab..][..vocab], &Device::Cpu)?);
        }
    }
    Ok(last.into_iter().flatten().collect())
}

#[test]
fn a_packed_batch_gives_what_each_row_gives_alone() -> anyhow::Result<()> {
    let llama = network()?;
    let together = run(&llama, &PROMPTS, 100, None)?;
    for (prompt, got) in PROMPTS.iter().zip(&together) {
        assert_close(got, &run(&llama, &[prompt], 100, None)?[0], 1e-5)?;
    }
    Ok(())
}

#[test]
fn prefill_in_chunks_gives_what_prefill_in_one_gives() -> anyhow::Result<()> {
    let llama = network()?;
    let whole = run(&llama, &PROMPTS, 100, None)?;
    for chunk in [1, 2, 9] {
        for (got, want) in run(&llama, &PROMPTS, chunk, None)?.iter().zip(&whole) {
            assert_close(got, want, 1e-5)?;
        }
    }
    Ok(())
}

#[test]
fn a_cache_of_16_bits_gives_the_logits_but_for_its_rounding_and_alike_in_every_chunk() -> anyhow::Result<()> {
    let llama = network()?;
    let half = |chunk| {
        run_with(
            KvCache::in_dtype(&llama, 256, DType::F16)?,
            &llama,
            &PROMPTS,
            chunk,
            None,
        )
    };
    let (whole, want) = (half(100)?, run(&llama, &PROMPTS, 100, None)?);
    for (got, want) in whole.iter().zip(&want) {
        assert_close(got, want, 2e-3)?;
        assert!(
            (got - want)?.abs()?.max(0)?.to_scalar::<f32>()? > 0.0,
            "nothing was rounded"
        );
    }
    for chunk in [1, 2, 9] {
        for (got, want) in half(chunk)?.iter().zip(&whole) {
            assert_close(got, want, 1e-5)?;
        }
    }
    Ok(())
}

#[test]
fn the_cached_pass_gives_the_hidden_state_of_the_training_one_chunk_by_chunk() -> anyhow::Result<()> {
    let llama = network()?;
    let adapter = adapter(&llama)?;
    let mut cache = KvCache::new(&llama, 64)?;
    let mut tables = vec![BlockTable::default(); 2];
    for table in &mut tables {
        assert!(cache.reserve(table, PROMPTS[0].len()));
    }
    // The first in two chunks, of which the second alone is asked; the second without the adapter beside them.
    for (tokens, start, wanted) in [
        (&PROMPTS[0][..7], 0, Wanted::Nothing),
        (&PROMPTS[0][7..], 7, Wanted::Hidden),
    ] {
        let segment = |tokens, start, table, adapted_from| Segment {
            tokens,
            start,
            table,
            adapted_from,
        };
        let segments = [
            segment(PROMPTS[2], 0, &tables[1], usize::MAX),
            segment(tokens, start, &tables[0], 0),
        ];
        let asked = matches!(wanted, Wanted::Hidden);
        let flight = llama.launch(&segments, &mut cache, Some(&adapter), &mut [Wanted::Nothing, wanted])?;
        let hidden = flight.land()?.hidden;
        assert_eq!(hidden.len(), usize::from(asked));
        for hidden in hidden {
            let want = llama.last_hidden(&PROMPTS[..1], Some(&adapter), None)?.get(0)?;
            assert_close(&Tensor::new(hidden, &Device::Cpu)?, &want, 1e-5)?;
        }
    }
    Ok(())
}

#[test]
fn a_cache_in_a_dtype_that_nothing_runs_is_refused() -> anyhow::Result<()> {
    let err = KvCache::in_dtype(&network()?, 256, DType::BF16).expect_err("bf16 beside f32 weights");
    assert!(err.to_string().starts_with("a KV cache in bf16"), "{err}");
    Ok(())
}

#[test]
fn the_training_pass_gives_the_logits_of_the_cached_one() -> anyhow::Result<()> {
    let llama = network()?;
    let got = llama.forward_train(&PROMPTS, &[10, 11, 14], None, None)?;
    for (row, want) in run(&llama, &PROMPTS, 100, None)?.iter().enumerate() {
        assert_close(&got.get(row)?, want, 1e-5)?;
    }
    Ok(())
}

#[test]
fn merged_equals_unmerged_and_both_differ_from_the_base() -> anyhow::Result<()> {
    let llama = network()?;
    let adapter = adapter(&llama)?;
    let base = run(&llama, &PROMPTS, 100, None)?;
    let unmerged = run(&llama, &PROMPTS, 100, Some(&adapter))?;
    let merged = run(&llama.merged(&adapter)?, &PROMPTS, 100, None)?;
    for ((base, got), want) in base.iter().zip(&unmerged).zip(&merged) {
        assert_close(got, want, 1e-4)?;
        let moved = (got - base)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(moved > 1e-2, "the adapter changes nothing: {moved}");
    }
    Ok(())
}

/// What the adapter gives of sequences with its invocation tokens: the base model's keys and values before them, and the
/// whole adapter from there on.
fn check_invocation(llama: &Llama, tolerance: f32) -> anyhow::Result<()> {
    let (plain, activated) = (adapter(llama)?, adapter_from(llama, "all-linear", &[20, 21])?);
    let prompt = PROMPTS[0];
    // Twice, the second time from place 10 on; and a sequence without.
    let twice = [&prompt[..10], &[20, 21, 4]].concat();
    for (tokens, from) in [(prompt, 6), (&twice, 10), (PROMPTS[2], usize::MAX)] {
        assert_eq!(activated.config().active_from(tokens), from);
        let (mut cache, mut table) = (KvCache::new(llama, 64)?, BlockTable::default());
        assert!(cache.reserve(&mut table, tokens.len()));
        let (before, behind) = tokens.split_at(from.min(tokens.len()));
        let mut want = None;
        for (tokens, start, adapter) in [(before, 0, None), (behind, before.len(), Some(&plain))] {
            if tokens.is_empty() {
                continue;
            }
            let segment = Segment {
                tokens,
                start,
                table: &table,
                adapted_from: 0,
            };
            want = Some(Tensor::new(
                llama.forward(&[segment], &mut cache, adapter)?,
                &Device::Cpu,
            )?);
        }
        let want = want.expect("a sequence has tokens");
        for chunk in [100, 4] {
            let got = run(llama, &[&[6], tokens], chunk, Some(&activated))?;
            assert_close(&got[1], &want, tolerance)?;
        }
        let last = [tokens.len() as u32];
        let trained = llama.forward_train(&[&[6], tokens], &last, Some(&activated), None)?;
        assert_close(&trained.get(0)?, &want, tolerance)?;
    }
    Ok(())
}

#[test]
fn an_adapter_with_invocation_tokens_leaves_what_stands_before_them_as_it_was() -> anyhow::Result<()> {
    // On the CPU path, and in candle's operations.
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 2e-2)] {
        let config = crate::testing::config();
        let llama = Llama::new(&config, &crate::testing::weights(&config, dtype, &Device::Cpu)?)?;
        assert_eq!(llama.runs_on_host(), dtype == DType::F32);
        check_invocation(&llama, tolerance)?;
    }
    let llama = network()?;
    let activated = adapter_from(&llama, "all-linear", &[20, 21])?;
    let err = llama.merged(&activated).expect_err("weights know no places");
    assert!(err.to_string().contains("invocation tokens"), "{err}");
    Ok(())
}

#[test]
fn every_lora_tensor_gets_a_gradient_and_no_frozen_weight_does() -> anyhow::Result<()> {
    let llama = network()?;
    let adapter = adapter(&llama)?;
    let logits = llama.forward_train(&PROMPTS, &[10, 11, 14], Some(&adapter), None)?;
    let grads = cross_entropy(&logits, &[1, 2, 3], 3.0)?.backward()?;
    for (name, tensor) in adapter.tensors() {
        let grad = grads.get(&tensor).unwrap_or_else(|| panic!("{name} has no gradient"));
        let size = grad.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(size > 0.0 && size.is_finite(), "{name}: gradient {size}");
    }
    assert!(grads.get(&llama.embed_tokens).is_none());
    Ok(())
}

#[test]
fn checkpointed_gradients_are_the_plain_ones_dropout_included() -> anyhow::Result<()> {
    let llama = network()?;
    let adapter = adapter(&llama)?;
    let gradients = |checkpointing: bool| -> anyhow::Result<(f32, Vec<Tensor>)> {
        let dropout = Dropout::new(0.3, 11);
        let pass = TrainPass::new(&llama, Some(&adapter), Some(&dropout), checkpointing);
        let loss = cross_entropy(&pass.logits(&PROMPTS, &[10, 11, 14])?, &[1, 2, 3], 3.0)?;
        let mut found = std::collections::BTreeMap::new();
        pass.backward(&loss, &mut |store| {
            for (name, tensor) in adapter.tensors() {
                found.extend(store.get(&tensor).map(|grad| (name, grad.detach())));
            }
            Ok(())
        })?;
        assert_eq!(found.len(), adapter.tensors().len());
        Ok((loss.to_scalar()?, found.into_values().collect()))
    };
    let ((loss, plain), (checkpointed_loss, checkpointed)) = (gradients(false)?, gradients(true)?);
    assert_eq!(loss, checkpointed_loss);
    for (got, want) in checkpointed.iter().zip(&plain) {
        assert_close(got, want, 1e-6)?;
    }
    Ok(())
}

#[test]
fn an_adapter_reads_back_as_it_was_saved() -> anyhow::Result<()> {
    let llama = network()?;
    let adapter = adapter(&llama)?;
    let dir = tempfile::tempdir()?;
    adapter.save(dir.path(), "tiny")?;
    let back = Adapter::load(dir.path(), llama.config(), &Device::Cpu)?;
    assert_eq!(back.config(), adapter.config());
    for ((name, want), (back_name, got)) in adapter.tensors().iter().zip(&back.tensors()) {
        assert_eq!(name, back_name);
        assert_close(got, want, 0.0)?;
    }
    let other = crate::ModelConfig {
        num_hidden_layers: 3,
        ..llama.config().clone()
    };
    let err = Adapter::load(dir.path(), &other, &Device::Cpu)
        .expect_err("two layers, not three")
        .to_string();
    assert!(err.contains("layers.2") && err.contains("another model"), "{err}");
    Ok(())
}

#[test]
fn positions_past_the_context_are_refused() -> anyhow::Result<()> {
    let llama = network()?;
    let long = vec![1u32; llama.config().max_position_embeddings + 1];
    let err = llama
        .forward_train(&[&long], &[0], None, None)
        .expect_err("too long")
        .to_string();
    assert!(err.contains("65 tokens") && err.contains("at most 64"), "{err}");
    Ok(())
}

#[test]
fn eight_bit_weights_stay_close_take_a_quarter_and_keep_rows_apart() -> anyhow::Result<()> {
    let config = crate::testing::config();
    let llama = network()?;
    let small = crate::testing::quantized(&config)?;
    assert_eq!(
        (llama.quantization(), small.quantization()),
        (None, Some(Quantization::Q8_0))
    );
    // 32 inputs take a scale of 4 bytes and 32 of weights instead of 128; 48 inputs of `down` fill two such blocks.
    assert!(small.linear_bytes() * 3 < llama.linear_bytes());
    let (exact, together) = (run(&llama, &PROMPTS, 100, None)?, run(&small, &PROMPTS, 100, None)?);
    for ((prompt, got), want) in PROMPTS.iter().zip(&together).zip(&exact) {
        // Not a bit of difference: what a row gives does not depend on how many it runs with.
        assert_close(got, &run(&small, &[prompt], 100, None)?[0], 0.0)?;
        let spread = want.abs()?.max_all()?.to_scalar::<f32>()?;
        assert_close(got, want, 0.02 * spread)?;
        let moved = (got - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(moved > 0.0, "nothing was rounded");
    }
    Ok(())
}

#[test]
fn an_adapter_on_eight_bit_weights_is_the_low_rank_term_on_top() -> anyhow::Result<()> {
    let small = crate::testing::quantized(&crate::testing::config())?;
    let adapter = adapter(&small)?;
    let exact = run(&network()?, &PROMPTS, 100, Some(&adapter))?;
    for (got, want) in run(&small, &PROMPTS, 100, Some(&adapter))?.iter().zip(&exact) {
        let spread = want.abs()?.max_all()?.to_scalar::<f32>()?;
        assert_close(got, want, 0.05 * spread)?;
    }
    assert_eq!(small.merged(&adapter)?.quantization(), Some(Quantization::Q8_0));
    Ok(())
}
