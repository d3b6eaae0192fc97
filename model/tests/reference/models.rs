//! Every architecture: logits of every position and greedy tokens.

use anyhow::{Context, Result, ensure};
use candle_core::{D, DType, Device};
use lengthwise_model::{Llama, ModelConfig, RopeScaling, Weights};

use crate::support::{Reference, Running, assert_cached, assert_uncached, fixture, model};

const ALL_ROWS: [usize; 4] = [0, 1, 2, 3];

/// The greedy tokens of `rows`, run together: prefill in one pass, then one token of each per pass.
fn greedy(llama: &Llama, reference: &Reference, rows: &[usize]) -> Result<Vec<Vec<u32>>> {
    let mut running = Running::new(llama, None, rows.len())?;
    let prompts: Vec<(usize, &[u32])> = rows
        .iter()
        .enumerate()
        .map(|(i, &row)| (i, reference.rows[row].as_slice()))
        .collect();
    let mut last = running.feed(&prompts)?.argmax(D::Minus1)?.to_vec1::<u32>()?;
    let mut answers: Vec<Vec<u32>> = last.iter().map(|&token| vec![token]).collect();
    for _ in 1..reference.greedy[0].len() {
        let more: Vec<(usize, &[u32])> = last.iter().map(std::slice::from_ref).enumerate().collect();
        let next = running.feed(&more)?.argmax(D::Minus1)?.to_vec1::<u32>()?;
        for (answer, &token) in answers.iter_mut().zip(&next) {
            answer.push(token);
        }
        last = next;
    }
    Ok(answers)
}

fn check(name: &str) -> Result<()> {
    let (llama, reference) = (model(name)?, Reference::read(name)?);
    assert_uncached(&llama, None, &reference)?;
    // All at once, one by one, and in chunks that end inside, at and beyond a block of the cache and a window of 8.
    for chunk in [100, 1, 5, 8, 16] {
        for row in ALL_ROWS {
            assert_cached(&llama, None, &reference, &[row], &[chunk]).context("alone")?;
        }
        assert_cached(&llama, None, &reference, &ALL_ROWS, &[chunk; 4]).context("together")?;
    }
    // Prefill and decode in one pass, and rows in another order.
    assert_cached(&llama, None, &reference, &[3, 0, 2, 1], &[1, 100, 7, 3]).context("mixed")?;

    ensure!(greedy(&llama, &reference, &ALL_ROWS)? == reference.greedy, "together");
    for row in ALL_ROWS {
        ensure!(
            greedy(&llama, &reference, &[row])?[0] == reference.greedy[row],
            "row {row}"
        );
    }
    Ok(())
}

#[test]
fn llama_with_grouped_heads_and_tied_embeddings_equals_transformers() -> Result<()> {
    check("llama")
}

#[test]
fn llama_with_llama3_rope_scaling_equals_transformers() -> Result<()> {
    check("llama3")
}

#[test]
fn llama_with_linear_rope_scaling_equals_transformers() -> Result<()> {
    check("llama_linear")
}

#[test]
fn mistral_with_a_sliding_window_equals_transformers() -> Result<()> {
    check("mistral")
}

#[test]
fn qwen2_with_attention_biases_equals_transformers() -> Result<()> {
    check("qwen2")
}

#[test]
fn qwen3_with_norms_of_queries_and_keys_equals_transformers() -> Result<()> {
    check("qwen3")
}

/// Llama 3's scaling of a context of 64 tokens.
fn llama3(factor: f64, low_freq_factor: f64, high_freq_factor: f64) -> RopeScaling {
    RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings: 64.0,
    }
}

/// Without this a fixture in which a setting makes no difference would pass whatever the network does with it.
#[test]
fn every_setting_shows_in_the_logits() -> Result<()> {
    type Change = fn(&mut ModelConfig);
    let changes: [(&str, Change); 12] = [
        ("llama", |c| c.rope_theta = 9000.0),
        ("llama", |c| c.rms_norm_eps = 1e-4),
        ("llama3", |c| c.rope_scaling = RopeScaling::None),
        ("llama3", |c| c.rope_scaling = llama3(7.0, 1.0, 4.0)),
        ("llama3", |c| c.rope_scaling = llama3(8.0, 1.1, 4.0)),
        ("llama3", |c| c.rope_scaling = llama3(8.0, 1.0, 5.0)),
        ("llama_linear", |c| c.rope_scaling = RopeScaling::Linear { factor: 3.0 }),
        ("mistral", |c| c.sliding_window = Some(7)),
        ("mistral", |c| c.sliding_window = Some(9)),
        ("mistral", |c| c.rms_norm_eps = 1e-5),
        ("qwen2", |c| c.attention_bias = false),
        ("qwen3", |c| c.qk_norm = false),
    ];
    for (i, (name, change)) in changes.into_iter().enumerate() {
        let folder = fixture(name);
        let mut config = ModelConfig::from_folder(&folder)?;
        change(&mut config);
        let changed = Llama::new(&config, &Weights::open(&folder, DType::F32, &Device::Cpu)?)?;
        let same = assert_uncached(&changed, None, &Reference::read(name)?).is_ok();
        ensure!(!same, "change {i}, of {name}, makes no difference");
    }
    Ok(())
}
