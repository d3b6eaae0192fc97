//! The linear layers of a pass on the CPU path, with their biases and low-rank terms.

use std::iter;

use super::super::block::Block;
use super::{Layer, by_rows};
use crate::ModelError;
use crate::cpu::{Output, PackedMatrix, Product, Rows, multiply, multiply_gated, multiply_into};
use crate::lora::LinearKind;
use crate::ops::{self, host_floats};

impl Layer<'_> {
    /// Several linear layers of the same input, side by side, each into its own buffer, before `next` is multiplied.
    pub(super) fn linears<const N: usize>(
        &self,
        x: Rows,
        mut wanted: [(LinearKind, &mut Vec<f32>); N],
        low: &mut Vec<f32>,
        next: &PackedMatrix,
    ) -> Result<(), ModelError> {
        let tokens = x.data.len() / x.stride;
        let mut products = Vec::with_capacity(N);
        for (kind, out) in &mut wanted {
            products.push(self.begun(*kind, tokens, out)?);
        }
        multiply(x, tokens, &products, Some(next));
        for (kind, out) in wanted {
            self.add_low_rank(kind, x.data, out, low)?;
        }
        Ok(())
    }

    /// `gate = silu(gate(x)) * up(x)`.
    pub(super) fn gate(
        &self,
        x: Rows,
        gate: &mut Vec<f32>,
        up: &mut Vec<f32>,
        low: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let down = self.block.packed(LinearKind::DownProj);
        if !self.adapts(LinearKind::GateProj) && !self.adapts(LinearKind::UpProj) {
            let tokens = x.data.len() / x.stride;
            let gate = self.begun(LinearKind::GateProj, tokens, gate)?;
            let up = self.begun(LinearKind::UpProj, tokens, up)?;
            multiply_gated(x, tokens, &[gate, up], Some(down));
            return Ok(());
        }
        // The low-rank terms come before the activation.
        let wanted = [(LinearKind::GateProj, &mut *gate), (LinearKind::UpProj, &mut *up)];
        self.linears(x, wanted, low, down)?;
        let width = self.block.packed(LinearKind::GateProj).shape().0;
        by_rows(gate, width, |row, gate| {
            ops::swiglu_in_place(gate, &up[row * width..][..width])
        });
        Ok(())
    }

    /// `sum += linear(x)`, before `next` is multiplied; the layers that end a residual branch have no bias.
    pub(super) fn add_linear(
        &self,
        kind: LinearKind,
        x: &[f32],
        sum: &mut [f32],
        low: &mut Vec<f32>,
        next: &PackedMatrix,
    ) -> Result<(), ModelError> {
        multiply_into(self.block.packed(kind), x, sum, true, Some(next));
        self.add_low_rank(kind, x, sum, low)
    }

    /// A linear layer's product, with room made for it and its bias there already.
    fn begun(&self, kind: LinearKind, tokens: usize, out: &mut Vec<f32>) -> Result<Product<'_>, ModelError> {
        let matrix = self.block.packed(kind);
        let bias = self.block.linears[kind as usize].bias.as_ref();
        let width = matrix.shape().0;
        out.resize(tokens * width, 0.0);
        if let Some(bias) = bias {
            let bias = host_floats(bias)?;
            out.chunks_exact_mut(width).for_each(|row| row.copy_from_slice(&bias));
        }
        Ok(Product {
            matrix,
            // SAFETY: each product has a buffer of its own, which nobody else touches until it is multiplied: that shares
            // out its columns, and returns when all are done.
            out: unsafe { Output::shared(out, width) },
            accumulate: bias.is_some(),
        })
    }

    /// Whether the adapter changes this linear layer.
    fn adapts(&self, kind: LinearKind) -> bool {
        self.pass.adapter.is_some_and(|a| a.pair(self.number, kind).is_some())
    }

    /// `sum += scale * B A x` where the adapter changes this linear layer.
    fn add_low_rank(&self, kind: LinearKind, x: &[f32], sum: &mut [f32], low: &mut Vec<f32>) -> Result<(), ModelError> {
        let adapter = self.pass.adapter;
        let Some((adapter, pair)) = adapter.and_then(|a| Some((a, a.pair(self.number, kind)?))) else {
            return Ok(());
        };
        let pair = pair.packed()?;
        let ((rank, inputs), outputs) = (pair.a.shape(), pair.b.shape().0);
        let (rows, scale) = (x.len() / inputs, adapter.config().scale() as f32);
        let runs = self.pass.adapted.map(|adapted| adapted.runs(rows));
        for run in runs.unwrap_or_else(|| iter::once(0..rows).collect()) {
            let (x, sum) = (
                &x[run.start * inputs..run.end * inputs],
                &mut sum[run.start * outputs..run.end * outputs],
            );
            low.resize(run.len() * rank, 0.0);
            multiply_into(&pair.a, x, low, false, None);
            low.iter_mut().for_each(|v| *v *= scale);
            multiply_into(&pair.b, low, sum, true, None);
        }
        Ok(())
    }
}

impl Block {
    /// A linear layer's weight on the CPU path.
    pub(super) fn packed(&self, kind: LinearKind) -> &PackedMatrix {
        match self.linears[kind as usize].weight.packed() {
            Some(weight) => weight,
            None => unreachable!("a model on the CPU path has packed weights"),
        }
    }
}

pub(super) fn rows(data: &[f32], stride: usize) -> Rows<'_> {
    Rows { data, stride }
}
