//! Positions turned in, keys and values cached, and both attention kernels, on a cache whose blocks lie in disorder.

use std::sync::Arc;

use super::rows::addresses;
use super::tensor_cores::no_bank_conflicts;
use super::*;
use crate::gpu::kernels::{AttendInputs, CacheLayer, RopeInputs, SingleRows};
use crate::ops::{self, AttentionShape, RopeTable, attend_stock};

const BLOCK: usize = crate::BLOCK_TOKENS;

/// One sequence's blocks: its position `p` is in row `blocks[p / 16] * 16 + p % 16` of the cache.
const BLOCKS: [[u32; 8]; 2] = [[9, 3, 12, 0, 7, 5, 14, 1], [2, 15, 4, 8, 6, 10, 13, 11]];

fn slot(sequence: usize, position: usize) -> u32 {
    BLOCKS[sequence][position / BLOCK] * BLOCK as u32 + (position % BLOCK) as u32
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>) -> AttentionShape {
    AttentionShape {
        heads,
        kv_heads,
        head_dim,
        window,
    }
}

/// A cache of random keys and values.
struct Cache {
    keys: Tensor,
    values: Tensor,
}

impl Cache {
    fn new(shape: AttentionShape, dtype: DType, device: &Device) -> Result<Self> {
        let size = [16 * BLOCK, shape.kv_width()];
        Ok(Self {
            keys: values(&size, 20, dtype, device)?,
            values: values(&size, 21, dtype, device)?,
        })
    }

    fn layer(&self, gpu: &Gpu) -> Result<CacheLayer> {
        let [keys, values] = addresses(gpu, [&self.keys, &self.values])?;
        Ok(CacheLayer { keys, values })
    }

    /// What attention gives by candle's operations, in f32.
    fn reference(&self, q: &Tensor, sequence: usize, start: usize, shape: AttentionShape) -> Result<Tensor> {
        let end = start + q.dim(0)?;
        let slots: Vec<u32> = (0..end).map(|p| slot(sequence, p)).collect();
        let slots = Tensor::new(slots, &Device::Cpu)?;
        let gather = |cache: &Tensor| read(cache)?.index_select(&slots, 0);
        attend_stock(q, &gather(&self.keys)?, &gather(&self.values)?, start, shape)
    }
}

/// The queries of a packed row of queries, keys and values.
fn queries(qkv: &Tensor, rows: std::ops::Range<usize>, shape: AttentionShape) -> Result<Tensor> {
    read(qkv)?
        .narrow(0, rows.start, rows.len())?
        .narrow(1, 0, shape.q_width())?
        .contiguous()
}

#[test]
fn positions_are_turned_in_and_keys_and_values_cached() -> Result<()> {
    let table = Arc::new(RopeTable::new(&[1.0, 0.4, 0.1, 0.02, 0.7, 0.3, 0.05, 0.01], 40));
    let positions: Arc<[u32]> = Arc::new([0, 39, 7]);
    let slots = [5u32, 0, 100];
    on_each_device(|gpu, device| {
        for (dtype, tolerance) in DTYPES {
            for (bias, norm) in [(false, false), (true, false), (false, true)] {
                let shape = shape(4, 2, 16, None);
                let width = shape.q_width() + 2 * shape.kv_width();
                let before = values(&[3, width], 30, dtype, device)?;
                let (qkv, cache) = (before.copy()?, Cache::new(shape, dtype, device)?);
                let (cos, sin) = table.tensors(device)?;
                let (at, slots_at) = (words(&positions, device)?, words(&slots, device)?);
                let biases = values(&[width], 31, dtype, device)?;
                let (q_norm, k_norm) = (values(&[16], 32, dtype, device)?, values(&[16], 33, dtype, device)?);
                let given = |tensor: &Tensor, is: bool| if is { gpu.address(tensor) } else { Ok(0) };
                let inputs = RopeInputs {
                    cos: gpu.address(&cos)?,
                    sin: gpu.address(&sin)?,
                    positions: gpu.address(&at)?,
                    slots: gpu.address(&slots_at)?,
                    bias: given(&biases, bias)?,
                    q_norm: given(&q_norm, norm)?,
                    k_norm: given(&k_norm, norm)?,
                    eps: 1e-5,
                };
                // SAFETY: the tensors have the shapes that the kernel reads and writes.
                unsafe { kernels(gpu, dtype).rope_cache(gpu.address(&qkv)?, cache.layer(gpu)?, &inputs, 3, shape)? };

                let mut row = read(&before)?;
                if bias {
                    row = row.broadcast_add(&read(&biases)?)?;
                }
                let heads = |start: usize, n: usize, weight: &Tensor| -> Result<Tensor> {
                    let mut x = row.narrow(1, start, n * 16)?.reshape((3, n, 16))?.contiguous()?;
                    if norm {
                        x = ops::rms_norm(&x, &read(weight)?, 1e-5)?;
                    }
                    ops::rope(&x, &positions, &table)?.reshape((3, n * 16))
                };
                let stored = Tensor::new(&slots, &Device::Cpu)?;
                let tolerance = 4.0 * tolerance;
                assert_close(&queries(&qkv, 0..3, shape)?, &heads(0, 4, &q_norm)?, tolerance)?;
                assert_close(
                    &read(&cache.keys)?.index_select(&stored, 0)?,
                    &heads(64, 2, &k_norm)?,
                    tolerance,
                )?;
                let values = row.narrow(1, 96, 32)?;
                assert_close(&read(&cache.values)?.index_select(&stored, 0)?, &values, tolerance)?;
            }
        }
        Ok(())
    })
}

#[test]
fn single_rows_attend_as_the_reference_does() -> Result<()> {
    // Each row's sequence and position: a first token, within a block, at a block's end, far on.
    let rows = [(0usize, 0usize), (1, 17), (0, 31), (1, 127)];
    on_each_device(|gpu, device| {
        for (dtype, tolerance) in DTYPES {
            for (heads, kv_heads, head_dim, window, splits) in [
                (2, 2, 16, None, 1),
                (2, 2, 16, None, 4),
                (4, 2, 32, Some(20), 1),
                (8, 2, 64, None, 2),
                (8, 1, 24, None, 1),
                (7, 1, 128, Some(5), 4),
                (3, 1, 48, None, 1),
            ] {
                let shape = shape(heads, kv_heads, head_dim, window);
                let cache = Cache::new(shape, dtype, device)?;
                let qkv = values(&[4, shape.q_width() + 2 * shape.kv_width()], 40, dtype, device)?;
                let out = zeros(&[4, shape.q_width()], dtype, device)?;
                let positions = words(&rows.map(|(_, p)| p as u32), device)?;
                let sequence = words(&rows.map(|(s, _)| s as u32), device)?;
                let tables = words(&BLOCKS.concat(), device)?;
                // Out of order, and one left out.
                let listed = words(&[3, 0, 2], device)?;
                let partial = zeros(&[3 * heads * splits * (head_dim + 2)], DType::F32, device)?;
                let inputs = AttendInputs {
                    out: gpu.address(&out)?,
                    qkv: gpu.address(&qkv)?,
                    positions: gpu.address(&positions)?,
                    sequence: gpu.address(&sequence)?,
                    tables: gpu.address(&tables)?,
                    table_stride: 8,
                };
                let singles = SingleRows {
                    rows: gpu.address(&listed)?,
                    count: 3,
                    splits,
                    partial: gpu.address(&partial)?,
                };
                // SAFETY: the tensors have the shapes that the kernels read and write.
                unsafe { kernels(gpu, dtype).attend_rows(&inputs, cache.layer(gpu)?, singles, shape)? };
                let out = read(&out)?;
                for row in [0, 2, 3] {
                    let (sequence, position) = rows[row];
                    let q = queries(&qkv, row..row + 1, shape)?;
                    let want = cache.reference(&q, sequence, position, shape)?;
                    assert_close(&out.narrow(0, row, 1)?, &want, tolerance)?;
                }
                assert_close(&out.narrow(0, 1, 1)?, &out.narrow(0, 1, 1)?.zeros_like()?, 0.0)?;
            }
        }
        Ok(())
    })
}

#[test]
fn tiles_attend_as_the_reference_does() -> Result<()> {
    // Sequence, first position and tokens: a prompt's first chunk of more than a tile and of less, and later chunks.
    let chunks = [(0usize, 0usize, 69usize), (1, 50, 78), (0, 80, 17), (1, 30, 5)];
    let rows: usize = chunks.iter().map(|(_, _, n)| n).sum();
    on_each_device(|gpu, device| {
        for (dtype, tolerance) in DTYPES {
            for (heads, kv_heads, head_dim, window) in [
                (2, 2, 16, None),
                (4, 2, 32, Some(20)),
                (2, 1, 64, Some(70)),
                (1, 1, 80, Some(3)),
                (1, 1, 96, None),
                (2, 2, 128, None),
            ] {
                let shape = shape(heads, kv_heads, head_dim, window);
                let cache = Cache::new(shape, dtype, device)?;
                let qkv = values(&[rows, shape.q_width() + 2 * shape.kv_width()], 50, dtype, device)?;
                let out = zeros(&[rows, shape.q_width()], dtype, device)?;
                let positions: Vec<u32> = chunks
                    .iter()
                    .flat_map(|(_, start, n)| *start as u32..(start + n) as u32)
                    .collect();
                let sequence: Vec<u32> = chunks.iter().flat_map(|(s, _, n)| vec![*s as u32; *n]).collect();
                let [positions, sequence] = [words(&positions, device)?, words(&sequence, device)?];
                let tables = words(&BLOCKS.concat(), device)?;
                let tile = Kernels::tile(head_dim, dtype).expect("a kernel for these heads");
                let (firsts, counts) = tiles(&chunks.map(|(_, _, n)| n), tile);
                let count = firsts.len();
                let (firsts, counts) = (words(&firsts, device)?, words(&counts, device)?);
                let inputs = AttendInputs {
                    out: gpu.address(&out)?,
                    qkv: gpu.address(&qkv)?,
                    positions: gpu.address(&positions)?,
                    sequence: gpu.address(&sequence)?,
                    tables: gpu.address(&tables)?,
                    table_stride: 8,
                };
                let [firsts, counts] = addresses(gpu, [&firsts, &counts])?;
                // SAFETY: the tensors have the shapes that the kernel reads and writes.
                unsafe { kernels(gpu, dtype).attend_tiles(&inputs, cache.layer(gpu)?, firsts, counts, count, shape)? };
                let mut row = 0;
                for (sequence, start, n) in chunks {
                    let q = queries(&qkv, row..row + n, shape)?;
                    let want = cache.reference(&q, sequence, start, shape)?;
                    assert_close(&read(&out)?.narrow(0, row, n)?, &want, tolerance)?;
                    row += n;
                }
                no_bank_conflicts(gpu);
            }
        }
        Ok(())
    })
}

/// The first row and the rows of each tile of chunks that follow one another.
fn tiles(chunks: &[usize], tile: usize) -> (Vec<u32>, Vec<u32>) {
    let mut first = 0;
    let mut tiles = Vec::new();
    for n in chunks {
        tiles.extend(
            (0..*n)
                .step_by(tile)
                .map(|at| ((first + at) as u32, tile.min(n - at) as u32)),
        );
        first += n;
    }
    tiles.into_iter().unzip()
}
