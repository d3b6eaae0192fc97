//! A backward pass that stays within the rows that an adapter changes: what the others give depends on none of its factors,
//! so no gradient has to pass through them. Their keys and values are all that is read of them.

use std::borrow::Cow;
use std::sync::Arc;

use super::{Kept, LayerOp, LowRank, Read};
use crate::lora::{AdaptedRows, LinearKind};

impl Read {
    /// These rows of the same sequences.
    pub(super) fn of(&self, rows: Vec<u32>) -> Self {
        Self {
            sequences: Arc::new(self.sequences.asked_by(&rows)),
            rows: Some(rows.into()),
        }
    }
}

impl LayerOp {
    /// The layer as the backward pass reads it: the changed rows of one whose rows are all read.
    pub(super) fn as_read_back(&self) -> Cow<'_, Self> {
        match &self.changed {
            Some(changed) if self.read.rows.is_none() => Cow::Owned(Self {
                read: changed.clone(),
                // All of them are.
                adapted: None,
                ..self.clone()
            }),
            _ => Cow::Borrowed(self),
        }
    }

    /// The packed rows whose input the backward pass gives a gradient, where that is not all.
    pub(super) fn inputs_back(&self) -> Option<&Arc<[u32]>> {
        self.changed.as_ref()?.rows.as_ref()
    }

    /// What the backward pass reads of a forward pass.
    pub(super) fn changed_of(&self, mut kept: Kept) -> Kept {
        let Some(rows) = self.inputs_back() else {
            return kept;
        };
        if self.read.rows.is_none() {
            let hidden = self.width(LinearKind::DownProj);
            let (queries, inner) = (self.width(LinearKind::QProj), self.width(LinearKind::GateProj));
            let widths = [queries, queries, self.block.shape.heads, hidden, inner, inner];
            let Kept {
                q,
                mixed,
                log_sums,
                middle,
                gate,
                up,
                ..
            } = &mut kept;
            for (all, width) in [q, mixed, log_sums, middle, gate, up].into_iter().zip(widths) {
                self.keep(rows, all, width);
            }
        }
        for low in &mut kept.low {
            if self.read.rows.is_none() || low.kind().is_of_every_token() {
                self.keep_low(rows, low);
            }
        }
        kept
    }

    fn keep(&self, rows: &[u32], all: &mut Vec<f32>, width: usize) {
        let kept = self.pick(rows, all, width);
        self.scratch.give([std::mem::replace(all, kept)]);
    }

    fn keep_low(&self, rows: &[u32], low: &mut LowRank) {
        self.keep(rows, &mut low.low, low.term.rank);
        low.mask = low.mask.as_ref().map(|mask| mask.of_rows(rows, low.term.inputs));
    }

    /// The rows that the adapter changes of those that the backward pass has of a linear layer, where that is not all.
    pub(super) fn adapted_back(&self, kind: LinearKind) -> Option<&AdaptedRows> {
        let within = kind.is_of_every_token() && self.changed.is_some();
        self.adapted.as_deref().filter(|_| !within)
    }

    /// The rows that ask, where those are not the ones whose inputs have a gradient, and the place of each among these; `None`
    /// where it has none.
    pub(super) fn asking_apart(&self) -> Option<(&[u32], Vec<Option<usize>>)> {
        let (read, inputs) = (self.read.rows.as_ref()?, self.inputs_back());
        let place = |row: &u32| match inputs {
            Some(rows) => rows.binary_search(row).ok(),
            None => Some(*row as usize),
        };
        let same = inputs.is_some_and(|rows| Arc::ptr_eq(rows, read));
        (!same).then(|| (&read[..], read.iter().map(place).collect()))
    }

    /// Of the gradient of keys or values the rows whose inputs have one.
    pub(super) fn of_inputs(&self, kind: LinearKind, grad: Option<Vec<f32>>) -> Option<Vec<f32>> {
        let mut grad = grad?;
        if let Some(rows) = self.inputs_back() {
            self.keep(rows, &mut grad, self.width(kind));
        }
        Some(grad)
    }
}
