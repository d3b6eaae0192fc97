//! The launches of both attention kernels.

use candle_core::{DType, Result, bail};

use super::{ATTEND_THREADS, CacheLayer, Kernels};
use crate::gpu::work::{Address, Arg};
use crate::ops::AttentionShape;

/// Query heads of one kv head that the row kernel is compiled for.
const HEAD_GROUPS: [usize; 5] = [8, 7, 4, 2, 1];
/// Head sizes that the tile kernel is compiled for.
pub(super) const TILE_HEAD_DIMS: [usize; 6] = [16, 32, 64, 80, 96, 128];
/// Queries that one block of the f32 tile kernel takes, and as many keys at once (`TILE` in attend_tiles.cuh).
const TILE: usize = 32;
/// Those of the kernel on tensor cores (`MMA_QUERIES` and `MMA_KEYS` in attend_tiles_mma.cuh).
const MMA_TILE: usize = 64;

/// Where the rows of a pass find their sequences.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttendInputs {
    /// `[rows, heads * head_dim]`.
    pub out: Address,
    /// `[rows, (heads + 2 kv_heads) * head_dim]`.
    pub qkv: Address,
    pub positions: Address,
    pub sequence: Address,
    pub tables: Address,
    pub table_stride: usize,
}

/// Rows that attend alone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SingleRows {
    /// `[count]`: which.
    pub rows: Address,
    pub count: usize,
    /// Parts that each row's keys are shared out in.
    pub splits: usize,
    /// `[count, heads, splits, head_dim + 2]` f32, unused where `splits` is 1.
    pub partial: Address,
}

impl Kernels<'_> {
    /// Query heads that one block of the row kernel takes.
    pub fn head_group(shape: AttentionShape) -> usize {
        let per_kv_head = shape.heads / shape.kv_heads;
        HEAD_GROUPS
            .into_iter()
            .find(|g| per_kv_head.is_multiple_of(*g))
            .unwrap_or(1)
    }

    /// Attention of single rows.
    ///
    /// # Safety
    /// The addresses hold what is said at the fields.
    pub unsafe fn attend_rows(
        &self,
        inputs: &AttendInputs,
        cache: CacheLayer,
        singles: SingleRows,
        shape: AttentionShape,
    ) -> Result<()> {
        let SingleRows {
            rows,
            count,
            splits,
            partial,
        } = singles;
        let lanes = shape.head_dim.div_ceil(self.pack()).next_power_of_two();
        if lanes > 32 || !shape.head_dim.is_multiple_of(self.pack()) {
            bail!(
                "attention: heads of {} elements are not supported on the GPU",
                shape.head_dim
            );
        }
        let group = Self::head_group(shape);
        let args = [
            Arg::Pointer(inputs.out),
            Arg::Pointer(partial),
            Arg::Pointer(inputs.qkv),
            Arg::Pointer(cache.keys),
            Arg::Pointer(cache.values),
            Arg::Pointer(rows),
            Arg::Pointer(inputs.positions),
            Arg::Pointer(inputs.sequence),
            Arg::Pointer(inputs.tables),
            Arg::Int(inputs.table_stride as i32),
            Arg::Int(shape.heads as i32),
            Arg::Int(shape.kv_heads as i32),
            Arg::Int(shape.head_dim as i32),
            Arg::Int(lanes as i32),
            Arg::Int(shape.window.unwrap_or(0) as i32),
            Arg::Int(splits as i32),
            Arg::Float(base_two_scale(shape)),
        ];
        let shared = 4 * group * (shape.head_dim + 2) * size_of::<f32>();
        let grid = (count * (shape.heads / group), splits, 1);
        // SAFETY: the caller's promise.
        unsafe {
            self.launch(
                &format!("attend_rows/g{group}"),
                grid,
                ATTEND_THREADS,
                shared as u32,
                &args,
            )?
        };
        if splits == 1 {
            return Ok(());
        }
        let args = [
            Arg::Pointer(inputs.out),
            Arg::Pointer(partial),
            Arg::Pointer(rows),
            Arg::Int(shape.heads as i32),
            Arg::Int(shape.head_dim as i32),
            Arg::Int(splits as i32),
        ];
        // SAFETY: the caller's promise.
        unsafe { self.launch("merge_splits", (count, shape.heads, 1), ATTEND_THREADS, 0, &args) }
    }

    /// Queries that one block of the tile kernel takes, where there is one for heads of this size.
    pub fn tile(head_dim: usize, dtype: DType) -> Option<usize> {
        let tile = if dtype == DType::F32 { TILE } else { MMA_TILE };
        TILE_HEAD_DIMS.contains(&head_dim).then_some(tile)
    }

    /// Attention of tiles of up to [`Self::tile`] neighbouring rows of one sequence.
    ///
    /// - `tile_rows`, `tile_counts`: `[tiles]`, each tile's first row and its rows
    ///
    /// # Safety
    /// The addresses hold what is said here and at the inputs' fields.
    pub unsafe fn attend_tiles(
        &self,
        inputs: &AttendInputs,
        cache: CacheLayer,
        tile_rows: Address,
        tile_counts: Address,
        tiles: usize,
        shape: AttentionShape,
    ) -> Result<()> {
        let args = [
            Arg::Pointer(inputs.out),
            Arg::Pointer(inputs.qkv),
            Arg::Pointer(cache.keys),
            Arg::Pointer(cache.values),
            Arg::Pointer(tile_rows),
            Arg::Pointer(tile_counts),
            Arg::Pointer(inputs.positions),
            Arg::Pointer(inputs.sequence),
            Arg::Pointer(inputs.tables),
            Arg::Int(inputs.table_stride as i32),
            Arg::Int(shape.heads as i32),
            Arg::Int(shape.kv_heads as i32),
            Arg::Int(shape.window.unwrap_or(0) as i32),
            Arg::Float(base_two_scale(shape)),
        ];
        let shared = match self.dtype {
            DType::F32 => (2 * TILE * (shape.head_dim + 1) + TILE * (TILE + 1)) * size_of::<f32>(),
            // Queries, and two tiles each of keys and values.
            dtype => 5 * MMA_TILE * shape.head_dim * dtype.size_in_bytes(),
        };
        let name = format!("attend_tiles/d{}", shape.head_dim);
        // SAFETY: the caller's promise.
        unsafe { self.launch(&name, (tiles, shape.heads, 1), ATTEND_THREADS, shared as u32, &args) }
    }
}

/// The scores' scale for a softmax with base 2.
fn base_two_scale(shape: AttentionShape) -> f32 {
    shape.scale() * std::f32::consts::LOG2_E
}
