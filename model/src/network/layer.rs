//! A decoder layer of a training pass on the CPU path, forward and backward (`super::stack` joins them).
//!
//! It keeps what is dear to compute again: what the linear layers give, and attention's output. Norms, positions, the
//! activation and attention's weights are computed again in the backward pass, in buffers that go from layer to layer.
//! `block.rs` says the same in candle's operations, which keep the inputs and outputs of each; the tests compare the two.

mod backward;
mod changed;
mod low_rank;
mod operation;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::block::Block;
use super::host::by_rows;
use super::stack::Layer;
use crate::cpu::{Output, PackedMatrix, Product, Rows, Scratch, Sequences, attend_packed, multiply, multiply_into};
use crate::lora::{AdaptedRows, LinearKind, Terms};
use crate::ops::{self, RopeTable, host_floats};
use low_rank::{Forward, LowRank};
pub(super) use operation::Training;

/// The tokens whose output is read.
#[derive(Debug, Clone)]
pub(super) struct Read {
    pub sequences: Arc<Sequences>,
    /// Their packed rows, ascending; `None`: all.
    pub rows: Option<Arc<[u32]>>,
}

/// A layer with its part of the adapter.
#[derive(Clone)]
struct LayerOp {
    block: Block,
    read: Read,
    positions: Arc<[u32]>,
    rope: Arc<RopeTable>,
    terms: Terms,
    /// The rows that the adapter changes, where that is not all.
    adapted: Option<Arc<AdaptedRows>>,
    /// Those rows, where the backward pass stays within them.
    changed: Option<Read>,
    /// Probability and seed.
    dropout: Option<(f64, u64)>,
    scratch: Arc<Scratch>,
}

/// What the backward pass reads of the forward pass. `t` tokens, `n` of them read by the backward pass.
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

impl Kept {
    /// Its buffers.
    fn into_buffers(self) -> impl Iterator<Item = Vec<f32>> {
        let Self {
            q,
            k,
            v,
            mixed,
            log_sums,
            middle,
            gate,
            up,
            low,
        } = self;
        let low = low.into_iter().map(LowRank::into_low);
        [q, k, v, mixed, log_sums, middle, gate, up].into_iter().chain(low)
    }
}

impl Layer for LayerOp {
    type Rows = Vec<f32>;
    type View = [f32];
    type Kept = Kept;

    fn has_factors(&self) -> bool {
        !self.terms.is_empty()
    }

    fn forward(&self, x: &[f32], factors: &[f32], wants_output: bool) -> Result<(Vec<f32>, Kept)> {
        self.run(x, factors, wants_output)
    }

    fn backward(
        &self,
        x: &[f32],
        kept: Kept,
        grad: &[f32],
        deep: bool,
        dfactors: &mut [f32],
    ) -> Result<Option<Vec<f32>>> {
        self.as_read_back().run_back(x, kept, grad, deep, dfactors)
    }

    fn give(&self, rows: Vec<f32>) {
        self.scratch.give([rows]);
    }

    fn give_kept(&self, kept: Kept) {
        self.scratch.give(kept.into_buffers());
    }
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

    /// `Layer::forward`.
    fn run(&self, x: &[f32], factors: &[f32], wants_output: bool) -> Result<(Vec<f32>, Kept)> {
        let (block, scratch) = (&self.block, &self.scratch);
        let mut low = self
            .terms
            .forward(factors, self.adapted.as_deref(), self.dropout, scratch);
        let [q, k, v] = self.queries_keys_values(x, &mut low)?;
        let (turned_q, turned_k) = (self.turned(LinearKind::QProj, &q)?, self.turned(LinearKind::KProj, &k)?);
        let mut mixed = scratch.take(q.len());
        let mut log_sums = scratch.take(self.read.sequences.queries() * block.shape.heads);
        let inputs = [&turned_q[..], &turned_k, &v];
        attend_packed(inputs, &self.read.sequences, block.shape, &mut mixed, &mut log_sums);
        scratch.give([turned_q, turned_k]);

        let hidden = self.width(LinearKind::DownProj);
        let mut middle = self.read_of(x, hidden).unwrap_or_else(|| scratch.copy(x));
        self.add_linear(LinearKind::OProj, &mixed, &mut middle);
        low.add(LinearKind::OProj, &mixed, &mut middle);

        let [gate, up] = self.gate_and_up(&middle, &mut low)?;
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
        let kept = Kept {
            q,
            k,
            v,
            mixed,
            log_sums,
            middle,
            gate,
            up,
            low,
        };
        Ok((output, self.changed_of(kept)))
    }

    fn queries_keys_values(&self, x: &[f32], low: &mut Forward) -> Result<[Vec<f32>; 3]> {
        use LinearKind::{KProj, QProj, VProj};
        let hidden = self.width(LinearKind::DownProj);
        let normed = self.normed(x, &self.block.input_norm)?;
        let tokens = x.len() / hidden;
        let take = |rows: usize, kind| self.scratch.take(rows * self.width(kind));
        let mut q = take(self.read.sequences.queries(), QProj);
        let (mut k, mut v) = (take(tokens, KProj), take(tokens, VProj));
        let asking = self.read_of(&normed, hidden);
        match &asking {
            None => self.linears(&normed, &mut [(QProj, &mut q), (KProj, &mut k), (VProj, &mut v)])?,
            Some(asking) => {
                self.linears(asking, &mut [(QProj, &mut q)])?;
                self.linears(&normed, &mut [(KProj, &mut k), (VProj, &mut v)])?;
            }
        }
        low.add(QProj, asking.as_ref().unwrap_or(&normed), &mut q);
        low.add(KProj, &normed, &mut k);
        low.add(VProj, &normed, &mut v);
        self.scratch.give(asking.into_iter().chain([normed]));
        Ok([q, k, v])
    }

    fn gate_and_up(&self, middle: &[f32], low: &mut Forward) -> Result<[Vec<f32>; 2]> {
        use LinearKind::{GateProj, UpProj};
        let normed = self.normed(middle, &self.block.post_attention_norm)?;
        let len = self.read.sequences.queries() * self.width(GateProj);
        let (mut gate, mut up) = (self.scratch.take(len), self.scratch.take(len));
        self.linears(&normed, &mut [(GateProj, &mut gate), (UpProj, &mut up)])?;
        low.add(GateProj, &normed, &mut gate);
        low.add(UpProj, &normed, &mut up);
        self.scratch.give([normed]);
        Ok([gate, up])
    }

    /// The rows of `data` that are read, where that is not all.
    fn read_of(&self, data: &[f32], width: usize) -> Option<Vec<f32>> {
        let rows = self.read.rows.as_ref()?;
        Some(self.pick(rows, data, width))
    }

    fn pick(&self, rows: &[u32], data: &[f32], width: usize) -> Vec<f32> {
        let mut picked = self.scratch.take(rows.len() * width);
        for (to, &row) in picked.chunks_exact_mut(width).zip(rows) {
            to.copy_from_slice(&data[row as usize * width..][..width]);
        }
        picked
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
        multiply(rows, x.len() / inputs, &products, None);
        Ok(())
    }

    /// Adds the frozen part; the layers that end a residual branch have no bias.
    fn add_linear(&self, kind: LinearKind, x: &[f32], sum: &mut [f32]) {
        multiply_into(self.matrix(kind), x, sum, true, None);
    }
}
