//! Writing tensors.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use candle_core::Tensor;

use crate::ModelError;

/// Writes a safetensors file. candle's own `save` goes through a temporary file that its owner alone may read, and its
/// error names no file; here the file has the mode that the process gives every file.
///
/// # Errors
/// The file cannot be written; nothing is left of it then.
pub fn save_tensors(tensors: &HashMap<String, Tensor>, path: &Path) -> Result<(), ModelError> {
    let bytes = safetensors::serialize(tensors, None).map_err(candle_core::Error::from)?;
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(&bytes)?;
        file.sync_all()
    };
    write().map_err(|source| {
        // Half a file helps nobody; the first error is the one to tell.
        let _ = fs::remove_file(path);
        ModelError::Io {
            path: path.to_owned(),
            source,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn tensors() -> anyhow::Result<HashMap<String, Tensor>> {
        let tensor = Tensor::new(&[1f32, 2.0], &Device::Cpu)?;
        Ok(HashMap::from([("x".to_owned(), tensor)]))
    }

    #[cfg(unix)]
    #[test]
    fn weights_may_be_read_by_whom_other_files_may_be() -> anyhow::Result<()> {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir()?;
        let (text, weights) = (dir.path().join("x.json"), dir.path().join("x.safetensors"));
        fs::write(&text, "{}")?;
        save_tensors(&tensors()?, &weights)?;
        let mode = |path: &Path| fs::metadata(path).map(|m| m.permissions().mode());
        assert_eq!(mode(&weights)?, mode(&text)?);
        let back = candle_core::safetensors::load(&weights, &Device::Cpu)?;
        assert_eq!(back["x"].to_vec1::<f32>()?, [1.0, 2.0]);
        Ok(())
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("missing/x.safetensors");
        let err = save_tensors(&tensors()?, &path)
            .expect_err("no such folder")
            .to_string();
        assert!(err.starts_with(&path.display().to_string()), "{err}");
        Ok(())
    }
}
