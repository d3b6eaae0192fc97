//! The demo's figures of speed.

use lengthwise_decoder::{Engine, EngineConfig};
use lengthwise_model::LoadedModel;

use crate::commands::profile::profile_point;
use crate::report::{ReportData, StepTime, ThroughputPoint};

const BATCH_SIZES: [usize; 5] = [1, 4, 16, 64, 128];
const POSITIONS: [usize; 4] = [32, 128, 256, 512];
/// Decode steps that are timed together.
const STEPS: u32 = 12;

/// Throughput by batch size, and step time by position.
pub fn speed(model: &LoadedModel) -> anyhow::Result<ReportData> {
    let eos = model.tokenizer.eos().to_vec();
    let mut engine = Engine::new(model.network.clone(), None, eos, EngineConfig::default())?;
    let mut data = ReportData::default();
    for batch_size in BATCH_SIZES {
        let point = profile_point(&mut engine, batch_size, 64, STEPS)?;
        data.throughput.push(ThroughputPoint {
            series: "decode".to_owned(),
            batch_size: batch_size as u32,
            tokens_per_s: batch_size as f64 / point.step_ms.max(1e-6) * 1000.0,
        });
    }
    for batch_size in [1, 16] {
        for position in POSITIONS {
            let point = profile_point(&mut engine, batch_size, position, STEPS)?;
            data.step_times.push(StepTime {
                batch_size: batch_size as u32,
                position: position as u32,
                milliseconds: point.step_ms,
            });
        }
    }
    Ok(data)
}
