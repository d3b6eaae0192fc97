//! All layers of a training pass on the CPU path as one operation of candle's graph.
//!
//! One operation and not one per layer: candle clears and adds a gradient for the input of every operation, in a pool of
//! threads of its own that competes with this path's.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::super::stack::{Keeps, Stack, rows_within};

use super::{LayerOp, Read};
use crate::cpu::Scratch;
use crate::lora::{self, AdaptedRows, Adapter, Dropout, Terms};
use crate::network::block::Block;
use crate::ops::{self, RopeTable, host_floats};

/// What the layers of one training pass share.
pub(in crate::network) struct Training<'a> {
    /// Position of every packed token in its sequence.
    pub positions: Arc<[u32]>,
    pub rope: &'a Arc<RopeTable>,
    pub adapter: Option<&'a Adapter>,
    /// The rows that it changes, where that is not all.
    pub adapted: Option<Arc<AdaptedRows>>,
    pub dropout: Option<&'a Dropout>,
    /// Keep the layers' inputs alone for the backward pass, which runs each layer again.
    pub checkpointing: bool,
    pub scratch: &'a Arc<Scratch>,
}

impl Training<'_> {
    /// The last layer's output, `[read, hidden]`.
    ///
    /// - `blocks`: one or more layers, numbered from `first`; all tokens are read of all but the last of them
    /// - `x`: `[tokens, hidden]`
    pub fn run(&self, blocks: &[Block], first: usize, x: &Tensor, [all, last]: [&Read; 2]) -> Result<Tensor> {
        let numbers = first..first + blocks.len();
        let factors = lora::flat_factors(self.adapter, numbers.clone(), x.device())?;
        let changed = rows_within(self.adapted.as_deref(), x, &factors, last.rows.is_none()).map(|rows| all.of(rows));
        let mut start = 0;
        let layers = blocks.iter().zip(numbers.clone()).map(|(block, number)| {
            let terms = Terms::of(self.adapter, number, start)?;
            start = terms.end();
            Ok(LayerOp {
                block: block.clone(),
                read: if number + 1 == numbers.end { last } else { all }.clone(),
                positions: self.positions.clone(),
                rope: self.rope.clone(),
                dropout: self.dropout.and_then(Dropout::fork),
                scratch: self.scratch.clone(),
                adapted: self.adapted.clone(),
                changed: changed.clone(),
                terms,
            })
        });
        let layers = layers.collect::<Result<_>>()?;
        let keeps = Keeps::of(x, &factors, self.checkpointing);
        let op = Layers(Stack::new(layers, keeps));
        let x = x.contiguous()?;
        match keeps {
            Keeps::Nothing => x.apply_op2_no_bwd(&factors, &op),
            _ => x.apply_op2(&factors, op),
        }
    }
}

/// The layers with the adapter's factors, which are one tensor to candle: an operation has few inputs.
struct Layers(Stack<LayerOp>);

impl CustomOp2 for Layers {
    fn name(&self) -> &'static str {
        "decoder-layers"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, factors: &CpuStorage, lf: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, hidden) = lx.shape().dims2()?;
        let (x, factors) = (ops::floats(x, lx, self.name())?, ops::floats(factors, lf, self.name())?);
        let output = self.0.forward(x, factors)?;
        let shape = Shape::from((output.len() / hidden, hidden));
        Ok((CpuStorage::F32(output), shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        factors: &Tensor,
        _y: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (floats, values, grad) = (host_floats(x)?, host_floats(factors)?, host_floats(&grad)?);
        let mut dfactors = vec![0f32; values.len()];
        let dx = self.0.backward(&floats, &values, &grad, x.track_op(), &mut dfactors)?;
        let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), x.device())).transpose()?;
        let dfactors = factors
            .track_op()
            .then(|| Tensor::from_vec(dfactors, factors.shape(), factors.device()));
        Ok((dx, dfactors.transpose()?))
    }
}
