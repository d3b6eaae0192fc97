//! What tells one run from another.

use lengthwise_core::fixed_hash;
use serde_json::{Value, json};

use super::data::{Data, Encoded};
use super::{LoraTrainingConfig, TrainObjective, TrainRun};

/// Whatever changes the course of a run, by the name of its flag, as one JSON object. What may differ between a run and
/// its resumption is left out: the steps between checkpoints, and the device, so that a run can go on elsewhere.
pub(super) fn fingerprint(run: &TrainRun, config: &LoraTrainingConfig, data: &Data) -> String {
    // Taken apart, so that a new setting cannot be forgotten here.
    let LoraTrainingConfig {
        objective,
        lora,
        epochs,
        max_steps,
        learning_rate,
        schedule,
        warmup_ratio,
        batch_size,
        gradient_accumulation_steps,
        gradient_checkpointing,
        max_grad_norm,
        weight_decay,
        seed,
        save_steps: _,
        eval_steps,
    } = config;
    let of_data = |examples: &[Encoded]| {
        let examples: Vec<_> = examples.iter().map(|e| (e.tokens(), e.lengths())).collect();
        format!("{:016x}", fixed_hash(&examples))
    };
    json!({
        "model": run.model.name, "dtype": run.model.network.dtype().as_str(),
        "data": of_data(&data.train), "calibration_data": of_data(&data.calibration), "eval_data": of_data(&data.eval),
        "objective": of_objective(objective),
        "lora_r": lora.r, "lora_alpha": lora.lora_alpha, "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora, "target_modules": lora.target_modules.to_string(),
        "alora": lora.invocation_tokens,
        "epochs": epochs, "max_steps": max_steps, "learning_rate": learning_rate, "lr_scheduler": schedule,
        "warmup_ratio": warmup_ratio, "batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps, "gradient_checkpointing": gradient_checkpointing,
        "max_grad_norm": max_grad_norm, "weight_decay": weight_decay, "seed": seed, "eval_steps": eval_steps,
    })
    .to_string()
}

fn of_objective(objective: &TrainObjective) -> Value {
    match objective {
        TrainObjective::Number => "number".into(),
        TrainObjective::Head(head) => json!({"head": {
            "max_tokens": head.max_tokens, "length_question": head.asks_length, "smoothing": head.smoothing,
            "calibration_share": head.calibration_share,
        }}),
    }
}
