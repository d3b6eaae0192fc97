//! What the layers of one forward pass share.

use std::sync::Arc;

use candle_core::Tensor;

use crate::lora::{AdaptedRows, Adapter, Dropout, RowMask};
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
    /// The first of the tokens that the pass' adapter, if it has one, changes: those before it go without, and all of them
    /// where it is `tokens.len()` or more. Segments with and without it share a pass.
    pub adapted_from: usize,
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
    pub adapted: Option<RowMask>,
    pub dropout: Option<&'a Dropout>,
    pub attention: Attention<'a>,
}

/// The rows that the adapter changes, where that is not all; each segment's last are read.
pub(super) fn adapted_rows(segments: &[Segment]) -> Option<AdaptedRows> {
    let mut rows = 0;
    let last = |segment: &Segment| {
        rows += segment.tokens.len();
        rows - 1
    };
    let sequences = segments.iter().map(|s| (s.tokens.len(), s.adapted_from));
    AdaptedRows::new(sequences, segments.iter().map(last))
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
