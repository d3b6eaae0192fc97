//! The weights before training.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Result, Tensor, Var};
use lengthwise_model::{LinearKind, ModelConfig};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The embedding, which is the head too.
pub(super) const EMBEDDING: &str = "model.embed_tokens.weight";

/// Every parameter under its Hugging Face name, as a variable. Matrices are uniform with variance 1 / inputs, those
/// that write to the residual stream smaller by sqrt(2 * layers) (GPT-2), the embedding with deviation 0.02.
pub(super) fn parameters(config: &ModelConfig, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = |shape: (usize, usize), deviation: f64| {
        let bound = (deviation * 3f64.sqrt()) as f32;
        let data: Vec<f32> = (0..shape.0 * shape.1)
            .map(|_| rng.random_range(-bound..bound))
            .collect();
        variable(&Tensor::from_vec(data, shape, &Device::Cpu)?)
    };
    let hidden = config.hidden_size;
    let mut parameters = BTreeMap::new();
    parameters.insert(EMBEDDING.to_owned(), uniform((config.vocab_size, hidden), 0.02)?);
    for layer in 0..config.num_hidden_layers {
        for kind in LinearKind::ALL {
            let shape = kind.shape(config);
            let residual = match kind {
                LinearKind::OProj | LinearKind::DownProj => (2.0 * config.num_hidden_layers as f64).sqrt(),
                _ => 1.0,
            };
            let weight = uniform(shape, 1.0 / (shape.1 as f64).sqrt() / residual)?;
            parameters.insert(format!("model.layers.{layer}.{}.weight", kind.path()), weight);
        }
    }
    let norms = (0..config.num_hidden_layers)
        .flat_map(|i| ["input", "post_attention"].map(|n| format!("model.layers.{i}.{n}_layernorm.weight")));
    for name in norms.chain(["model.norm.weight".to_owned()]) {
        parameters.insert(name, variable(&Tensor::ones(hidden, DType::F32, &Device::Cpu)?)?);
    }
    Ok(parameters)
}

fn variable(tensor: &Tensor) -> Result<Tensor> {
    Ok(Var::from_tensor(tensor)?.as_tensor().clone())
}
