//! All layers of a training pass as one operation of candle's graph.
//!
//! One operation and not one per layer: candle clears and adds a gradient for the input of every operation, in a pool of
//! threads of its own that competes with this path's.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Tensor};

use super::low_rank::Terms;
use super::{Kept, LayerOp, Read};
use crate::cpu::Scratch;
use crate::lora::{Adapter, Dropout};
use crate::network::block::Block;
use crate::ops::{self, RopeTable, host_floats};

/// What the layers of one training pass share.
pub(in crate::network) struct Training<'a> {
    /// Position of every packed token in its sequence.
    pub positions: Arc<[u32]>,
    pub rope: &'a Arc<RopeTable>,
    pub adapter: Option<&'a Adapter>,
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
        let (mut layers, mut factors, mut start) = (Vec::with_capacity(blocks.len()), Vec::new(), 0);
        for (i, block) in blocks.iter().enumerate() {
            let (terms, of_layer) = Terms::of(self.adapter, first + i)?;
            factors.extend(of_layer);
            let op = LayerOp {
                block: block.clone(),
                read: if i + 1 == blocks.len() { last } else { all }.clone(),
                positions: self.positions.clone(),
                rope: self.rope.clone(),
                dropout: self.dropout.and_then(Dropout::fork),
                scratch: self.scratch.clone(),
                terms,
            };
            let end = start + op.terms.len();
            layers.push((op, start..end));
            start = end;
        }
        let factors = match factors.is_empty() {
            true => Tensor::zeros(1, DType::F32, &Device::Cpu)?,
            false => Tensor::cat(&factors, 0)?,
        };
        let tracked = x.track_op() || factors.track_op();
        let op = Stack {
            layers,
            keeps: match (tracked, self.checkpointing) {
                (false, _) => Keeps::Nothing,
                (true, true) => Keeps::Inputs,
                (true, false) => Keeps::Layers,
            },
            kept: Mutex::default(),
            scratch: self.scratch.clone(),
        };
        let x = x.contiguous()?;
        match tracked {
            true => x.apply_op2(&factors, op),
            false => x.apply_op2_no_bwd(&factors, &op),
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Keeps {
    Nothing,
    Inputs,
    Layers,
}

/// The layers with the adapter's factors, which are one tensor to candle: an operation has few inputs.
struct Stack {
    /// Each with the place of its factors among all.
    layers: Vec<(LayerOp, Range<usize>)>,
    keeps: Keeps,
    kept: Mutex<Vec<Run>>,
    scratch: Arc<Scratch>,
}

/// A layer's forward pass.
struct Run {
    /// Its input; `None` for the first, whose input candle keeps.
    input: Option<Vec<f32>>,
    kept: Option<Kept>,
}

impl Stack {
    /// Runs all layers and notes what the backward pass needs.
    fn forward(&self, x: &[f32], factors: &[f32]) -> Result<Vec<f32>> {
        let (mut input, mut runs) = (None, Vec::with_capacity(self.layers.len()));
        for (layer, range) in &self.layers {
            let of_layer = factors.get(range.clone()).unwrap_or_default();
            let (output, kept) = layer.forward(input.as_deref().unwrap_or(x), of_layer, true)?;
            let kept = match self.keeps {
                Keeps::Layers => Some(kept),
                _ => {
                    layer.give(kept);
                    None
                }
            };
            let input = input.replace(output);
            match self.keeps {
                Keeps::Nothing => self.scratch.give(input),
                _ => runs.push(Run { input, kept }),
            }
        }
        *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = runs;
        Ok(input.unwrap_or_else(|| x.to_vec()))
    }

    /// What a forward pass noted. It goes with the first backward pass, so that its memory serves the layers below.
    fn take(&self) -> Vec<Run> {
        std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The gradients of `x`, where `deep` asks for it, and of the factors.
    fn backward(&self, x: &[f32], factors: &[f32], grad: &[f32], deep: bool) -> Result<(Option<Vec<f32>>, Vec<f32>)> {
        let mut runs = self.take();
        if runs.is_empty() {
            // A second backward pass.
            let output = self.forward(x, factors)?;
            self.scratch.give([output]);
            runs = self.take();
        }
        let mut dfactors = vec![0f32; factors.len()];
        let mut grad = Some(Cow::Borrowed(grad));
        for (run, (layer, range)) in runs.into_iter().zip(&self.layers).rev() {
            // Below the lowest factors nothing wants a gradient.
            let Some(above) = grad.take() else { break };
            let input = run.input.as_deref().unwrap_or(x);
            let kept = match run.kept {
                Some(kept) => kept,
                None => {
                    let of_layer = factors.get(range.clone()).unwrap_or_default();
                    let (output, kept) = layer.forward(input, of_layer, false)?;
                    self.scratch.give([output]);
                    kept
                }
            };
            let (dx, of_layer) = layer.backward(input, kept, &above, deep || range.start > 0)?;
            dfactors[range.clone()].copy_from_slice(&of_layer);
            grad = dx.map(Cow::Owned);
            self.scratch.give(run.input);
            if let Cow::Owned(above) = above {
                self.scratch.give([above]);
            }
        }
        Ok((grad.map(Cow::into_owned).filter(|_| deep), dfactors))
    }
}

impl CustomOp2 for Stack {
    fn name(&self) -> &'static str {
        "decoder-layers"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, factors: &CpuStorage, lf: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, hidden) = lx.shape().dims2()?;
        let (x, factors) = (ops::floats(x, lx, self.name())?, ops::floats(factors, lf, self.name())?);
        let output = self.forward(x, factors)?;
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
        let (dx, dfactors) = self.backward(&floats, &values, &grad, x.track_op())?;
        let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), x.device())).transpose()?;
        let dfactors = factors
            .track_op()
            .then(|| Tensor::from_vec(dfactors, factors.shape(), factors.device()));
        Ok((dx, dfactors.transpose()?))
    }
}
