//! What a pass puts into the device's stream: launches of kernels and matrix products.

use candle_core::{DType, Result, bail};

/// A device address.
pub(crate) type Address = u64;

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Arg {
    /// A device pointer; 0 is null.
    Pointer(Address),
    Int(i32),
    Float(f32),
}

impl Arg {
    /// The argument's bytes, in the low ones of a word: what a launch reads of it, on a little-endian machine.
    pub fn bits(self) -> u64 {
        match self {
            Self::Pointer(address) => address,
            Self::Int(int) => u64::from(int as u32),
            Self::Float(float) => u64::from(float.to_bits()),
        }
    }
}

/// One kernel's launch.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    /// The kernel's name in `model/kernels`.
    pub kernel: &'a str,
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
    pub args: &'a [Arg],
}

/// How a product reads its weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    /// `x wᵀ` of a `w` of `[outputs, inputs]`: forward.
    Transposed,
    /// `x w` of a `w` of `[inputs, outputs]`: the gradient of a product's input, with the same weight.
    Plain,
}

/// `out = x wᵀ` or `out = x w`, or added to `out`: sums in f32, rows of `inputs` and `outputs` elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gemm {
    /// `[rows, outputs]` in `out_dtype`, rows `outputs` apart.
    pub out: Address,
    /// `[rows, inputs]` in `dtype`, rows `inputs` apart.
    pub x: Address,
    /// In `dtype`, as `side` says.
    pub w: Address,
    pub side: Side,
    pub rows: usize,
    pub outputs: usize,
    pub inputs: usize,
    pub accumulate: bool,
    pub dtype: DType,
    pub out_dtype: DType,
}

/// The suffix of a dtype's kernels.
pub(crate) fn suffix(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::BF16 => Ok("bf16"),
        DType::F16 => Ok("f16"),
        other => bail!("the GPU path runs f32, bf16 and f16, not {}", other.as_str()),
    }
}
