//! The layer's backward pass.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::super::host::by_rows;
use super::{Kept, LayerOp, LowRank};
use crate::cpu::{Attended, Turned, attend_packed_backward, multiply_turned};
use crate::lora::LinearKind::{self, DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
use crate::ops::{self, host_floats};

/// The factors' gradients as they come about.
struct Factors<'a> {
    low: Vec<LowRank>,
    grads: &'a mut [f32],
}

impl LayerOp {
    /// `Layer::backward`.
    pub(super) fn run_back(
        &self,
        x: &[f32],
        mut kept: Kept,
        grad: &[f32],
        deep: bool,
        dfactors: &mut [f32],
    ) -> Result<Option<Vec<f32>>> {
        let (block, scratch) = (&self.block, &self.scratch);
        let mut factors = Factors {
            low: std::mem::take(&mut kept.low),
            grads: dfactors,
        };
        let dnormed = self.feed_forward_backward(&mut kept, grad, &mut factors)?;
        let mut dmiddle = scratch.copy(grad);
        self.add_norm_backward(&kept.middle, &block.post_attention_norm, &dnormed, &mut dmiddle)?;
        scratch.give([dnormed, std::mem::take(&mut kept.middle)]);

        // Below attention there may be nothing that is trained.
        let below = deep || self.terms.has_any(&[QProj, KProj, VProj]);
        let mut dmixed = scratch.take(if below { kept.mixed.len() } else { 0 });
        let to = below.then_some(&mut dmixed[..]);
        self.through(&[(OProj, &dmiddle)], Some(&kept.mixed), to, &mut factors);
        let mut dx = None;
        if below {
            let grads = self.attention_backward(&kept, &dmixed, deep)?;
            dx = self.input_backward(x, grads, &dmiddle, deep, &mut factors)?;
        }
        scratch.give([dmiddle, dmixed]);
        kept.low = factors.low;
        scratch.give(kept.into_buffers());
        Ok(dx)
    }

    /// The gradients of what the linear layers of queries, keys and values gave, where anything wants them.
    fn attention_backward(&self, kept: &Kept, dmixed: &[f32], deep: bool) -> Result<[Option<Vec<f32>>; 3]> {
        let scratch = &self.scratch;
        let (turned_q, turned_k) = (self.turned(QProj, &kept.q)?, self.turned(KProj, &kept.k)?);
        let of = Attended {
            q: &turned_q,
            k: &turned_k,
            v: &kept.v,
            out: &kept.mixed,
            log_sums: &kept.log_sums,
            grad: dmixed,
        };
        let wanted = |kind, like: &[f32]| (deep || self.terms.has(kind)).then(|| scratch.take(like.len()));
        let mut dq = wanted(QProj, &kept.q);
        let (mut dk, mut dv) = (wanted(KProj, &kept.k), wanted(VProj, &kept.v));
        let to = [dq.as_deref_mut(), dk.as_deref_mut(), dv.as_deref_mut()];
        attend_packed_backward(of, &self.read.sequences, self.block.shape, to);
        scratch.give([turned_q, turned_k]);
        self.turn_back(QProj, &kept.q, dq.as_mut())?;
        self.turn_back(KProj, &kept.k, dk.as_mut())?;
        Ok([dq, dk, dv])
    }

    /// The gradient of the feed-forward layer's normalised input. Gate and up become their own gradients.
    fn feed_forward_backward(&self, kept: &mut Kept, grad: &[f32], factors: &mut Factors) -> Result<Vec<f32>> {
        let (scratch, middle) = (&self.scratch, &kept.middle);
        let (mut gate, mut up) = (std::mem::take(&mut kept.gate), std::mem::take(&mut kept.up));
        let active = self.terms.has(DownProj).then(|| self.active(&gate, &up));
        let mut dactive = scratch.take(gate.len());
        self.through(&[(DownProj, grad)], active.as_deref(), Some(&mut dactive), factors);
        scratch.give(active);
        /// Elements that a thread takes at once.
        const AT_ONCE: usize = 1 << 15;
        let parts = gate.par_chunks_mut(AT_ONCE).zip(up.par_chunks_mut(AT_ONCE));
        parts
            .zip(dactive.par_chunks(AT_ONCE))
            .for_each(|((gate, up), grad)| ops::swiglu_grad_in_place(gate, up, grad));
        scratch.give([dactive]);
        let normed = match self.terms.has_any(&[GateProj, UpProj]) {
            true => Some(self.normed(middle, &self.block.post_attention_norm)?),
            false => None,
        };
        let mut dnormed = scratch.take(middle.len());
        let grads = [(GateProj, &gate[..]), (UpProj, &up[..])];
        self.through(&grads, normed.as_deref(), Some(&mut dnormed), factors);
        scratch.give(normed.into_iter().chain([gate, up]));
        Ok(dnormed)
    }

    /// From the gradients of queries, keys and values to that of the layer's input.
    fn input_backward(
        &self,
        x: &[f32],
        [dq, dk, dv]: [Option<Vec<f32>>; 3],
        dmiddle: &[f32],
        deep: bool,
        factors: &mut Factors,
    ) -> Result<Option<Vec<f32>>> {
        let (scratch, norm, hidden) = (&self.scratch, &self.block.input_norm, self.width(DownProj));
        let picked = self.inputs_back().map(|rows| self.pick(rows, x, hidden));
        let inputs = picked.as_deref().unwrap_or(x);
        let [dk, dv] = [(KProj, dk), (VProj, dv)].map(|(kind, grad)| self.of_inputs(kind, grad));
        let normed = match self.terms.has_any(&[QProj, KProj, VProj]) {
            true => Some(self.normed(inputs, norm)?),
            false => None,
        };
        let mut dnormed = deep.then(|| scratch.take(inputs.len()));
        let apart = self.asking_apart();
        let of_inputs: Vec<(LinearKind, &[f32])> = [(QProj, &dq), (KProj, &dk), (VProj, &dv)]
            .into_iter()
            .filter(|(kind, _)| apart.is_none() || *kind != QProj)
            .filter_map(|(kind, grad)| Some((kind, grad.as_deref()?)))
            .collect();
        self.through(&of_inputs, normed.as_deref(), dnormed.as_deref_mut(), factors);
        if let (Some((rows, places)), Some(dq)) = (&apart, &dq) {
            let mut part = deep.then(|| scratch.take(rows.len() * hidden));
            let mut asking = None;
            if self.terms.has(QProj) {
                let read = self.pick(rows, x, hidden);
                asking = Some(self.normed(&read, norm)?);
                scratch.give([read]);
            }
            self.through(&[(QProj, dq)], asking.as_deref(), part.as_deref_mut(), factors);
            if let (Some(dnormed), Some(part)) = (&mut dnormed, &part) {
                add_rows(dnormed, places, part, hidden);
            }
            scratch.give(part.into_iter().chain(asking));
        }
        scratch.give([dq, dk, dv, normed].into_iter().flatten());
        let Some(dnormed) = dnormed else {
            scratch.give(picked);
            return Ok(None);
        };
        let mut dx = match &apart {
            None => scratch.copy(dmiddle),
            Some((_, places)) => {
                let mut dx = scratch.take(inputs.len());
                dx.fill(0.0);
                add_rows(&mut dx, places, dmiddle, hidden);
                dx
            }
        };
        self.add_norm_backward(inputs, norm, &dnormed, &mut dx)?;
        scratch.give(picked.into_iter().chain([dnormed]));
        Ok(Some(dx))
    }

    /// Back through linear layers that had the same `input`, which only the adapter's terms read.
    fn through(
        &self,
        grads: &[(LinearKind, &[f32])],
        input: Option<&[f32]>,
        mut dx: Option<&mut [f32]>,
        factors: &mut Factors,
    ) {
        if let Some(dx) = dx.as_deref_mut().filter(|_| !grads.is_empty()) {
            let products = grads.iter().map(|&(kind, grad)| Turned {
                grad,
                matrix: self.matrix(kind),
            });
            multiply_turned(&products.collect::<Vec<_>>(), dx, false);
        }
        for &(kind, grad) in grads {
            let low = factors.low.iter().find(|low| low.kind() == kind);
            if let (Some(low), Some(input)) = (low, input) {
                let dx = dx.as_deref_mut();
                self.terms.backward(
                    low,
                    (input, grad),
                    factors.grads,
                    dx,
                    self.adapted_back(kind),
                    &self.scratch,
                );
            }
        }
    }

    /// Adds to `dx` the gradient of a norm's input.
    fn add_norm_backward(&self, x: &[f32], weight: &Tensor, grad: &[f32], dx: &mut [f32]) -> Result<()> {
        let (weight, eps) = (host_floats(weight)?, self.block.eps as f32);
        let (weight, width) = (&*weight, weight.len());
        by_rows(dx, width, |row, dx| {
            let at = row * width..(row + 1) * width;
            ops::rms_norm_grad_row(&x[at.clone()], weight, eps, &grad[at], dx);
        });
        Ok(())
    }

    /// The gradient of queries or keys with their positions in, to that of what the linear layer gave.
    fn turn_back(&self, kind: LinearKind, raw: &[f32], grad: Option<&mut Vec<f32>>) -> Result<()> {
        let Some(grad) = grad else { return Ok(()) };
        let width = self.width(kind);
        by_rows(grad, width, |row, heads| {
            self.rope.turn(heads, self.position(kind, row), -1.0)
        });
        if let Some(norm) = self.head_norm(kind) {
            let mut below = self.scratch.take(grad.len());
            below.fill(0.0);
            self.add_norm_backward(raw, norm, grad, &mut below)?;
            self.scratch.give([std::mem::replace(grad, below)]);
        }
        Ok(())
    }
}

/// Adds row i of `part` to row `places[i]` of `sum`, where it has one there.
fn add_rows(sum: &mut [f32], places: &[Option<usize>], part: &[f32], width: usize) {
    for (part, place) in part.chunks_exact(width).zip(places) {
        let Some(place) = place else { continue };
        let sum = &mut sum[place * width..][..width];
        sum.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
}
