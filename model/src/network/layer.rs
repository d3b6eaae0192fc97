//! One decoder layer of a training pass on the CPU path, as one operation with its own backward.
//!
//! It keeps what is dear to compute again: what the linear layers give, and attention's output. Norms, positions, the
//! activation and attention's weights are computed again in the backward pass, in buffers that go from layer to layer.
//! `block.rs` says the same in candle's operations, which keep the inputs and outputs of each; the tests compare the two.

mod backward;
mod low_rank;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::block::Block;
use super::host::by_rows;
use crate::cpu::{Output, PackedMatrix, Product, Rows, Scratch, Sequences, attend_packed, multiply};
use crate::lora::{Adapter, Dropout, LinearKind};
use crate::ops::{self, RopeTable, host_floats};
use low_rank::{LowRank, Terms};

/// What the layers of one training pass share.
pub(super) struct Training<'a> {
    /// Position of every packed token in its sequence.
    pub positions: Arc<[u32]>,
    pub rope: &'a Arc<RopeTable>,
    pub adapter: Option<&'a Adapter>,
    pub dropout: Option<&'a Dropout>,
    /// Keep nothing for the backward pass, which runs the layer again.
    pub checkpointing: bool,
    pub scratch: &'a Arc<Scratch>,
}

/// The tokens whose output is read.
#[derive(Debug, Clone)]
pub(super) struct Read {
    pub sequences: Arc<Sequences>,
    /// Their packed rows, ascending; `None`: all.
    pub rows: Option<Arc<[u32]>>,
}

impl Training<'_> {
    /// The layer's output, `[read, hidden]`.
    ///
    /// - `x`: `[tokens, hidden]`
    pub fn run(&self, block: &Block, layer: usize, x: &Tensor, read: &Read) -> Result<Tensor> {
        let (terms, factors) = Terms::of(self.adapter, layer)?;
        let tracked = x.track_op() || factors.track_op();
        let op = LayerOp {
            block: block.clone(),
            read: read.clone(),
            positions: self.positions.clone(),
            rope: self.rope.clone(),
            terms,
            dropout: self.dropout.and_then(Dropout::fork),
            keeps: tracked && !self.checkpointing,
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

/// The layer with the adapter's factors, which are one tensor to candle: an operation has few inputs.
struct LayerOp {
    block: Block,
    read: Read,
    positions: Arc<[u32]>,
    rope: Arc<RopeTable>,
    terms: Terms,
    /// Probability and seed.
    dropout: Option<(f64, u64)>,
    keeps: bool,
    kept: Mutex<Option<Kept>>,
    scratch: Arc<Scratch>,
}

/// What the backward pass reads of the forward pass. `t` tokens, `n` of them read.
struct Kept {
    /// Queries, `[n, heads * head_dim]`, as their linear layer gave them.
    q: Vec<f32>,
    /// Keys, `[t, kv_heads * head_dim]`, likewise.
    k: Vec<f32>,
    v: Vec<f32>,
    /// What attention gave, as the queries.
    mixed: Vec<f32>,
    /// `[n, heads]`.
    log_sums: Vec<f32>,
    /// The residual stream between the halves, `[n, hidden]`.
    middle: Vec<f32>,
    /// `[n, intermediate]`.
    gate: Vec<f32>,
    up: Vec<f32>,
    low: Vec<LowRank>,
}

impl LayerOp {
    fn width(&self, kind: LinearKind) -> usize {
        self.matrix(kind).shape().0
    }

    fn matrix(&self, kind: LinearKind) -> &PackedMatrix {
        match self.block.linears[kind as usize].weight.packed() {
            Some(weight) => weight,
            None => unreachable!("a layer on the CPU path has packed weights"),
        }
    }

    /// Runs the layer; with `wants_output` the result is the layer's output, `[n, hidden]`.
    fn forward(&self, x: &[f32], factors: &[f32], wants_output: bool) -> Result<(Vec<f32>, Kept)> {
        let (block, scratch) = (&self.block, &self.scratch);
        let hidden = self.width(LinearKind::DownProj);
        let mut low = self.terms.forward(factors, self.dropout, scratch);
        let normed = self.normed(x, &block.input_norm)?;
        let (tokens, read) = (x.len() / hidden, self.read.sequences.queries());
        let take = |rows: usize, kind| scratch.take(rows * self.width(kind));
        let mut q = take(read, LinearKind::QProj);
        let (mut k, mut v) = (take(tokens, LinearKind::KProj), take(tokens, LinearKind::VProj));
        let asking = self.pick(&normed, hidden);
        match &asking {
            None => self.linears(
                &normed,
                &mut [
                    (LinearKind::QProj, &mut q),
                    (LinearKind::KProj, &mut k),
                    (LinearKind::VProj, &mut v),
                ],
            )?,
            Some(asking) => {
                self.linears(asking, &mut [(LinearKind::QProj, &mut q)])?;
                self.linears(&normed, &mut [(LinearKind::KProj, &mut k), (LinearKind::VProj, &mut v)])?;
            }
        }
        low.add(LinearKind::QProj, asking.as_ref().unwrap_or(&normed), &mut q);
        low.add(LinearKind::KProj, &normed, &mut k);
        low.add(LinearKind::VProj, &normed, &mut v);
        scratch.give(asking.into_iter().chain([normed]));

        let (turned_q, turned_k) = (self.turned(LinearKind::QProj, &q)?, self.turned(LinearKind::KProj, &k)?);
        let mut mixed = scratch.take(q.len());
        let mut log_sums = scratch.take(read * block.shape.heads);
        attend_packed(
            [&turned_q, &turned_k, &v],
            &self.read.sequences,
            block.shape,
            &mut mixed,
            &mut log_sums,
        );
        scratch.give([turned_q, turned_k]);

        let mut middle = self.pick(x, hidden).unwrap_or_else(|| scratch.copy(x));
        self.add_linear(LinearKind::OProj, &mixed, &mut middle);
        low.add(LinearKind::OProj, &mixed, &mut middle);

        let normed = self.normed(&middle, &block.post_attention_norm)?;
        let (mut gate, mut up) = (take(read, LinearKind::GateProj), take(read, LinearKind::UpProj));
        self.linears(
            &normed,
            &mut [(LinearKind::GateProj, &mut gate), (LinearKind::UpProj, &mut up)],
        )?;
        low.add(LinearKind::GateProj, &normed, &mut gate);
        low.add(LinearKind::UpProj, &normed, &mut up);
        scratch.give([normed]);

        let mut output = Vec::new();
        if wants_output || self.terms.has(LinearKind::DownProj) {
            let active = self.active(&gate, &up);
            output = scratch.copy(&middle);
            if wants_output {
                self.add_linear(LinearKind::DownProj, &active, &mut output);
            }
            low.add(LinearKind::DownProj, &active, &mut output);
            scratch.give([active]);
        }
        let low = low.finish();
        Ok((
            output,
            Kept {
                q,
                k,
                v,
                mixed,
                log_sums,
                middle,
                gate,
                up,
                low,
            },
        ))
    }

    /// The rows of `data` that are read, where that is not all.
    fn pick(&self, data: &[f32], width: usize) -> Option<Vec<f32>> {
        let rows = self.read.rows.as_ref()?;
        let mut picked = self.scratch.take(rows.len() * width);
        for (to, &row) in picked.chunks_exact_mut(width).zip(rows.iter()) {
            to.copy_from_slice(&data[row as usize * width..][..width]);
        }
        Some(picked)
    }

    fn normed(&self, x: &[f32], weight: &Tensor) -> Result<Vec<f32>> {
        let (weight, eps) = (host_floats(weight)?, self.block.eps as f32);
        let (weight, width) = (&*weight, weight.len());
        let mut out = self.scratch.take(x.len());
        by_rows(&mut out, width, |row, out| {
            ops::rms_norm_row(&x[row * width..][..width], weight, eps, out)
        });
        Ok(out)
    }

    fn active(&self, gate: &[f32], up: &[f32]) -> Vec<f32> {
        let width = self.width(LinearKind::GateProj);
        let mut active = self.scratch.copy(gate);
        by_rows(&mut active, width, |row, active| {
            ops::swiglu_in_place(active, &up[row * width..][..width])
        });
        active
    }

    /// Queries or keys normalised, where the model does that, and with their positions turned in.
    fn turned(&self, kind: LinearKind, raw: &[f32]) -> Result<Vec<f32>> {
        let mut heads = self.scratch.copy(raw);
        let norm = self.head_norm(kind).map(host_floats).transpose()?;
        let (norm, eps) = (norm.as_deref(), self.block.eps as f32);
        by_rows(&mut heads, self.width(kind), |row, heads| {
            if let Some(norm) = norm {
                heads
                    .chunks_exact_mut(norm.len())
                    .for_each(|head| ops::rms_norm_in_place(head, norm, eps));
            }
            self.rope.turn(heads, self.position(kind, row), 1.0);
        });
        Ok(heads)
    }

    fn head_norm(&self, kind: LinearKind) -> Option<&Tensor> {
        let (q_norm, k_norm) = self.block.qk_norms.as_ref()?;
        Some(if kind == LinearKind::QProj { q_norm } else { k_norm })
    }

    /// Position of a row of the queries or keys.
    fn position(&self, kind: LinearKind, row: usize) -> u32 {
        match &self.read.rows {
            Some(rows) if kind == LinearKind::QProj => self.positions[rows[row] as usize],
            _ => self.positions[row],
        }
    }

    /// The frozen part of linear layers with the same input, side by side.
    fn linears(&self, x: &[f32], wanted: &mut [(LinearKind, &mut Vec<f32>)]) -> Result<()> {
        let (mut products, mut inputs) = (Vec::with_capacity(wanted.len()), 1);
        for (kind, out) in wanted {
            let (matrix, bias) = (self.matrix(*kind), &self.block.linears[*kind as usize].bias);
            let (width, input) = matrix.shape();
            inputs = input;
            if let Some(bias) = bias {
                let bias = host_floats(bias)?;
                out.chunks_exact_mut(width).for_each(|row| row.copy_from_slice(&bias));
            }
            products.push(Product {
                matrix,
                // SAFETY: each product has a buffer of its own, `multiply` shares out its columns, and it is read only
                // when that has returned.
                out: unsafe { Output::shared(out, width) },
                accumulate: bias.is_some(),
            });
        }
        let rows = Rows {
            data: x,
            stride: inputs,
        };
        multiply(rows, x.len() / inputs, &products);
        Ok(())
    }

    /// Adds the frozen part; the layers that end a residual branch have no bias.
    fn add_linear(&self, kind: LinearKind, x: &[f32], sum: &mut [f32]) {
        low_rank::multiply_into(self.matrix(kind), x, sum, true);
    }
}

impl CustomOp2 for LayerOp {
    fn name(&self) -> &'static str {
        "decoder-layer"
    }

    fn cpu_fwd(&self, x: &CpuStorage, lx: &Layout, factors: &CpuStorage, lf: &Layout) -> Result<(CpuStorage, Shape)> {
        let (_, hidden) = lx.shape().dims2()?;
        let (x, factors) = (ops::floats(x, lx, self.name())?, ops::floats(factors, lf, self.name())?);
        let (output, kept) = self.forward(x, factors, true)?;
        let shape = Shape::from((output.len() / hidden, hidden));
        match self.keeps {
            true => *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept),
            false => self.give(kept),
        }
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
        let (floats, values) = (host_floats(x)?, host_floats(factors)?);
        // What was kept goes with the first backward pass, so that its memory serves the layers below.
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).take();
        let kept = match kept {
            Some(kept) => kept,
            None => {
                let (output, kept) = self.forward(&floats, &values, false)?;
                self.scratch.give([output]);
                kept
            }
        };
        let (dx, dfactors) = self.backward(&floats, kept, &host_floats(&grad)?, x.track_op())?;
        let dx = dx.map(|dx| Tensor::from_vec(dx, x.shape(), x.device())).transpose()?;
        let dfactors = factors
            .track_op()
            .then(|| Tensor::from_vec(dfactors, factors.shape(), factors.device()));
        Ok((dx, dfactors.transpose()?))
    }
}
