//! The kernels as functions: each computes its grid and passes its arguments in the order that `model/kernels` declares.
//!
//! All addresses are of the device; T is the model's dtype.

mod attention;
mod few_rows;
mod packed_attention;
mod training;

use candle_core::{DType, Result};

use super::Gpu;
use super::work::{Address, Arg, Gemm, Launch, Side, suffix};
use crate::ops::AttentionShape;

pub(crate) use attention::{AttendInputs, SingleRows};
#[cfg(test)]
pub(crate) use few_rows::FewRowsTile;
pub(crate) use few_rows::{Epilogue, FEW_ROWS_SIZES, Outputs, Product};
pub(crate) use packed_attention::{Packed, PackedGrads, Tiles, packed_tile};
pub(crate) use training::{Drop, Factor, Heads};

/// Threads of a block that works through a row.
const ROW_THREADS: u32 = 256;
/// `ATTEND_ROWS_THREADS` and `ATTEND_TILES_THREADS`.
const ATTEND_THREADS: u32 = 128;
/// `LOW_RANK_ROWS` and `LOW_RANK_AT_ONCE`.
const LOW_RANK: (usize, usize) = (4, 8);
/// Most threads that draw a row's token.
const SAMPLE_THREADS: usize = 1024;
/// Launches for one model.
#[derive(Clone, Copy)]
pub(crate) struct Kernels<'a> {
    pub gpu: &'a Gpu,
    pub dtype: DType,
}

/// A layer's keys and values, `[slots, kv_heads * head_dim]` each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CacheLayer {
    pub keys: Address,
    pub values: Address,
}

/// What [`Kernels::rope_cache`] reads besides the row.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RopeInputs {
    /// `[positions, head_dim / 2]` f32.
    pub cos: Address,
    pub sin: Address,
    pub positions: Address,
    pub slots: Address,
    /// `[(heads + 2 kv_heads) * head_dim]`, or 0.
    pub bias: Address,
    /// `[head_dim]` each, or 0.
    pub q_norm: Address,
    pub k_norm: Address,
    pub eps: f32,
}

impl Kernels<'_> {
    /// # Safety
    /// As [`Gpu::launch`]; `grid` and `args` must be the kernel's.
    unsafe fn launch(
        &self,
        name: &str,
        grid: (usize, usize, usize),
        threads: u32,
        shared: u32,
        args: &[Arg],
    ) -> Result<()> {
        let grid = [grid.0 as u32, grid.1 as u32, grid.2 as u32];
        if grid.contains(&0) {
            return Ok(());
        }
        let kernel = match name {
            "sample" | "term_sum" => name.to_owned(),
            // A suffix of the kernel's own comes behind that of the dtype.
            _ => match name.split_once('/') {
                Some((name, own)) => format!("{name}_{}_{own}", suffix(self.dtype)?),
                None => format!("{name}_{}", suffix(self.dtype)?),
            },
        };
        let launch = Launch {
            kernel: &kernel,
            grid,
            threads,
            shared,
            args,
        };
        // SAFETY: the caller's promise.
        unsafe { self.gpu.launch(&launch) }
    }

    /// Elements that a thread loads at once.
    fn pack(&self) -> usize {
        16 / self.dtype.size_in_bytes()
    }

    /// `out[r] = table[tokens[r]]`, a token of an earlier pass taken from `drawn`.
    ///
    /// # Safety
    /// The addresses hold `[rows, width]`, the table, `[rows]` tokens within it, and what those take from `drawn`.
    pub unsafe fn embed(
        &self,
        out: Address,
        table: Address,
        tokens: Address,
        drawn: Address,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        let args = [
            Arg::Pointer(out),
            Arg::Pointer(table),
            Arg::Pointer(tokens),
            Arg::Pointer(drawn),
            Arg::Int(width as i32),
        ];
        // SAFETY: the caller's promise.
        unsafe { self.launch("embed", (rows, 1, 1), ROW_THREADS, 0, &args) }
    }

    /// `out[r] = x[wanted[r]]`, of any width.
    ///
    /// # Safety
    /// The addresses hold `[rows, width]`, the rows that are wanted, and `[rows]`.
    pub unsafe fn gather_rows(
        &self,
        out: Address,
        x: Address,
        wanted: Address,
        rows: usize,
        width: usize,
    ) -> Result<()> {
        let args = [
            Arg::Pointer(out),
            Arg::Pointer(x),
            Arg::Pointer(wanted),
            Arg::Int(width as i32),
        ];
        // SAFETY: the caller's promise.
        unsafe { self.launch("gather_rows", (rows, 1, 1), ROW_THREADS, 0, &args) }
    }

    /// RMSNorm of every row.
    ///
    /// # Safety
    /// The addresses hold `[rows, width]`, `[rows, width]` and `[width]`.
    pub unsafe fn rms_norm(
        &self,
        out: Address,
        x: Address,
        w: Address,
        rows: usize,
        width: usize,
        eps: f32,
    ) -> Result<()> {
        let args = [
            Arg::Pointer(out),
            Arg::Pointer(x),
            Arg::Pointer(w),
            Arg::Int(width as i32),
            Arg::Float(eps),
        ];
        // SAFETY: the caller's promise.
        unsafe { self.launch("rms_norm", (rows, 1, 1), ROW_THREADS, 0, &args) }
    }

    /// Biases, head norms and positions into the queries where they lie, keys and values into the cache.
    ///
    /// # Safety
    /// `qkv` holds `[rows, (heads + 2 kv_heads) * head_dim]`, the inputs and the cache what their fields say.
    pub unsafe fn rope_cache(
        &self,
        qkv: Address,
        cache: CacheLayer,
        inputs: &RopeInputs,
        rows: usize,
        shape: AttentionShape,
    ) -> Result<()> {
        let args = [
            Arg::Pointer(qkv),
            Arg::Pointer(cache.keys),
            Arg::Pointer(cache.values),
            Arg::Pointer(inputs.cos),
            Arg::Pointer(inputs.sin),
            Arg::Pointer(inputs.positions),
            Arg::Pointer(inputs.slots),
            Arg::Pointer(inputs.bias),
            Arg::Pointer(inputs.q_norm),
            Arg::Pointer(inputs.k_norm),
            Arg::Int(shape.heads as i32),
            Arg::Int(shape.kv_heads as i32),
            Arg::Int(shape.head_dim as i32),
            Arg::Float(inputs.eps),
        ];
        // Four warps of a block take four heads.
        let heads = (shape.heads + 2 * shape.kv_heads).div_ceil(4);
        // SAFETY: the caller's promise.
        unsafe { self.launch("rope_cache", (rows, heads, 1), ATTEND_THREADS, 0, &args) }
    }

    /// `out = silu(gate) * up` of rows that hold both, gate first.
    ///
    /// # Safety
    /// The addresses hold `[rows, width]` and `[rows, 2 * width]`.
    pub unsafe fn swiglu(&self, out: Address, gate_up: Address, rows: usize, width: usize) -> Result<()> {
        let args = [Arg::Pointer(out), Arg::Pointer(gate_up), Arg::Int(width as i32)];
        let parts = width.div_ceil(ROW_THREADS as usize * self.pack());
        // SAFETY: the caller's promise.
        unsafe { self.launch("swiglu", (rows, parts, 1), ROW_THREADS, 0, &args) }
    }

    /// `out[r] += scale[r] * b a x[r]` on rows whose scale is not 0.
    ///
    /// - `low`: room for `[rows, rank]` f32
    ///
    /// # Safety
    /// `out` holds rows of `term.outputs`, `term.out_stride` apart; `x` those of `term.inputs`; `scales` `[rows]` f32; the
    /// factors what their fields say.
    pub unsafe fn add_low_rank(
        &self,
        out: Address,
        x: Address,
        low: Address,
        scales: Address,
        rows: usize,
        term: &LowRank,
    ) -> Result<()> {
        let down = [
            Arg::Pointer(low),
            Arg::Pointer(x),
            Arg::Pointer(term.a),
            Arg::Pointer(scales),
            Arg::Int(rows as i32),
            Arg::Int(term.inputs as i32),
            Arg::Int(term.rank as i32),
        ];
        let grid = (rows.div_ceil(LOW_RANK.0), term.rank.div_ceil(LOW_RANK.1), 1);
        let up = [
            Arg::Pointer(out),
            Arg::Pointer(low),
            Arg::Pointer(term.b),
            Arg::Pointer(scales),
            Arg::Int(rows as i32),
            Arg::Int(term.outputs as i32),
            Arg::Int(term.out_stride as i32),
            Arg::Int(term.rank as i32),
        ];
        let parts = term.outputs.div_ceil(ROW_THREADS as usize);
        // SAFETY: the caller's promise.
        unsafe {
            self.launch("low_rank_down", grid, ROW_THREADS, 0, &down)?;
            self.launch("low_rank_up", (grid.0, parts, 1), ROW_THREADS, 0, &up)
        }
    }

    /// Draws the token of every row that wants one.
    ///
    /// # Safety
    /// The addresses hold `[rows]`, `[rows, vocab]` f32 and the rows' draws.
    pub unsafe fn sample(
        &self,
        drawn: Address,
        logits: Address,
        draws: Address,
        rows: usize,
        vocab: usize,
    ) -> Result<()> {
        let args = [
            Arg::Pointer(drawn),
            Arg::Pointer(logits),
            Arg::Pointer(draws),
            Arg::Int(vocab as i32),
        ];
        let threads = (vocab / 8).next_power_of_two().clamp(32, SAMPLE_THREADS) as u32;
        // SAFETY: the caller's promise.
        unsafe { self.launch("sample", (rows, 1, 1), threads, 0, &args) }
    }

    /// A product by cuBLAS, of what is not gated.
    ///
    /// # Safety
    /// The addresses hold what is said at the product's fields.
    pub unsafe fn blas(&self, product: &Product) -> Result<()> {
        let gemm = Gemm {
            out: product.out,
            x: product.x,
            w: product.w,
            side: Side::Transposed,
            rows: product.rows,
            outputs: product.outputs,
            inputs: product.inputs,
            accumulate: product.epilogue == Epilogue::Add,
            dtype: self.dtype,
            out_dtype: match product.epilogue {
                Epilogue::F32 => DType::F32,
                _ => self.dtype,
            },
        };
        // SAFETY: the caller's promise.
        unsafe { self.gpu.gemm(&gemm) }
    }

    /// `out = x wᵀ`, or added to `out`, all in the model's dtype.
    ///
    /// # Safety
    /// As [`Kernels::blas`].
    pub unsafe fn linear(
        &self,
        out: Address,
        x: Address,
        w: Address,
        (rows, outputs, inputs): (usize, usize, usize),
        accumulate: bool,
    ) -> Result<()> {
        let product = Product {
            out,
            x,
            w,
            rows,
            outputs,
            inputs,
            epilogue: if accumulate { Epilogue::Add } else { Epilogue::Store },
        };
        // SAFETY: the caller's promise.
        unsafe { self.blas(&product) }
    }

    /// `out = grad w`, or added to `out`: what `grad` of [`Kernels::linear`]'s output is for its input.
    ///
    /// - `grad`: `[rows, outputs]`; `w`: `[outputs, inputs]`; `out`: `[rows, inputs]`
    ///
    /// # Safety
    /// As [`Gpu::gemm`].
    pub unsafe fn linear_grad(
        &self,
        out: Address,
        grad: Address,
        w: Address,
        (rows, outputs, inputs): (usize, usize, usize),
        accumulate: bool,
    ) -> Result<()> {
        let gemm = Gemm {
            out,
            x: grad,
            w,
            side: Side::Plain,
            rows,
            outputs: inputs,
            inputs: outputs,
            accumulate,
            dtype: self.dtype,
            out_dtype: self.dtype,
        };
        // SAFETY: the caller's promise.
        unsafe { self.gpu.gemm(&gemm) }
    }
}

/// An adapter's factors of one linear layer, f32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LowRank {
    /// `[rank, inputs]`.
    pub a: Address,
    /// `[outputs, rank]`.
    pub b: Address,
    pub rank: usize,
    pub inputs: usize,
    pub outputs: usize,
    /// Elements from one row of the output to the next.
    pub out_stride: usize,
}
