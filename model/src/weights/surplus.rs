//! Tensors of a checkpoint that its network has no place for.

use std::path::Path;

use super::{Source, Weights};

/// Names that are told; of the others the number is.
const TOLD: usize = 2;

impl Weights {
    /// Warns, once the network is built, of tensors that it did not take: an answer without them may be another model's.
    pub(crate) fn warn_of_surplus(&self, folder: &Path) {
        let surplus = self.surplus();
        if let Some(names) = told(&surplus) {
            tracing::warn!(
                "{}: {} tensors are not used, since the network of config.json has none such: {names}",
                folder.display(),
                surplus.len(),
            );
        }
    }

    /// The names that were not asked for, in order.
    fn surplus(&self) -> Vec<String> {
        let taken = self.taken.borrow();
        let mut names: Vec<String> = self.names().into_iter().filter(|name| !taken.contains(name)).collect();
        names.retain(|name| !says_nothing(name));
        names.sort_unstable();
        names
    }

    fn names(&self) -> Vec<String> {
        match &self.source {
            Source::Memory(tensors) => tensors.keys().cloned().collect(),
            Source::Buffer(file) => file.tensors().into_iter().map(|(name, _)| name).collect(),
            Source::Safetensors(files) => files.names().cloned().collect(),
            Source::Pickle(files) => files.iter().flat_map(|file| file.names().cloned()).collect(),
        }
    }
}

/// What many checkpoints hold beside what they need: the rotary frequencies, which follow from config.json, and a head,
/// which is taken unless it is the embeddings once more.
fn says_nothing(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || name == "lm_head.weight"
}

/// The first names; `None` where there is none.
fn told(names: &[String]) -> Option<String> {
    let first = names[..names.len().min(TOLD)].join(", ");
    match names.len() {
        0 => None,
        n if n > TOLD => Some(format!("{first} and others")),
        _ => Some(first),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use candle_core::{DType, Device, Tensor};

    use super::*;

    #[test]
    fn what_was_not_asked_for_is_surplus_unless_it_says_nothing() -> anyhow::Result<()> {
        let names = [
            "w",
            "b.1",
            "b.0",
            "lm_head.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
        ];
        let tensor = Tensor::zeros(2, DType::F32, &Device::Cpu)?;
        let tensors: HashMap<String, Tensor> = names.map(|name| (name.to_owned(), tensor.clone())).into();
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("model.safetensors");
        candle_core::safetensors::save(&tensors, &path)?;
        let of_file = Weights::open(dir.path(), DType::F32, &Device::Cpu)?;
        let of_bytes = Weights::from_bytes(std::fs::read(&path)?, DType::F32, &Device::Cpu)?;
        let of_memory = Weights::from_tensors(tensors, DType::F32, &Device::Cpu);
        for weights in [of_file, of_bytes, of_memory] {
            assert_eq!(weights.surplus(), ["b.0", "b.1", "w"]);
            weights.get("w", &[2])?;
            assert_eq!(weights.surplus(), ["b.0", "b.1"]);
        }
        Ok(())
    }

    #[test]
    fn two_are_named() {
        let names = |n: usize| (0..n).map(|i| format!("t{i}")).collect::<Vec<_>>();
        assert_eq!(told(&names(0)), None);
        assert_eq!(told(&names(2)).as_deref(), Some("t0, t1"));
        assert_eq!(told(&names(3)).as_deref(), Some("t0, t1 and others"));
    }
}
