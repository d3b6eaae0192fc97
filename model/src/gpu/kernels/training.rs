//! The launches of a training pass' row kernels and low-rank terms.

use candle_core::Result;

use super::{ATTEND_THREADS, Kernels, ROW_THREADS};
use crate::gpu::work::{Address, Arg};

/// As in training_low_rank.cuh, by the same names: ranks that a thread has at once, rows of a block and of a part.
const TERM_AT_ONCE: usize = 8;
const TERM_DOWN_ROWS: usize = 8;
const TERM_UP_ROWS: usize = 16;
const TERM_PART_ROWS: usize = 128;
/// Columns of a thread there.
const TERM_COLUMNS: usize = 2;

/// Queries or keys of a pass, and what turns them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    /// As their linear layer gave them: `heads` heads to a row.
    pub raw: Address,
    /// Elements from one row to the next.
    pub raw_stride: usize,
    pub rows: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// `[rows]`.
    pub positions: Address,
    /// `[positions, head_dim / 2]` f32.
    pub cos: Address,
    pub sin: Address,
    /// `[head_dim]`, or 0.
    pub norm: Address,
    pub eps: f32,
}

/// Which inputs of a low-rank term are dropped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Drop {
    seed: u64,
    /// Of 2³² inputs so many are dropped.
    threshold: u32,
    scale: f32,
    /// `[rows]` u32: the rows' places in the forward pass; 0 where they are the rows themselves.
    rows: Address,
}

impl Drop {
    pub const NONE: Self = Self {
        seed: 0,
        threshold: 0,
        scale: 1.0,
        rows: 0,
    };

    pub fn new(probability: f64, seed: u64) -> Self {
        Self {
            seed,
            threshold: (probability * f64::from(u32::MAX)) as u32,
            scale: (1.0 / (1.0 - probability)) as f32,
            rows: 0,
        }
    }

    /// The same of these rows of the forward pass alone, or of all where that is 0.
    pub fn of_rows(self, rows: Address) -> Self {
        Self { rows, ..self }
    }

    fn args(self) -> [Arg; 5] {
        [
            Arg::Int(self.seed as i32),
            Arg::Int((self.seed >> 32) as i32),
            Arg::Int(self.threshold as i32),
            Arg::Float(self.scale),
            Arg::Pointer(self.rows),
        ]
    }

    /// What the element at `at` is multiplied by, as the kernels compute it.
    #[cfg(test)]
    pub fn factor(self, at: usize) -> f32 {
        if self.threshold == 0 {
            return 1.0;
        }
        let mut z = self
            .seed
            .wrapping_add((at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        if (z >> 32) as u32 >= self.threshold {
            self.scale
        } else {
            0.0
        }
    }
}

/// A factor of a low-rank term, f32, from the side of the rank: element `(k, i)` at `k * step_k + i * step_i`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Factor {
    pub address: Address,
    pub rank: usize,
    pub width: usize,
    pub step_k: usize,
    pub step_i: usize,
}

impl Factor {
    /// A, `[rank, inputs]`.
    pub fn a(address: Address, rank: usize, inputs: usize) -> Self {
        Self {
            address,
            rank,
            width: inputs,
            step_k: inputs,
            step_i: 1,
        }
    }

    /// B, `[outputs, rank]`.
    pub fn b(address: Address, rank: usize, outputs: usize) -> Self {
        Self {
            address,
            rank,
            width: outputs,
            step_k: 1,
            step_i: rank,
        }
    }
}

impl Kernels<'_> {
    /// `out[r] = base[r] + part[from[r]]`: a `base` of 0 is zeros, a `from` of 0 is `r` itself.
    ///
    /// # Safety
    /// The addresses hold `[rows, width]` each, `from` rows of `part` or [`NO_ROW`](crate::gpu::training::NO_ROW).
    pub unsafe fn place_rows(
        &self,
        out: Address,
        base: Address,
        part: Address,
        from: Address,
        (rows, width): (usize, usize),
    ) -> Result<()> {
        let args = [
            Arg::Pointer(out),
            Arg::Pointer(base),
            Arg::Pointer(part),
            Arg::Pointer(from),
            Arg::Int(width as i32),
        ];
        // SAFETY: the caller's promise.
        unsafe { self.launch("place_rows", (rows, 1, 1), ROW_THREADS, 0, &args) }
    }

    /// `x[r] += bias`.
    ///
    /// # Safety
    /// The addresses hold `[rows, width]` and `[width]`.
    pub unsafe fn add_bias(&self, x: Address, bias: Address, (rows, width): (usize, usize)) -> Result<()> {
        let args = [Arg::Pointer(x), Arg::Pointer(bias), Arg::Int(width as i32)];
        // SAFETY: the caller's promise.
        unsafe { self.launch("add_bias", (rows, 1, 1), ROW_THREADS, 0, &args) }
    }

    /// `out = add` and the gradient of a norm's input `x`, whose output has the gradient `grad`; `out` may be `add`.
    ///
    /// # Safety
    /// The addresses hold `[rows, width]` each, `w` `[width]`.
    pub unsafe fn rms_norm_grad(
        &self,
        out: Address,
        [add, x, w, grad]: [Address; 4],
        (rows, width): (usize, usize),
        eps: f32,
    ) -> Result<()> {
        let args = [
            Arg::Pointer(out),
            Arg::Pointer(add),
            Arg::Pointer(x),
            Arg::Pointer(w),
            Arg::Pointer(grad),
            Arg::Int(width as i32),
            Arg::Float(eps),
        ];
        // SAFETY: the caller's promise.
        unsafe { self.launch("rms_norm_grad", (rows, 1, 1), ROW_THREADS, 0, &args) }
    }

    /// Heads normalised, where the model does that, and with their positions turned in.
    ///
    /// # Safety
    /// `out` holds rows of as many heads, `out_stride` apart; the others what the fields say.
    pub unsafe fn turn_heads(&self, out: Address, out_stride: usize, heads: &Heads) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_heads("turn_heads", out, out_stride, heads) }
    }

    /// The gradient of [`Kernels::turn_heads`]' output, where it lies, to that of its input.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn turn_heads_back(&self, grad: Address, grad_stride: usize, heads: &Heads) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.launch_heads("turn_heads_back", grad, grad_stride, heads) }
    }

    /// # Safety
    /// As [`Kernels::turn_heads`].
    unsafe fn launch_heads(&self, name: &str, out: Address, out_stride: usize, heads: &Heads) -> Result<()> {
        let args = [
            Arg::Pointer(out),
            Arg::Pointer(heads.raw),
            Arg::Pointer(heads.cos),
            Arg::Pointer(heads.sin),
            Arg::Pointer(heads.positions),
            Arg::Pointer(heads.norm),
            Arg::Int(heads.heads as i32),
            Arg::Int(heads.head_dim as i32),
            Arg::Int(out_stride as i32),
            Arg::Int(heads.raw_stride as i32),
            Arg::Float(heads.eps),
        ];
        // Four warps of a block take four heads.
        let grid = (heads.rows, heads.heads.div_ceil(4), 1);
        // SAFETY: the caller's promise.
        unsafe { self.launch(name, grid, ATTEND_THREADS, 0, &args) }
    }

    /// Gate and up, `[rows, 2 * width]`, become their own gradients.
    ///
    /// # Safety
    /// `grad` holds `[rows, width]`: of what [`Kernels::swiglu`] gave.
    pub unsafe fn swiglu_grad(&self, gate_up: Address, grad: Address, (rows, width): (usize, usize)) -> Result<()> {
        let args = [Arg::Pointer(gate_up), Arg::Pointer(grad), Arg::Int(width as i32)];
        let parts = width.div_ceil(ROW_THREADS as usize * self.pack());
        // SAFETY: the caller's promise.
        unsafe { self.launch("swiglu_grad", (rows, parts, 1), ROW_THREADS, 0, &args) }
    }

    /// `low = scales * (factor x)`, some of `x` dropped.
    ///
    /// - `low`: `[rows, rank]` f32; `x`: rows of the factor's width, and the elements from one to the next
    /// - `scales`: `[rows]` f32
    ///
    /// # Safety
    /// The addresses hold that.
    pub unsafe fn term_down(
        &self,
        low: Address,
        (x, stride): (Address, usize),
        rows: usize,
        factor: Factor,
        scales: Address,
        drop: Drop,
    ) -> Result<()> {
        let mut args = vec![
            Arg::Pointer(low),
            Arg::Pointer(x),
            Arg::Pointer(factor.address),
            Arg::Int(rows as i32),
            Arg::Int(factor.width as i32),
            Arg::Int(stride as i32),
            Arg::Int(factor.rank as i32),
            Arg::Int(factor.step_k as i32),
            Arg::Int(factor.step_i as i32),
            Arg::Pointer(scales),
        ];
        args.extend(drop.args());
        let grid = (rows.div_ceil(TERM_DOWN_ROWS), factor.rank.div_ceil(TERM_AT_ONCE), 1);
        // SAFETY: the caller's promise.
        unsafe { self.launch("term_down", grid, ROW_THREADS, 0, &args) }
    }

    /// `out += factorᵀ low`, some of that dropped.
    ///
    /// - `out`: rows of the factor's width, and the elements from one to the next; `low`: `[rows, rank]` f32
    ///
    /// # Safety
    /// The addresses hold that.
    pub unsafe fn term_up(
        &self,
        (out, stride): (Address, usize),
        low: Address,
        rows: usize,
        factor: Factor,
        drop: Drop,
    ) -> Result<()> {
        let mut args = vec![
            Arg::Pointer(out),
            Arg::Pointer(low),
            Arg::Pointer(factor.address),
            Arg::Int(rows as i32),
            Arg::Int(factor.width as i32),
            Arg::Int(stride as i32),
            Arg::Int(factor.rank as i32),
            Arg::Int(factor.step_k as i32),
            Arg::Int(factor.step_i as i32),
        ];
        args.extend(drop.args());
        let parts = factor.width.div_ceil(TERM_COLUMNS * ROW_THREADS as usize);
        let grid = (rows.div_ceil(TERM_UP_ROWS), parts, 1);
        // SAFETY: the caller's promise.
        unsafe { self.launch("term_up", grid, ROW_THREADS, 0, &args) }
    }

    /// Elements of [`Kernels::term_outer`]'s parts.
    pub fn term_parts(rows: usize, factor: Factor) -> usize {
        rows.div_ceil(TERM_PART_ROWS) * factor.rank * factor.width
    }

    /// A factor's gradient, written into it: the sum over the rows of `low wideᵀ`, some of `wide` dropped.
    ///
    /// - `parts`: room for [`Kernels::term_parts`] f32; `wide`: rows of the factor's width, and the elements from one to
    ///   the next; `low`: `[rows, rank]` f32
    ///
    /// # Safety
    /// The addresses hold that.
    pub unsafe fn term_outer(
        &self,
        gradient: Factor,
        parts: Address,
        (wide, stride): (Address, usize),
        low: Address,
        rows: usize,
        drop: Drop,
    ) -> Result<()> {
        let (blocks, count) = (blocks_of(gradient.width), rows.div_ceil(TERM_PART_ROWS));
        let mut args = vec![
            Arg::Pointer(parts),
            Arg::Pointer(wide),
            Arg::Pointer(low),
            Arg::Int(rows as i32),
            Arg::Int(gradient.width as i32),
            Arg::Int(stride as i32),
            Arg::Int(gradient.rank as i32),
        ];
        args.extend(drop.args());
        let sum = [
            Arg::Pointer(gradient.address),
            Arg::Pointer(parts),
            Arg::Int(count as i32),
            Arg::Int(gradient.width as i32),
            Arg::Int(gradient.rank as i32),
            Arg::Int(gradient.step_k as i32),
            Arg::Int(gradient.step_i as i32),
        ];
        let grid = (
            blocks.div_ceil(TERM_COLUMNS),
            count,
            gradient.rank.div_ceil(TERM_AT_ONCE),
        );
        // SAFETY: the caller's promise.
        unsafe {
            self.launch("term_outer", grid, ATTEND_THREADS, 0, &args)?;
            self.launch("term_sum", (blocks, gradient.rank, 1), ATTEND_THREADS, 0, &sum)
        }
    }
}

/// Blocks that take so many columns, a thread one.
fn blocks_of(columns: usize) -> usize {
    columns.div_ceil(ATTEND_THREADS as usize)
}
