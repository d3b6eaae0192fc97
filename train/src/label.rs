//! From sampled lengths to the length that is to be predicted.

use std::str::FromStr;

use lengthwise_core::{RequestId, bucket_up};

use crate::files::{LengthRecord, Pair};

/// Which length of the samples is predicted.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum LabelTarget {
    /// The largest, as published: a batch that stops there cuts few answers.
    #[default]
    Max,
    /// The mean.
    Mean,
    /// The median.
    Median,
    /// The sample at one temperature.
    Temperature(f32),
}

impl FromStr for LabelTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "max" => Ok(Self::Max),
            "mean" => Ok(Self::Mean),
            "median" => Ok(Self::Median),
            _ => text
                .strip_prefix('t')
                .and_then(|t| t.parse().ok())
                .map(Self::Temperature)
                .ok_or_else(|| {
                    format!("no target is called \"{text}\"; there are max, mean, median, and t0.0 for a temperature")
                }),
        }
    }
}

/// A record that gives no pair.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LabelError {
    /// It has lengths only.
    #[error("record {id} has no instruction: lengths alone cannot be trained on")]
    NoInstruction {
        /// The record.
        id: RequestId,
    },
    /// Nothing was sampled at the temperature asked for.
    #[error("record {id} has no sample at temperature {temperature}")]
    NoSample {
        /// The record.
        id: RequestId,
        /// The temperature.
        temperature: f32,
    },
}

/// A pair for every record, its label rounded up to a multiple of `bucket`.
///
/// # Errors
/// A record without instruction, or without the sample asked for.
pub fn label(records: &[LengthRecord], target: LabelTarget, bucket: u32) -> Result<Vec<Pair>, LabelError> {
    let pair = |record: &LengthRecord| {
        let no_instruction = || LabelError::NoInstruction { id: record.id.clone() };
        Ok(Pair {
            id: record.id.clone(),
            instruction: record.instruction.clone().ok_or_else(no_instruction)?,
            label: bucket_up(target_length(record, target)?, bucket),
            lengths: record.samples.iter().map(|s| s.tokens).collect(),
        })
    };
    records.iter().map(pair).collect()
}

fn target_length(record: &LengthRecord, target: LabelTarget) -> Result<u32, LabelError> {
    let mut tokens: Vec<u32> = record.samples.iter().map(|s| s.tokens).collect();
    tokens.sort_unstable();
    let n = tokens.len();
    Ok(match target {
        LabelTarget::Max => record.largest(),
        LabelTarget::Mean => (tokens.iter().map(|&t| f64::from(t)).sum::<f64>() / n as f64).round() as u32,
        LabelTarget::Median => tokens[n / 2].midpoint(tokens[(n - 1) / 2]),
        LabelTarget::Temperature(temperature) => {
            let missing = || LabelError::NoSample {
                id: record.id.clone(),
                temperature,
            };
            record.at_temperature(temperature).ok_or_else(missing)?.tokens
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::Sample;
    use lengthwise_core::FinishReason;

    fn record() -> LengthRecord {
        let sample = |(temperature, tokens)| Sample {
            temperature,
            tokens,
            finish: FinishReason::Stop,
            text: None,
        };
        LengthRecord {
            id: "5".into(),
            instruction: Some("x".to_owned()),
            samples: [(0.0, 115), (0.3, 126), (0.5, 53), (0.7, 61)].map(sample).to_vec(),
        }
    }

    #[test]
    fn labels_are_rounded_up_to_the_bucket() {
        let of = |target: &str, bucket| {
            label(&[record()], target.parse().expect("known"), bucket).expect("complete")[0].label
        };
        assert_eq!((of("max", 50), of("max", 1)), (150, 126));
        assert_eq!((of("mean", 1), of("median", 1), of("t0.5", 1)), (89, 88, 53));
    }

    #[test]
    fn a_record_without_instruction_is_named() {
        let bare = LengthRecord {
            instruction: None,
            ..record()
        };
        let err = label(&[bare], LabelTarget::Max, 50)
            .expect_err("no instruction")
            .to_string();
        assert!(err.contains("record 5"), "{err}");
        assert!(label(&[record()], LabelTarget::Temperature(0.9), 50).is_err());
    }
}
