//! The requests of `bench`, with lengths replayed or real.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::Path;

use anyhow::{Context, bail};
use lengthwise_core::{Prompt, Request, RequestId, SamplingParams};
use lengthwise_decoder::{Engine, LocalDecoder, SequenceRequest};
use lengthwise_model::{BLOCK_TOKENS, LoadedModel};
use lengthwise_train::files::{InstructionRecord, LengthRecord, read_instructions, read_lengths};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::BenchArgs;
use crate::args::Global;
use crate::inputs::{actual_length, largest_lengths};
use crate::predictions::look_up;

/// The requests of a run.
pub struct Workload {
    /// What is decoded.
    pub sequences: Vec<SequenceRequest>,
    /// Texts for predictors; none where prompts are random tokens.
    pub prompts: Option<Vec<Prompt>>,
    /// The true largest lengths, where they are known.
    pub largest: Option<Vec<u32>>,
}

/// Reads or makes the requests.
///
/// # Errors
/// A file cannot be read, or a request has no recorded length.
pub fn workload(global: &Global, args: &BenchArgs, decoder: &LocalDecoder) -> anyhow::Result<Workload> {
    let num = args.num.map_or(usize::MAX, NonZeroUsize::get);
    let mut records = args
        .replay
        .as_deref()
        .map(read_lengths)
        .transpose()?
        .unwrap_or_default();
    for sample in records.iter_mut().flat_map(|r| &mut r.samples) {
        sample.tokens = sample.tokens.div_ceil(args.divide_lengths);
    }
    match &args.input {
        Some(path) => {
            let mut instructions = read_instructions(path)?;
            instructions.truncate(num);
            from_instructions(global, args, decoder, &instructions, &records)
        }
        None => {
            records.truncate(num);
            random_prompts(global, args, decoder.model(), &records)
        }
    }
}

/// The instructions' prompts; lengths by id where they are replayed.
fn from_instructions(
    global: &Global,
    args: &BenchArgs,
    decoder: &LocalDecoder,
    instructions: &[InstructionRecord],
    replay: &[LengthRecord],
) -> anyhow::Result<Workload> {
    let cap = args.schedule.max_new_tokens;
    let recorded: HashMap<&RequestId, &LengthRecord> = replay.iter().map(|r| (&r.id, r)).collect();
    let sequence = |record: &InstructionRecord| {
        let request = Request {
            id: record.id.clone(),
            prompt: record.prompt.clone(),
            max_new_tokens: cap,
            sampling: SamplingParams {
                seed: global.seed,
                ..SamplingParams::GREEDY
            },
        };
        let mut sequence = decoder.tokenize(&request)?;
        if args.replay.is_some() {
            let lengths = recorded
                .get(&record.id)
                .with_context(|| format!("no recorded length for {}", record.id))?;
            sequence.replay_tokens = Some(actual_length(lengths, &args.actual)?.clamp(1, cap));
        }
        Ok(sequence)
    };
    let source = args.lengths.as_deref().or(args.replay.as_deref());
    let ids: Vec<RequestId> = instructions.iter().map(|r| r.id.clone()).collect();
    let table = |path: &Path| look_up(&largest_lengths(path, cap)?, &ids, path);
    Ok(Workload {
        sequences: instructions.iter().map(sequence).collect::<anyhow::Result<_>>()?,
        prompts: Some(instructions.iter().map(|r| r.prompt.clone()).collect()),
        largest: source.map(table).transpose()?,
    })
}

/// A request as another engine is given it.
pub fn exported(sequence: &SequenceRequest) -> String {
    let value = serde_json::json!({
        "id": sequence.id.as_str(),
        "prompt": sequence.prompt,
        "tokens": sequence.replay_tokens,
    });
    format!("{value}\n")
}

/// Prompts of random tokens, as long as real ones: what they say does not matter where lengths are replayed.
fn random_prompts(
    global: &Global,
    args: &BenchArgs,
    model: &LoadedModel,
    replay: &[LengthRecord],
) -> anyhow::Result<Workload> {
    let &[shortest, longest] = args.prompt_tokens.as_slice() else {
        bail!("--prompt-tokens takes two numbers")
    };
    if shortest == 0 || shortest > longest {
        bail!("--prompt-tokens are {shortest} and {longest}: the first must be at least 1 and not above the second");
    }
    let cap = args.schedule.max_new_tokens;
    let mut rng = ChaCha8Rng::seed_from_u64(global.seed);
    let vocab = model.network.config().vocab_size as u32;
    let mut sequence = |record: &LengthRecord| {
        let tokens = rng.random_range(shortest..=longest);
        Ok(SequenceRequest {
            id: record.id.clone(),
            prompt: (0..tokens).map(|_| rng.random_range(0..vocab)).collect(),
            max_new_tokens: cap,
            sampling: SamplingParams::GREEDY,
            replay_tokens: Some(actual_length(record, &args.actual)?.clamp(1, cap)),
        })
    };
    Ok(Workload {
        sequences: replay.iter().map(&mut sequence).collect::<anyhow::Result<_>>()?,
        prompts: None,
        largest: Some(replay.iter().map(|r| r.largest().min(cap)).collect()),
    })
}

/// That as many sequences as each batch size says can be in the KV cache at once.
///
/// # Errors
/// Not even the shortest can: a batch would never be that large. Where only the longest cannot, a warning says so.
pub fn check_sizes(engine: &Engine, sequences: &[SequenceRequest], sizes: &[usize]) -> anyhow::Result<()> {
    let capacity = engine.cache_tokens();
    let need = |sequence: &SequenceRequest| {
        let answer = sequence.replay_tokens.map_or(1, |tokens| tokens as usize);
        let answer = answer.min(engine.longest_answer(sequence));
        (sequence.prompt.len() + answer).next_multiple_of(BLOCK_TOKENS)
    };
    let mut needs: Vec<usize> = sequences.iter().map(need).collect();
    needs.sort_unstable();
    for &size in sizes {
        if needs.iter().take(size).sum::<usize>() > capacity {
            let held = fitting(&needs, capacity);
            bail!(
                "--batch-sizes: {size} sequences never fit the KV cache of {capacity} tokens, the shortest {held} do: \
                 leave {size} out or raise --kv-cache-tokens"
            );
        }
        if needs.iter().rev().take(size).sum::<usize>() > capacity {
            tracing::warn!(
                "{size} of the longest requests do not fit the KV cache of {capacity} tokens: such a batch is cut, or \
                 waits for room"
            );
        }
    }
    Ok(())
}

/// How many of the sorted needs fit together.
fn fitting(needs: &[usize], capacity: usize) -> usize {
    let sums = needs.iter().scan(0, |sum, need| {
        *sum += need;
        Some(*sum)
    });
    sums.take_while(|sum| *sum <= capacity).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shortest_fill_the_cache_first() {
        assert_eq!(fitting(&[16, 32, 48], 95), 2);
        assert_eq!(
            (fitting(&[16, 32, 48], 96), fitting(&[16], 8), fitting(&[], 8)),
            (3, 0, 0)
        );
    }
}
