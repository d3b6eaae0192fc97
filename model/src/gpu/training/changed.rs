//! A backward pass that stays within the rows that an adapter changes, as on the CPU path (`network/layer/changed.rs`).

use std::borrow::Cow;

use candle_core::{DType, Result};

use super::Locked;
use super::inputs::Reading;
use super::layer::{GpuLayer, Kept, Reads};
use super::pool::Rows;
use crate::gpu::kernels::Kernels;
use crate::gpu::work::Address;
use crate::lora::LinearKind;

impl GpuLayer {
    /// The layer as the backward pass reads it: the changed rows of one whose rows are all read.
    pub(super) fn as_read_back(&self) -> Cow<'_, Self> {
        match (self.reads, &self.inputs.changed) {
            (Reads::All, Some(_)) => Cow::Owned(Self {
                reads: Reads::Changed,
                ..self.clone()
            }),
            _ => Cow::Borrowed(self),
        }
    }

    /// The rows that a linear layer has in the forward pass.
    pub(super) fn rows_forward(&self, kind: LinearKind) -> &Reading {
        if kind.is_of_every_token() {
            &self.inputs.all
        } else {
            self.read()
        }
    }

    /// Those that it has in the backward pass: keys and values that are unchanged have no gradient.
    pub(super) fn rows_back(&self, kind: LinearKind) -> &Reading {
        match &self.inputs.changed {
            Some(changed) if kind.is_of_every_token() => changed,
            _ => self.rows_forward(kind),
        }
    }

    /// The places of these in the forward pass, 0 where they were the same.
    pub(super) fn places_forward(&self, kind: LinearKind) -> Address {
        match kind.is_of_every_token() || self.reads == Reads::Changed {
            true => self.rows_back(kind).rows,
            false => 0,
        }
    }

    /// What the backward pass reads of a forward pass.
    pub(super) fn changed_of(&self, on: &mut Locked, mut kept: Kept) -> Result<Kept> {
        let Some(changed) = &self.inputs.changed else {
            return Ok(kept);
        };
        if self.reads == Reads::All {
            let (sizes, heads) = (self.sizes(), self.shape().heads);
            for (all, width) in [
                (&mut kept.q, sizes.q_width),
                (&mut kept.mixed, sizes.q_width),
                (&mut kept.middle, sizes.hidden),
                (&mut kept.gate_up, 2 * sizes.inner),
            ] {
                let picked = self.pick(on, changed, all.address(), width)?;
                on.give([std::mem::replace(all, picked)]);
            }
            keep_floats(on, changed, &mut kept.log_sums, heads)?;
        }
        for low in &mut kept.low {
            if let Some(term) = self.terms.get(low.kind)
                && (self.reads == Reads::All || low.kind.is_of_every_token())
            {
                keep_floats(on, changed, &mut low.low, term.rank)?;
            }
        }
        Ok(kept)
    }
}

/// The changed rows of all, f32, in their place.
fn keep_floats(on: &mut Locked, changed: &Reading, all: &mut Rows, width: usize) -> Result<()> {
    let (rows, kept) = (changed.queries, on.take_floats(changed.queries * width)?);
    let kernels = Kernels {
        dtype: DType::F32,
        ..on.kernels()
    };
    // SAFETY: memory was just taken for as many rows, and the changed are among all.
    unsafe { kernels.gather_rows(kept.address(), all.address(), changed.rows, rows, width)? };
    on.give([std::mem::replace(all, kept)]);
    Ok(())
}
