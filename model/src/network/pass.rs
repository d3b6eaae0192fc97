//! What the layers of one forward pass share.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use crate::lora::{Adapter, Dropout};
use crate::ops::{CachedRow, RopeTable};
use crate::{BlockTable, ModelError};

/// New tokens of one sequence in a forward pass.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// The tokens: a prompt, a part of one, or the last token sampled.
    pub tokens: &'a [u32],
    /// How many tokens of the sequence the cache already holds.
    pub start: usize,
    /// The sequence's blocks, with room for `start + tokens.len()`.
    pub table: &'a BlockTable,
    /// Whether the pass' adapter, if it has one, changes this segment: segments with and without it share a pass.
    pub adapted: bool,
}

/// Where a pass finds keys and values.
pub(super) enum Attention<'a> {
    /// Each sequence is whole in this pass; its length in tokens.
    Packed(Arc<[usize]>),
    /// Earlier tokens are in the cache, and the new ones go there.
    Cached {
        /// One per layer, as the values.
        keys: &'a [Tensor],
        values: &'a [Tensor],
        rows: &'a [CachedRow],
    },
}

/// Everything besides the hidden states that a layer needs.
pub(super) struct Pass<'a> {
    /// Position of every packed token in its sequence.
    pub positions: Arc<[u32]>,
    pub rope: &'a Arc<RopeTable>,
    pub adapter: Option<&'a Adapter>,
    /// Where some rows are without the adapter: which have it.
    pub unadapted: Option<RowMask>,
    pub dropout: Option<&'a Dropout>,
    pub attention: Attention<'a>,
}

/// 1 for rows with the adapter, 0 for those without, f32.
pub(super) struct RowMask {
    /// `[tokens, 1]`.
    all: Tensor,
    /// Of each segment's last row, `[segments, 1]`.
    last: Tensor,
}

impl RowMask {
    /// `x` (`[tokens, n]` or `[segments, n]`) with the rows that have no adapter emptied.
    pub fn apply(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mask = if x.dim(0)? == self.all.dim(0)? {
            &self.all
        } else {
            &self.last
        };
        x.broadcast_mul(&mask.to_dtype(x.dtype())?)
    }
}

/// The mask that segments without the adapter need.
pub(super) fn unadapted(segments: &[Segment], device: &Device) -> candle_core::Result<Option<RowMask>> {
    if segments.iter().all(|s| s.adapted) {
        return Ok(None);
    }
    let factor = |segment: &Segment| if segment.adapted { 1f32 } else { 0.0 };
    let all = segments.iter().flat_map(|s| vec![factor(s); s.tokens.len()]);
    let column = |rows: Vec<f32>| Tensor::from_slice(&rows, (rows.len(), 1), device);
    Ok(Some(RowMask {
        all: column(all.collect())?,
        last: column(segments.iter().map(factor).collect())?,
    }))
}

/// Every segment has tokens, and blocks for them.
pub(super) fn check(segments: &[Segment]) -> Result<(), ModelError> {
    for segment in segments {
        let (needed, capacity) = (segment.start + segment.tokens.len(), segment.table.capacity());
        if segment.tokens.is_empty() || capacity < needed {
            return Err(ModelError::BlockTableTooShort { needed, capacity });
        }
    }
    Ok(())
}

/// The cache rows of every segment's positions.
pub(super) fn cached_rows(segments: &[Segment]) -> Vec<CachedRow> {
    let row = |segment: &Segment| CachedRow {
        queries: segment.tokens.len(),
        start: segment.start,
        slots: (0..segment.start + segment.tokens.len())
            .map(|p| segment.table.slot(p))
            .collect(),
    };
    segments.iter().map(row).collect()
}
