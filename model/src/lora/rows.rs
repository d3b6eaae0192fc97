//! Which rows of a pass an adapter changes.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};

/// The rows of a pass that an adapter changes, where that is not all of them.
#[derive(Debug, Clone)]
pub(crate) struct AdaptedRows {
    /// Of every packed token.
    all: Vec<bool>,
    /// Of the tokens whose output is read, which the last layer goes on with alone.
    read: Vec<bool>,
}

impl AdaptedRows {
    /// `None` where it changes all.
    ///
    /// - `sequences`: of each in the pass its tokens, and the first that the adapter changes
    /// - `read`: packed rows, ascending
    pub fn new(sequences: impl Iterator<Item = (usize, usize)>, read: impl Iterator<Item = usize>) -> Option<Self> {
        let all: Vec<bool> = sequences
            .flat_map(|(tokens, from)| (0..tokens).map(move |token| token >= from))
            .collect();
        if all.iter().all(|adapted| *adapted) {
            return None;
        }
        let read = read.map(|row| all[row]).collect();
        Some(Self { all, read })
    }

    /// Whether it changes a packed row.
    #[cfg(any(feature = "cuda", feature = "kernel-emulation"))]
    pub fn changes(&self, row: usize) -> bool {
        self.all[row]
    }

    /// The packed rows that it changes, ascending.
    pub fn changed(&self) -> Vec<u32> {
        let rows = self.all.iter().zip(0..);
        rows.filter(|(changed, _)| **changed).map(|(_, row)| row).collect()
    }

    /// Of `rows` rows, which are all or those that are read.
    fn among(&self, rows: usize) -> &[bool] {
        if rows == self.all.len() { &self.all } else { &self.read }
    }

    /// The rows that it changes of `rows` rows, which are all or those that are read.
    pub fn runs(&self, rows: usize) -> Vec<Range<usize>> {
        let mut row = 0;
        let runs = self.among(rows).chunk_by(|a, b| a == b).map(|run| {
            row += run.len();
            (run[0], row - run.len()..row)
        });
        runs.filter(|(adapted, _)| *adapted).map(|(_, run)| run).collect()
    }

    /// Empties the rows of `low` (`[rows, rank]`) that it does not change.
    pub fn keep(&self, low: &mut [f32], rank: usize) {
        let adapted = self.among(low.len() / rank);
        for (low, _) in low
            .chunks_exact_mut(rank)
            .zip(adapted)
            .filter(|(_, adapted)| !**adapted)
        {
            low.fill(0.0);
        }
    }

    /// The same as a tensor of `device`.
    pub fn on(&self, device: &Device) -> Result<RowMask> {
        let column = |rows: &[bool]| {
            let rows: Vec<f32> = rows.iter().map(|adapted| f32::from(u8::from(*adapted))).collect();
            Tensor::from_slice(&rows, (rows.len(), 1), device)
        };
        Ok(RowMask {
            all: column(&self.all)?,
            read: column(&self.read)?,
        })
    }
}

/// 1 for the rows that an adapter changes, 0 for the others, f32.
#[derive(Debug, Clone)]
pub(crate) struct RowMask {
    /// `[tokens, 1]`.
    all: Tensor,
    /// `[read, 1]`.
    read: Tensor,
}

impl RowMask {
    /// `x` (`[tokens, n]` or `[read, n]`) with the rows emptied that the adapter does not change.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let mask = if x.dim(0)? == self.all.dim(0)? {
            &self.all
        } else {
            &self.read
        };
        x.broadcast_mul(&mask.to_dtype(x.dtype())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rows_of_each_sequence_from_its_own_first_on() {
        // Three tokens from the second on, two without, one with.
        let sequences = [(3, 1), (2, usize::MAX), (1, 0)];
        let rows = AdaptedRows::new(sequences.into_iter(), [0, 4, 5].into_iter()).expect("some are without");
        assert_eq!(rows.runs(6), [1..3, 5..6]);
        assert_eq!(rows.changed(), [1, 2, 5]);
        // The rows 0, 4 and 5, which are read.
        assert!(rows.runs(3).iter().eq([&(2..3)]));
        let mut low: Vec<f32> = (1..=12).map(|i| i as f32).collect();
        rows.keep(&mut low, 2);
        assert_eq!(low, [0.0, 0.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0, 0.0, 0.0, 11.0, 12.0]);
        assert!(
            AdaptedRows::new([(3, 0)].into_iter(), [2].into_iter()).is_none(),
            "all are with"
        );
    }
}
