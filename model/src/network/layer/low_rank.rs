//! The adapter's low-rank terms of one layer, forward and backward.

use std::borrow::Cow;

use crate::cpu::{PackedMatrix, Scratch, Turned, multiply_into, multiply_turned, outer};
use crate::lora::{AdaptedRows, Dropout, LinearKind, Mask, Term, Terms};

impl Terms {
    /// A forward pass through the terms.
    pub(super) fn forward<'a>(
        &'a self,
        factors: &'a [f32],
        adapted: Option<&'a AdaptedRows>,
        dropout: Option<(f64, u64)>,
        scratch: &'a Scratch,
    ) -> Forward<'a> {
        Forward {
            terms: self,
            factors,
            adapted,
            dropout: dropout.map(|(probability, seed)| Dropout::new(probability, seed)),
            scratch,
            done: Vec::new(),
        }
    }

    /// Writes the gradients of a term's factors into `dfactors`, and adds its part to the gradient of its input.
    ///
    /// - `input`: `[t, inputs]`; `grad`: `[t, outputs]`
    pub(super) fn backward(
        &self,
        low: &LowRank,
        (input, grad): (&[f32], &[f32]),
        dfactors: &mut [f32],
        dx: Option<&mut [f32]>,
        adapted: Option<&AdaptedRows>,
        scratch: &Scratch,
    ) {
        let term = low.term;
        let (rank, inputs) = (term.rank, term.inputs);
        let mut dlow = scratch.take(low.low.len());
        let through = Turned { grad, matrix: &low.b };
        multiply_turned(&[through], &mut dlow, false);
        dlow.iter_mut().for_each(|v| *v *= self.scale);
        if let Some(rows) = adapted {
            rows.keep(&mut dlow, rank);
        }
        let db = &mut dfactors[term.b()];
        outer(grad, term.outputs, &low.low, rank, |o, r, sum| db[o * rank + r] = sum);
        let dropped = dropped(input, low.mask.as_ref(), scratch);
        let da = &mut dfactors[term.a()];
        outer(&dropped, inputs, &dlow, rank, |i, r, sum| da[r * inputs + i] = sum);
        if let Cow::Owned(dropped) = dropped {
            scratch.give([dropped]);
        }
        if let Some(dx) = dx {
            let through = Turned {
                grad: &dlow,
                matrix: &low.a,
            };
            match &low.mask {
                None => multiply_turned(&[through], dx, true),
                Some(mask) => {
                    let mut part = scratch.take(dx.len());
                    multiply_turned(&[through], &mut part, false);
                    mask.apply(&mut part);
                    dx.iter_mut().zip(&part).for_each(|(dx, part)| *dx += part);
                    scratch.give([part]);
                }
            }
        }
        scratch.give([dlow]);
    }
}

/// What the backward pass reads of a term's forward pass.
pub(super) struct LowRank {
    pub term: Term,
    a: PackedMatrix,
    b: PackedMatrix,
    /// `scale * A x`, `[t, rank]`.
    pub low: Vec<f32>,
    pub mask: Option<Mask>,
}

impl LowRank {
    pub fn kind(&self) -> LinearKind {
        self.term.kind
    }

    /// Its buffer.
    pub fn into_low(self) -> Vec<f32> {
        self.low
    }
}

/// A forward pass through a layer's terms, in the order of [`LinearKind::ALL`].
pub(super) struct Forward<'a> {
    terms: &'a Terms,
    factors: &'a [f32],
    adapted: Option<&'a AdaptedRows>,
    dropout: Option<Dropout>,
    scratch: &'a Scratch,
    done: Vec<LowRank>,
}

impl Forward<'_> {
    /// `out += scale * B A x`, where the adapter changes this linear layer.
    pub fn add(&mut self, kind: LinearKind, x: &[f32], out: &mut [f32]) {
        let Some(term) = self.terms.get(kind) else {
            return;
        };
        let a = PackedMatrix::pack(&self.factors[term.a()], term.rank, term.inputs);
        let b = PackedMatrix::pack(&self.factors[term.b()], term.outputs, term.rank);
        let mask = self.dropout.as_ref().and_then(|d| d.mask(x.len()));
        let dropped = dropped(x, mask.as_ref(), self.scratch);
        let mut low = self.scratch.take(x.len() / term.inputs * term.rank);
        multiply_into(&a, &dropped, &mut low, false, None);
        low.iter_mut().for_each(|v| *v *= self.terms.scale);
        if let Some(rows) = self.adapted {
            rows.keep(&mut low, term.rank);
        }
        multiply_into(&b, &low, out, true, None);
        if let Cow::Owned(dropped) = dropped {
            self.scratch.give([dropped]);
        }
        self.done.push(LowRank { term, a, b, low, mask });
    }

    pub fn finish(self) -> Vec<LowRank> {
        self.done
    }
}

fn dropped<'a>(x: &'a [f32], mask: Option<&Mask>, scratch: &Scratch) -> Cow<'a, [f32]> {
    match mask {
        None => Cow::Borrowed(x),
        Some(mask) => {
            let mut x = scratch.copy(x);
            mask.apply(&mut x);
            Cow::Owned(x)
        }
    }
}
