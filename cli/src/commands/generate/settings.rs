//! What answers depend on besides their requests: a run that goes on repeats it.

use lengthwise_model::DTypeChoice;
use lengthwise_train::files::InstructionRecord;

use super::GenerateArgs;
use crate::args::Global;
use crate::identity::predicted_by;

/// One JSON object as text, for the journal.
///
/// # Errors
/// There is no such device, or the predictor cannot be asked who it is.
pub fn settings(global: &Global, args: &GenerateArgs, records: &[InstructionRecord]) -> anyhow::Result<String> {
    // What is null here is the model's own, and follows from its name.
    let mut settings = serde_json::json!({
        "model": global.model, "seed": global.seed, "temperature": args.temperature, "top_p": args.top_p,
        "top_k": args.top_k, "max_new_tokens": args.schedule.max_new_tokens,
        "dtype": dtype(global)?, "kv_cache_dtype": format!("{:?}", args.cache.kv_cache_dtype),
    });
    if let Some(quantization) = args.weights.quantize {
        settings["quantize"] = format!("{quantization:?}").into();
    }
    // An OpenAI batch's answers do not tell what was predicted.
    if records.iter().any(|record| record.batch.is_none()) {
        settings["lengths_predicted_by"] = predicted_by(args.strategy, &args.predictions)?.into();
    }
    Ok(settings.to_string())
}

/// What answers are computed in, as far as it can be told before the model is opened.
fn dtype(global: &Global) -> anyhow::Result<String> {
    Ok(match global.dtype {
        DTypeChoice::Auto if global.device()?.is_cpu() => format!("{:?}", DTypeChoice::F32),
        // The checkpoint's own, which follows from the model.
        choice => format!("{choice:?}"),
    })
}
