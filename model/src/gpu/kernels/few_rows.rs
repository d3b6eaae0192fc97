//! The launch of products of few rows.

use candle_core::{Result, bail};

use super::Kernels;
use crate::gpu::work::{Address, Arg};

/// Numbers of rows that the kernel is compiled for.
pub(crate) const FEW_ROWS_SIZES: [usize; 3] = [8, 16, 32];

/// `FEW_ROWS_WARPS`, `FEW_ROWS_STEP`, and bytes of a warp's steps of the weight.
const WARPS: usize = 8;
const STEP: usize = 32;
const WEIGHT_BYTES: usize = 8 << 10;

/// What becomes of a product's sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Epilogue {
    /// They are `out`.
    Store,
    /// They are added to `out`.
    Add,
    /// They are `out` in f32.
    F32,
    /// Of gate and up, one behind the other: `silu(gate) * up` is `out`.
    Gated,
}

impl Epilogue {
    /// `FEW_ROWS_ADD`, `FEW_ROWS_F32` and `FEW_ROWS_GATED`.
    fn bits(self) -> i32 {
        match self {
            Self::Store => 0,
            Self::Add => 1,
            Self::F32 => 2,
            Self::Gated => 4,
        }
    }
}

/// A product of rows with a weight, `x wᵀ`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product {
    /// `[rows, outputs]`.
    pub out: Address,
    /// `[rows, inputs]`.
    pub x: Address,
    /// `[outputs, inputs]`; where gated, gate and up, each of that shape, one behind the other.
    pub w: Address,
    pub rows: usize,
    pub outputs: usize,
    pub inputs: usize,
    pub epilogue: Epilogue,
}

/// How such a product lies in a block's shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FewRowsTile {
    /// Outputs that a block computes at once; those of gate and up are counted alone.
    pub outputs: Outputs,
    /// x stays in shared memory from a block's first tile on.
    pub x_kept: bool,
}

/// Rows of the weight that a block takes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outputs {
    Sixteen,
    ThirtyTwo,
}

impl Outputs {
    pub fn count(self) -> usize {
        match self {
            Self::Sixteen => 16,
            Self::ThirtyTwo => 32,
        }
    }
}

impl Product {
    /// Rows that the kernel computes for these; the most that it has for more.
    fn padded_rows(&self) -> usize {
        let [sizes @ .., most] = FEW_ROWS_SIZES;
        sizes.into_iter().find(|size| self.rows <= *size).unwrap_or(most)
    }

    /// Tiles of the output.
    fn tiles(&self, outputs: Outputs) -> usize {
        let width = match self.epilogue {
            Epilogue::Gated => outputs.count() / 2,
            _ => outputs.count(),
        };
        self.outputs.div_ceil(width)
    }

    /// Bytes of shared memory of a block, as `few_rows` lays it out.
    fn shared(&self, tile: FewRowsTile) -> usize {
        let (rows, outputs) = (self.padded_rows(), tile.outputs.count());
        let x_steps = match tile.x_kept {
            true => self.inputs.div_ceil(STEP),
            false => WARPS * WEIGHT_BYTES / (outputs * STEP * 2),
        };
        let sums = 2 * WARPS * rows * outputs * size_of::<f32>();
        WARPS * WEIGHT_BYTES + x_steps * rows * STEP * 2 + sums
    }
}

impl Kernels<'_> {
    /// How a block takes a product's x: kept where a block has several tiles and room; `None` where there is no room at all.
    pub fn few_rows_tile(&self, product: &Product, outputs: Outputs) -> Option<FewRowsTile> {
        let several = product.tiles(outputs) > self.gpu.multiprocessors();
        [true, false]
            .into_iter()
            .filter(|kept| !kept || several)
            .map(|x_kept| FewRowsTile { outputs, x_kept })
            .find(|tile| product.shared(*tile) <= self.gpu.most_shared())
    }

    /// A product of at most as many rows as the last of [`FEW_ROWS_SIZES`], in a dtype of 16 bits.
    ///
    /// # Safety
    /// The addresses hold what is said at the fields; x and w are aligned to 16 bytes, and so are their rows.
    pub unsafe fn few_rows(&self, product: &Product, tile: FewRowsTile) -> Result<()> {
        if product.rows > product.padded_rows() || self.dtype.size_in_bytes() != 2 {
            bail!("no product of {} rows in {}", product.rows, self.dtype.as_str());
        }
        let args = [
            Arg::Pointer(product.out),
            Arg::Pointer(product.x),
            Arg::Pointer(product.w),
            Arg::Int(product.rows as i32),
            Arg::Int(product.outputs as i32),
            Arg::Int(product.inputs as i32),
            Arg::Int(product.epilogue.bits()),
            Arg::Int(tile.x_kept.into()),
        ];
        let name = format!("few_rows/r{}_o{}", product.padded_rows(), tile.outputs.count());
        // A block on each multiprocessor: each has the memory of a whole one.
        let blocks = product.tiles(tile.outputs).min(self.gpu.multiprocessors());
        let shared = product.shared(tile) as u32;
        // SAFETY: the caller's promise.
        unsafe { self.launch(&name, (blocks, 1, 1), 32 * WARPS as u32, shared, &args) }
    }
}
