//! The cost model of this model on this device: measured once, then read from the user's cache.

use std::hash::Hasher;
use std::path::PathBuf;

use anyhow::Context;
use lengthwise_decoder::{Engine, EngineConfig};
use lengthwise_model::LoadedModel;
use lengthwise_scheduler::{CostModel, CostPoint};
use lengthwise_train::files::write_atomic;
use serde::{Deserialize, Serialize};

use crate::commands::profile::{ProfilePoint, profile_point};
use crate::progress::Bar;

/// Batch sizes and contexts that are measured: enough to tell the terms apart, rows from cached tokens and few from many of
/// each, few enough for a minute or so.
const POINTS: [(usize, usize); 13] = [
    (1, 32),
    (1, 512),
    (4, 128),
    (8, 32),
    (8, 128),
    (8, 256),
    (16, 32),
    (16, 128),
    (16, 256),
    (16, 512),
    (32, 96),
    (64, 32),
    (64, 128),
];
/// A profile that stops below such batches is not kept: the planner would have to guess what large ones cost.
pub const LARGE_BATCH: usize = 32;
/// Decode steps timed together at each.
pub const STEPS: u32 = 16;

/// A profile as it is kept.
#[derive(Serialize, Deserialize)]
struct Profile {
    cost: CostModel,
    points: Vec<ProfilePoint>,
}

/// The cost model, from the cache or measured now and kept there.
///
/// - `engine`: one of this model and configuration that is there already: on a GPU a second would find little memory
pub fn cost_model(model: &LoadedModel, config: EngineConfig, engine: Option<&mut Engine>) -> anyhow::Result<CostModel> {
    let path = path(model, config);
    let kept = path.as_deref().and_then(|path| std::fs::read_to_string(path).ok());
    if let Some(profile) = kept.and_then(|text| serde_json::from_str::<Profile>(&text).ok()) {
        return Ok(profile.cost);
    }
    let points = match engine {
        Some(engine) => measure(model, engine)?,
        None => {
            let end = model.tokenizer.eos().to_vec();
            measure(model, &mut Engine::new(model.network.clone(), None, end, config)?)?
        }
    };
    let cost = fit(&points)?;
    if let Err(err) = keep(model, config, &points) {
        tracing::warn!("the profile cannot be kept, so the next run measures again: {err:#}");
    }
    Ok(cost)
}

/// Keeps what was measured of a model for the next time, where it suffices for a cost model.
pub fn keep(model: &LoadedModel, config: EngineConfig, points: &[ProfilePoint]) -> anyhow::Result<()> {
    let (Some(path), Ok(cost)) = (path(model, config), fit(points)) else {
        return Ok(());
    };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let points = points.to_vec();
    Ok(write_atomic(
        &path,
        &serde_json::to_string_pretty(&Profile { cost, points })?,
    )?)
}

fn fit(points: &[ProfilePoint]) -> anyhow::Result<CostModel> {
    let points: Vec<CostPoint> = points
        .iter()
        .map(|p| CostPoint {
            batch_size: p.batch_size as f64,
            context: p.context as f64,
            prefill: p.prefill_ms / 1000.0,
            step: p.step_ms / 1000.0,
        })
        .collect();
    CostModel::fit(&points).context("the profile has too few points for a cost model: run `lengthwise profile`")
}

fn measure(model: &LoadedModel, engine: &mut Engine) -> anyhow::Result<Vec<ProfilePoint>> {
    let mut bar = Bar::new("profile", POINTS.len() as u64);
    let longest = model
        .network
        .config()
        .max_position_embeddings
        .saturating_sub(STEPS as usize + 1);
    let mut points = Vec::new();
    for (batch_size, context) in POINTS {
        let context = context.clamp(1, longest.max(1));
        if batch_size * (context + STEPS as usize + 1) <= engine.cache_tokens() {
            points.extend(profile_point(engine, batch_size, context, STEPS)?.measured());
        }
        bar.set(points.len() as u64, |_| {
            format!("batch {batch_size}, context {context}")
        });
    }
    bar.finish();
    Ok(points)
}

/// Where the profile of this model's shape on this device is kept. `None` where the user has no home.
fn path(model: &LoadedModel, config: EngineConfig) -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    let network = &model.network;
    let threads = std::env::var("RAYON_NUM_THREADS").unwrap_or_default();
    let what = format!(
        "{:?} {:?} {:?} {:?} {:?} {threads} {}",
        network.config(),
        network.device().location(),
        network.dtype(),
        config.kv_dtype.of_cache(network.dtype()),
        network.quantization(),
        env!("CARGO_PKG_VERSION")
    );
    // SipHash with fixed keys: the same name in every run.
    #[allow(deprecated)]
    let mut hasher = std::hash::SipHasher::new();
    hasher.write(what.as_bytes());
    Some(cache.join(format!("lengthwise/profiles/{:016x}.json", hasher.finish())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lengthwise_scheduler::Rise;

    #[test]
    fn a_profile_kept_before_prices_could_rise_is_a_plain_sum() -> anyhow::Result<()> {
        let text = r#"{"cost":{"step":0.5,"row":0.25,"cached_token":0.125,"prompt_token":1.0},"points":[]}"#;
        let mut profile: Profile = serde_json::from_str(text)?;
        // 0.5 + 2 × (0.25 + 4 × 0.125).
        assert_eq!(profile.cost.decode_step(2.0, 4.0), 2.0);
        assert_eq!(serde_json::to_string(&profile)?, text, "and is written as before");
        profile.cost.many_rows = Some(Rise { beyond: 1.0, more: 8.0 });
        let again: Profile = serde_json::from_str(&serde_json::to_string(&profile)?)?;
        assert_eq!(again.cost, profile.cost);
        Ok(())
    }
}
