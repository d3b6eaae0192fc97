//! Where an adapter's factors lie when they are one tensor: what the layers of a training pass, as one operation, get.

use std::ops::Range;

use candle_core::{DType, Device, Result, Tensor};

use super::{Adapter, LinearKind};

/// Which linear layers of a block have a low-rank term, and where its factors lie among those of all layers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Terms {
    terms: Vec<Term>,
    /// `alpha / rank`.
    pub scale: f32,
    end: usize,
}

/// The term of one linear layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Term {
    pub kind: LinearKind,
    pub rank: usize,
    pub inputs: usize,
    pub outputs: usize,
    /// Where A begins; B follows it.
    start: usize,
}

impl Term {
    /// The place of A, `[rank, inputs]`.
    pub fn a(&self) -> Range<usize> {
        self.start..self.start + self.rank * self.inputs
    }

    /// The place of B, `[outputs, rank]`.
    pub fn b(&self) -> Range<usize> {
        self.a().end..self.a().end + self.outputs * self.rank
    }
}

impl Terms {
    /// The terms of a layer, whose factors begin at `start`.
    pub fn of(adapter: Option<&Adapter>, layer: usize, start: usize) -> Result<Self> {
        let (mut terms, mut end) = (Vec::new(), start);
        for kind in LinearKind::ALL {
            let Some(pair) = adapter.and_then(|a| a.pair(layer, kind)) else {
                continue;
            };
            let ((rank, inputs), (outputs, _)) = (pair.a.dims2()?, pair.b.dims2()?);
            let term = Term {
                kind,
                rank,
                inputs,
                outputs,
                start: end,
            };
            end = term.b().end;
            terms.push(term);
        }
        let scale = adapter.map_or(0.0, |a| a.config().scale() as f32);
        Ok(Self { terms, scale, end })
    }

    pub fn get(&self, kind: LinearKind) -> Option<Term> {
        self.terms.iter().find(|t| t.kind == kind).copied()
    }

    pub fn has(&self, kind: LinearKind) -> bool {
        self.get(kind).is_some()
    }

    pub fn has_any(&self, kinds: &[LinearKind]) -> bool {
        kinds.iter().any(|&kind| self.has(kind))
    }

    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    /// Where the next layer's factors begin.
    pub fn end(&self) -> usize {
        self.end
    }
}

/// The factors of the terms of `layers` one behind the other, with their graph; never empty.
pub(crate) fn flat_factors(adapter: Option<&Adapter>, layers: Range<usize>, device: &Device) -> Result<Tensor> {
    let mut factors = Vec::new();
    for layer in layers {
        for kind in LinearKind::ALL {
            if let Some(pair) = adapter.and_then(|a| a.pair(layer, kind)) {
                factors.extend([pair.a.flatten_all()?, pair.b.flatten_all()?]);
            }
        }
    }
    match factors.is_empty() {
        true => Tensor::zeros(1, DType::F32, device),
        false => Tensor::cat(&factors, 0),
    }
}
