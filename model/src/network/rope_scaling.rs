//! The frequencies of the rotary embedding, stretched where the config asks for it.

use std::f64::consts::PI;

use crate::ModelConfig;
use crate::config::RopeScaling;

/// `theta^(-2i / head_dim)` for every pair of elements, scaled; `[head_dim / 2]`.
///
/// Source of the scaled ones: `modeling_rope_utils.py` of transformers.
pub(super) fn inverse_frequencies(config: &ModelConfig) -> Vec<f32> {
    let dim = config.head_dim;
    let plain = (0..dim / 2).map(|i| config.rope_theta.powf(-((2 * i) as f64) / dim as f64));
    plain.map(|f| scale(f, &config.rope_scaling) as f32).collect()
}

fn scale(frequency: f64, scaling: &RopeScaling) -> f64 {
    match *scaling {
        RopeScaling::None => frequency,
        RopeScaling::Linear { factor } => frequency / factor,
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let wavelength = 2.0 * PI / frequency;
            let turns = original_max_position_embeddings / wavelength;
            // 0 for the low frequencies, 1 for the high ones.
            let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            frequency / factor * (1.0 - keep) + frequency * keep
        }
    }
}
