//! Reading fixtures, and running a network over their rows with a cache.

use std::collections::HashMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device, Tensor};
use lengthwise_model::{Adapter, BlockTable, KvCache, Llama, ModelConfig, Segment, Weights};

/// Of one logit; they go up to 16, and PyTorch differs from itself by 1e-5 with another number of threads.
pub const TOLERANCE: f32 = 1e-4;

pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures")).join(name)
}

pub fn tensors(file: &str) -> Result<HashMap<String, Tensor>> {
    candle_core::safetensors::load(fixture(file), &Device::Cpu).with_context(|| file.to_owned())
}

pub fn tensor<'a>(tensors: &'a HashMap<String, Tensor>, name: &str) -> Result<&'a Tensor> {
    tensors.get(name).with_context(|| format!("the fixture has no {name}"))
}

pub fn model(name: &str) -> Result<Llama> {
    let folder = fixture(name);
    let config = ModelConfig::from_folder(&folder)?;
    Ok(Llama::new(&config, &Weights::open(&folder, DType::F32, &Device::Cpu)?)?)
}

/// The network whose training passes take the path that this build tests: the GPU's kernels on their emulator, or the
/// CPU's own.
pub fn trained(name: &str) -> Result<Llama> {
    let llama = model(name)?;
    #[cfg(feature = "kernel-emulation")]
    let llama = llama.trained_on_emulator()?;
    Ok(llama)
}

/// A `[rows, longest]` tensor of integers, each row cut to its length.
pub fn cut(tensors: &HashMap<String, Tensor>, name: &str) -> Result<Vec<Vec<i64>>> {
    let lengths = tensor(tensors, "lengths")?.to_vec1::<i64>()?;
    let mut rows = tensor(tensors, name)?.to_vec2::<i64>()?;
    for (row, length) in rows.iter_mut().zip(&lengths) {
        row.truncate(*length as usize);
    }
    Ok(rows)
}

pub fn ids(rows: &[Vec<i64>]) -> Vec<Vec<u32>> {
    let id = |id: &i64| u32::try_from(*id).expect("token ids are small and not negative");
    rows.iter().map(|row| row.iter().map(id).collect()).collect()
}

/// A reference.safetensors.
pub struct Reference {
    pub rows: Vec<Vec<u32>>,
    /// `[sum of lengths, vocab]`, one row behind the other.
    pub logits: Tensor,
    /// Empty for an adapter.
    pub greedy: Vec<Vec<u32>>,
}

impl Reference {
    pub fn read(folder: &str) -> Result<Self> {
        let tensors = tensors(&format!("{folder}/reference.safetensors"))?;
        let greedy = match tensors.get("greedy") {
            Some(greedy) => ids(&greedy.to_vec2::<i64>()?),
            None => Vec::new(),
        };
        Ok(Self {
            rows: ids(&cut(&tensors, "tokens")?),
            logits: tensor(&tensors, "logits")?.clone(),
            greedy,
        })
    }

    /// The logits after `position` of `row`, `[vocab]`.
    pub fn at(&self, row: usize, position: usize) -> Result<Tensor> {
        let before: usize = self.rows[..row].iter().map(Vec::len).sum();
        Ok(self.logits.get(before + position)?)
    }
}

/// Every element of `got` is within `tolerance` of `want`; NaN fails.
pub fn assert_close(got: &Tensor, want: &Tensor, tolerance: f32) -> Result<()> {
    ensure!(got.dims() == want.dims(), "{:?}, want {:?}", got.dims(), want.dims());
    let got = got.flatten_all()?.to_vec1::<f32>()?;
    let want = want.flatten_all()?.to_vec1::<f32>()?;
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        ensure!(
            (g - w).abs() <= tolerance,
            "element {i}: {g}, want {w} within {tolerance:e}"
        );
    }
    Ok(())
}

/// A cache of the path that this build tests: the GPU's kernels on their emulator, or the CPU's own.
fn cache(llama: &Llama) -> Result<KvCache> {
    #[cfg(feature = "kernel-emulation")]
    return Ok(KvCache::emulated(llama, 1024)?);
    #[cfg(not(feature = "kernel-emulation"))]
    Ok(KvCache::new(llama, 1024)?)
}

/// Sequences that grow in one cache. Blocks are taken as they are needed, so that those of the rows lie mixed.
pub struct Running<'a> {
    llama: &'a Llama,
    adapter: Option<&'a Adapter>,
    cache: KvCache,
    rows: Vec<(BlockTable, usize)>,
    /// The first token of each row that the adapter changes.
    adapted_from: Vec<usize>,
}

impl<'a> Running<'a> {
    pub fn new(llama: &'a Llama, adapter: Option<&'a Adapter>, rows: usize) -> Result<Self> {
        let cache = cache(llama)?;
        let rows = vec![(BlockTable::default(), 0); rows];
        Ok(Self {
            llama,
            adapter,
            cache,
            adapted_from: vec![0; rows.len()],
            rows,
        })
    }

    /// Feeds each named row some more tokens in one pass; the logits after the last of each, `[segments, vocab]`.
    pub fn feed(&mut self, more: &[(usize, &[u32])]) -> Result<Tensor> {
        for (row, tokens) in more {
            let (table, length) = &mut self.rows[*row];
            ensure!(self.cache.reserve(table, *length + tokens.len()), "the cache is full");
        }
        let segments: Vec<Segment> = more
            .iter()
            .map(|&(row, tokens)| Segment {
                tokens,
                start: self.rows[row].1,
                table: &self.rows[row].0,
                adapted_from: self.adapted_from[row].saturating_sub(self.rows[row].1),
            })
            .collect();
        let logits = self.llama.forward(&segments, &mut self.cache, self.adapter)?;
        let shape = (more.len(), self.llama.config().vocab_size);
        let logits = Tensor::from_slice(logits, shape, &Device::Cpu)?;
        for (row, tokens) in more {
            self.rows[*row].1 += tokens.len();
        }
        Ok(logits)
    }
}

/// Runs `rows` of the reference together, row `i` in chunks of `chunks[i]` tokens, and compares the logits after every
/// chunk.
pub fn assert_cached(
    llama: &Llama,
    adapter: Option<&Adapter>,
    reference: &Reference,
    rows: &[usize],
    chunks: &[usize],
) -> Result<()> {
    let mut running = Running::new(llama, adapter, rows.len())?;
    if let Some(adapter) = adapter {
        let from = |&row: &usize| adapter.config().active_from(&reference.rows[row]);
        running.adapted_from = rows.iter().map(from).collect();
    }
    let mut done = vec![0; rows.len()];
    while (0..rows.len()).any(|i| done[i] < reference.rows[rows[i]].len()) {
        let mut more = Vec::new();
        for (i, &row) in rows.iter().enumerate() {
            let tokens = &reference.rows[row];
            let end = (done[i] + chunks[i]).min(tokens.len());
            if done[i] < end {
                more.push((i, &tokens[done[i]..end]));
                done[i] = end;
            }
        }
        let logits = running.feed(&more)?;
        for (segment, &(i, _)) in more.iter().enumerate() {
            let want = reference.at(rows[i], done[i] - 1)?;
            assert_close(&logits.get(segment)?, &want, TOLERANCE).with_context(|| {
                let chunk = chunks[i];
                format!("row {} after {} tokens, {chunk} at a time", rows[i], done[i])
            })?;
        }
    }
    Ok(())
}

/// The logits of every position of every row, without a cache, against the reference: all rows packed, and each alone.
pub fn assert_uncached(llama: &Llama, adapter: Option<&Adapter>, reference: &Reference) -> Result<()> {
    let every = |rows: &[&[u32]]| -> Vec<u32> { (0..rows.iter().map(|r| r.len() as u32).sum()).collect() };
    let rows: Vec<&[u32]> = reference.rows.iter().map(Vec::as_slice).collect();
    let packed = llama.forward_train(&rows, &every(&rows), adapter, None)?;
    assert_close(&packed, &reference.logits, TOLERANCE).context("all rows packed")?;
    let mut start = 0;
    for (i, row) in rows.iter().enumerate() {
        let alone = llama.forward_train(&[row], &every(&[row]), adapter, None)?;
        let want = reference.logits.narrow(0, start, row.len())?;
        assert_close(&alone, &want, TOLERANCE).with_context(|| format!("row {i} alone"))?;
        start += row.len();
    }
    Ok(())
}
