//! Rotary position embedding, one position per token.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor};

use super::{floats, has_kernel};

/// Cosines and sines of every position, `[positions, head_dim / 2]`, already scaled where the model asks for it.
#[derive(Debug)]
pub(crate) struct RopeTable {
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RopeTable {
    /// Angles `position * inverse_frequency`.
    pub fn new(inverse_frequencies: &[f32], positions: usize) -> Self {
        let half = inverse_frequencies.len();
        let angle = |i: usize| (i / half) as f32 * inverse_frequencies[i % half];
        Self {
            cos: (0..positions * half).map(|i| angle(i).cos()).collect(),
            sin: (0..positions * half).map(|i| angle(i).sin()).collect(),
            half,
        }
    }

    /// How many positions there are angles for.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half
    }

    /// Cosines and sines of every position, `[positions, head_dim / 2]` each.
    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    pub fn tensors(&self, device: &Device) -> Result<(Tensor, Tensor)> {
        let tensor = |table: &[f32]| Tensor::from_slice(table, (self.positions(), self.half), device);
        Ok((tensor(&self.cos)?, tensor(&self.sin)?))
    }

    /// `[t, 1, half]` cosines and sines of the given positions.
    fn rows(&self, positions: &[u32], device: &Device) -> Result<(Tensor, Tensor)> {
        let pick = |table: &[f32]| {
            let rows = positions
                .iter()
                .flat_map(|&p| self.at(table, p).iter().copied())
                .collect();
            Tensor::from_vec(rows, (positions.len(), 1, self.half), device)
        };
        Ok((pick(&self.cos)?, pick(&self.sin)?))
    }

    /// Turns every head of one token where it lies; `sign` -1 turns back.
    ///
    /// - `heads`: `[heads, head_dim]`
    pub fn turn(&self, heads: &mut [f32], position: u32, sign: f32) {
        let (cos, sin) = (self.at(&self.cos, position), self.at(&self.sin, position));
        for head in heads.chunks_exact_mut(2 * self.half) {
            let (a, b) = head.split_at_mut(self.half);
            for i in 0..self.half {
                let (x, y, sin) = (a[i], b[i], sin[i] * sign);
                a[i] = x * cos[i] - y * sin;
                b[i] = y * cos[i] + x * sin;
            }
        }
    }

    fn at<'a>(&self, table: &'a [f32], position: u32) -> &'a [f32] {
        let start = position as usize * self.half;
        &table[start..start + self.half]
    }
}

/// Turns the two halves of every head by its token's angle (the "rotate half" layout of Hugging Face).
///
/// - `x`: `[t, heads, head_dim]`; `positions`: one per token
pub(crate) fn rope(x: &Tensor, positions: &Arc<[u32]>, table: &Arc<RopeTable>) -> Result<Tensor> {
    if !has_kernel(x) {
        return rope_stock(x, positions, table);
    }
    let op = Rope {
        positions: positions.clone(),
        table: table.clone(),
        sign: 1.0,
    };
    if x.track_op() {
        x.apply_op1(op)
    } else {
        x.apply_op1_no_bwd(&op)
    }
}

fn rope_stock(x: &Tensor, positions: &[u32], table: &RopeTable) -> Result<Tensor> {
    let (cos, sin) = table.rows(positions, x.device())?;
    let (cos, sin) = (cos.to_dtype(x.dtype())?, sin.to_dtype(x.dtype())?);
    let first = x.narrow(2, 0, table.half)?;
    let second = x.narrow(2, table.half, table.half)?;
    let turned_first = (first.broadcast_mul(&cos)? - second.broadcast_mul(&sin)?)?;
    let turned_second = (second.broadcast_mul(&cos)? + first.broadcast_mul(&sin)?)?;
    Tensor::cat(&[turned_first, turned_second], 2)
}

struct Rope {
    positions: Arc<[u32]>,
    table: Arc<RopeTable>,
    sign: f32,
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, heads, dim) = layout.shape().dims3()?;
        let (x, half) = (floats(x, layout, self.name())?, self.table.half);
        if tokens != self.positions.len() || dim != 2 * half {
            candle_core::bail!(
                "rope: {tokens} tokens of {dim}, table for {} of {}",
                self.positions.len(),
                2 * half
            );
        }
        let mut out = x.to_vec();
        for (row, &position) in out.chunks_exact_mut(heads * dim).zip(self.positions.iter()) {
            self.table.turn(row, position, self.sign);
        }
        Ok((CpuStorage::F32(out), layout.shape().clone()))
    }

    // A rotation's transpose is the rotation back.
    fn bwd(&self, _x: &Tensor, _y: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = Self {
            positions: self.positions.clone(),
            table: self.table.clone(),
            sign: -self.sign,
        };
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&back)?))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_same_op, random};
    use super::*;

    #[test]
    fn kernel_equals_the_composition() -> Result<()> {
        let table = Arc::new(RopeTable::new(&[1.0, 0.1, 0.01], 20));
        let positions: Arc<[u32]> = Arc::from([0, 1, 19, 7].as_slice());
        assert_same_op(
            &[random(&[4, 2, 6], 1)?],
            |t| rope(&t[0], &positions, &table),
            |t| rope_stock(&t[0], &positions, &table),
            1e-6,
        )
    }
}
