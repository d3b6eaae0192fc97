//! The launches of a training pass' attention.

use candle_core::{DType, Result};

use super::attention::TILE_HEAD_DIMS;
use super::{ATTEND_THREADS, Kernels};
use crate::gpu::work::{Address, Arg};
use crate::ops::AttentionShape;

/// `OWN_ROWS` and `OTHER_ROWS`: of the f32 kernels.
const ROWS: (usize, usize) = (32, 16);

/// `MMA_OWN_ROWS`: of those on tensor cores.
const MMA_ROWS: usize = 64;

/// Sizes of the heads of very small models, in f32.
const SMALL_HEAD_DIMS: [usize; 2] = [8, 12];

/// Queries, or keys, of a tile.
pub(crate) fn packed_tile(dtype: DType) -> usize {
    if dtype == DType::F32 { ROWS.0 } else { MMA_ROWS }
}

/// `MMA_BACKWARD_ROWS`.
const MMA_OTHER_ROWS: usize = 32;

/// Bytes of shared memory of a block.
fn shared_bytes(dtype: DType, head_dim: usize) -> usize {
    let (own, other) = ROWS;
    match dtype {
        DType::F32 => ((2 * own + other) * (head_dim + 1) + 2 * own * (other + 1)) * size_of::<f32>(),
        _ => 6 * MMA_ROWS * head_dim + 12 * MMA_OTHER_ROWS,
    }
}

/// Tiles of queries or of keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiles {
    /// `[count, 4]` words, as `training_attention.cuh` says.
    pub words: Address,
    pub count: usize,
}

/// What attention of packed sequences reads, positions turned in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packed {
    /// `[queries, heads * head_dim]`.
    pub q: Address,
    /// Rows of `kv_heads * head_dim`, and the elements from one to the next.
    pub k: Address,
    pub k_stride: usize,
    pub v: Address,
    /// Of the values, and of the gradients of keys and values.
    pub kv_stride: usize,
    /// `[queries]`, positions in their sequences.
    pub query_positions: Address,
    /// `[tokens]`, likewise.
    pub positions: Address,
    pub query_tiles: Tiles,
    pub key_tiles: Tiles,
    pub queries: usize,
    pub shape: AttentionShape,
}

/// What the gradients need besides, and where they go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PackedGrads {
    /// Of attention's output, and that output; as the queries.
    pub grad: Address,
    pub out: Address,
    /// `[queries, heads]` f32.
    pub log_sums: Address,
    /// Room for `[queries, heads]` f32.
    pub deltas: Address,
    /// As the queries, keys and values.
    pub dq: Address,
    pub dk: Address,
    pub dv: Address,
}

impl Packed {
    fn args(&self, tiles: Tiles) -> Vec<Arg> {
        vec![
            Arg::Pointer(self.q),
            Arg::Pointer(self.k),
            Arg::Pointer(self.v),
            Arg::Pointer(tiles.words),
            Arg::Pointer(self.query_positions),
            Arg::Pointer(self.positions),
            Arg::Int(self.shape.heads as i32),
            Arg::Int(self.shape.kv_heads as i32),
            Arg::Int(self.k_stride as i32),
            Arg::Int(self.kv_stride as i32),
            Arg::Int(self.shape.window.unwrap_or(0) as i32),
            Arg::Float(self.shape.scale()),
        ]
    }
}

impl Kernels<'_> {
    /// Whether there are kernels of packed attention for heads of this size.
    pub fn has_packed(dtype: DType, head_dim: usize) -> bool {
        TILE_HEAD_DIMS.contains(&head_dim) || (dtype == DType::F32 && SMALL_HEAD_DIMS.contains(&head_dim))
    }

    /// Attention of every query to its sequence's tokens up to itself.
    ///
    /// - `out`: as the queries; `log_sums`: `[queries, heads]` f32
    ///
    /// # Safety
    /// The addresses hold what is said here and at the fields.
    pub unsafe fn packed_forward(&self, packed: &Packed, out: Address, log_sums: Address) -> Result<()> {
        let mut args = packed.args(packed.query_tiles);
        args.extend([Arg::Pointer(out), Arg::Pointer(log_sums)]);
        let grid = (packed.query_tiles.count, packed.shape.heads, 1);
        // SAFETY: the caller's promise.
        unsafe { self.launch_packed("packed_forward", packed, grid, &args) }
    }

    /// The gradients of queries, keys and values.
    ///
    /// # Safety
    /// The addresses hold what is said at the fields.
    pub unsafe fn packed_backward(&self, packed: &Packed, grads: &PackedGrads) -> Result<()> {
        let shape = packed.shape;
        let deltas = [
            Arg::Pointer(grads.deltas),
            Arg::Pointer(grads.grad),
            Arg::Pointer(grads.out),
            Arg::Int(shape.heads as i32),
            Arg::Int(shape.head_dim as i32),
        ];
        let read = [grads.grad, grads.log_sums, grads.deltas].map(Arg::Pointer);
        let mut of_queries = packed.args(packed.query_tiles);
        of_queries.push(Arg::Pointer(grads.dq));
        of_queries.extend(read);
        let mut of_keys = packed.args(packed.key_tiles);
        of_keys.extend([Arg::Pointer(grads.dk), Arg::Pointer(grads.dv)]);
        of_keys.extend(read);
        let heads = (packed.queries, shape.heads.div_ceil(4), 1);
        let (queries, keys) = (packed.query_tiles.count, packed.key_tiles.count);
        // SAFETY: the caller's promise.
        unsafe {
            self.launch("packed_deltas", heads, ATTEND_THREADS, 0, &deltas)?;
            self.launch_packed("packed_grad_queries", packed, (queries, shape.heads, 1), &of_queries)?;
            self.launch_packed("packed_grad_keys", packed, (keys, shape.kv_heads, 1), &of_keys)
        }
    }

    /// # Safety
    /// As the callers'.
    unsafe fn launch_packed(
        &self,
        name: &str,
        packed: &Packed,
        grid: (usize, usize, usize),
        args: &[Arg],
    ) -> Result<()> {
        let shared = shared_bytes(self.dtype, packed.shape.head_dim);
        let name = format!("{name}/d{}", packed.shape.head_dim);
        // SAFETY: the caller's promise.
        unsafe { self.launch(&name, grid, ATTEND_THREADS, shared as u32, args) }
    }
}
