//! Hidden states on their way from the device to whoever reads a length off them.

use candle_core::{DType, Result};
use half::{bf16, f16};

use super::backend::CopyBack;

/// Rows of what the last norm gave: all from the first that is wanted to the last.
#[derive(Debug)]
pub(crate) struct HiddenCopy {
    pub words: CopyBack,
    /// Of the values in the words.
    pub dtype: DType,
    /// Values of a row.
    pub width: usize,
    /// The rows that are wanted, counted from the first one copied.
    pub rows: Vec<usize>,
}

impl HiddenCopy {
    /// Waits for the copy, not for what was launched behind it. Returns the rows that are wanted, `[hidden]` each.
    pub fn wait(self) -> Result<Vec<Vec<f32>>> {
        let words = self.words.wait()?;
        let bytes: &[u8] = bytemuck::cast_slice(&words);
        let values: Vec<f32> = match self.dtype {
            DType::BF16 => widened(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            DType::F16 => widened(bytes, |b| f16::from_le_bytes(b).to_f32()),
            _ => widened(bytes, f32::from_le_bytes),
        };
        let row = |row: &usize| values[row * self.width..][..self.width].to_vec();
        Ok(self.rows.iter().map(row).collect())
    }
}

fn widened<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| read(*chunk)).collect()
}
