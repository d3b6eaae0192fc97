//! The adapter's low-rank terms of one layer, forward and backward.

use candle_core::Result;

use super::layer::GpuLayer;
use super::pool::Rows;
use super::{Locked, Place};
use crate::gpu::kernels::{Drop, Factor};
use crate::gpu::work::Address;
use crate::lora::{LinearKind, Term};

/// Rows of a linear layer's input or output: where they begin, and the elements from one to the next.
pub(super) type Strided = (Address, usize);

/// What a term's forward pass leaves: `scale * A x`, `[rows, rank]` f32.
pub(super) struct Low {
    pub kind: LinearKind,
    pub low: Rows,
}

impl GpuLayer {
    /// `out += scale * B A x`, where the adapter changes this linear layer.
    ///
    /// - `x`: rows of the layer's inputs, without gaps
    pub(super) fn add_term(
        &self,
        on: &mut Locked,
        kind: LinearKind,
        x: Address,
        out: Strided,
        factors: Place,
    ) -> Result<Option<Low>> {
        let Some(term) = self.terms.get(kind) else {
            return Ok(None);
        };
        let of = self.rows_forward(kind);
        let rows = of.queries;
        let low = on.take_floats(rows * term.rank)?;
        let (a, b) = factors_at(term, factors.address);
        // SAFETY: the caller's rows, memory just taken for as many, and factors of the term's shapes.
        unsafe {
            let kernels = on.kernels();
            kernels.term_down(low.address(), (x, term.inputs), rows, a, of.scales, self.drop(kind))?;
            kernels.term_up(out, low.address(), rows, b, Drop::NONE)?;
        }
        Ok(Some(Low { kind, low }))
    }

    /// Writes the gradients of a term's factors and adds its part to `dx`, the gradient of its input, where that is wanted.
    ///
    /// - `x`: the input; `grad`: of the output
    pub(super) fn term_back(
        &self,
        on: &mut Locked,
        low: &Low,
        [x, dx]: [Option<Address>; 2],
        grad: Strided,
        [factors, dfactors]: [Place; 2],
    ) -> Result<()> {
        let (Some(term), Some(x)) = (self.terms.get(low.kind), x) else {
            return Ok(());
        };
        let (a, b) = factors_at(term, factors.address);
        let (da, db) = factors_at(term, dfactors.address);
        let drop = self.drop(low.kind).of_rows(self.places_forward(low.kind));
        let of = self.rows_back(low.kind);
        let rows = of.queries;
        let dlow = on.take_floats(rows * term.rank)?;
        let parts = on.take_floats(term_parts(rows, a).max(term_parts(rows, b)))?;
        // SAFETY: the caller's rows, memory just taken for as many, and factors of the term's shapes.
        unsafe {
            let kernels = on.kernels();
            kernels.term_down(dlow.address(), grad, rows, b, of.scales, Drop::NONE)?;
            kernels.term_outer(db, parts.address(), grad, low.low.address(), rows, Drop::NONE)?;
            kernels.term_outer(da, parts.address(), (x, term.inputs), dlow.address(), rows, drop)?;
            if let Some(dx) = dx {
                kernels.term_up((dx, term.inputs), dlow.address(), rows, a, drop)?;
            }
        }
        on.give([dlow, parts]);
        Ok(())
    }

    /// What is dropped of a term's inputs: each term draws its own.
    fn drop(&self, kind: LinearKind) -> Drop {
        match self.dropout {
            None => Drop::NONE,
            Some((probability, seed)) => Drop::new(probability, mixed(seed ^ (kind as u64 + 1))),
        }
    }
}

fn term_parts(rows: usize, factor: Factor) -> usize {
    crate::gpu::kernels::Kernels::term_parts(rows, factor)
}

/// A and B of a term among all factors, or their gradients.
fn factors_at(term: Term, factors: Address) -> (Factor, Factor) {
    let at = |start: usize| factors + (start * size_of::<f32>()) as Address;
    (
        Factor::a(at(term.a().start), term.rank, term.inputs),
        Factor::b(at(term.b().start), term.rank, term.outputs),
    )
}

/// A seed far from those of the other terms: the kernels count up from it.
fn mixed(seed: u64) -> u64 {
    let z = (seed ^ seed >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let z = (z ^ z >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    z ^ z >> 33
}
