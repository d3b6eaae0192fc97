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
    /// The smallest length that this share of the samples does not exceed; above 0, at most 1.
    Quantile(f64),
    /// The sample at one temperature; of several the largest.
    Temperature(f32),
}

impl FromStr for LabelTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "max" => Ok(Self::Max),
            "mean" => Ok(Self::Mean),
            "median" => Ok(Self::Median),
            _ => parameter(text).ok_or_else(|| {
                format!(
                    "no target is called \"{text}\"; there are max, mean, median, q0.9 for a quantile, and t0.0 for a \
                     temperature"
                )
            }),
        }
    }
}

/// A target with a number: `q0.9` or `t0.7`.
fn parameter(text: &str) -> Option<LabelTarget> {
    if let Some(share) = text.strip_prefix('q') {
        let share = share.parse().ok().filter(|q| *q > 0.0 && *q <= 1.0);
        return share.map(LabelTarget::Quantile);
    }
    let temperature = text.strip_prefix('t')?.parse().ok();
    temperature
        .filter(|t: &f32| t.is_finite() && *t >= 0.0)
        .map(LabelTarget::Temperature)
}

/// A record that gives no pair.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum LabelError {
    /// It has lengths only, or a blank instruction.
    #[error("record {id} has no instruction: lengths alone cannot be trained on")]
    NoInstruction {
        /// The record.
        id: RequestId,
    },
    /// Nothing was sampled of it.
    #[error("record {id} has no samples: there is no length to take")]
    NoSamples {
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
/// A record without instruction, without samples, or without the sample asked for.
pub fn label(records: &[LengthRecord], target: LabelTarget, bucket: u32) -> Result<Vec<Pair>, LabelError> {
    let pair = |record: &LengthRecord| {
        let instruction = record.instruction.clone().filter(|text| !text.trim().is_empty());
        Ok(Pair {
            id: record.id.clone(),
            instruction: instruction.ok_or_else(|| LabelError::NoInstruction { id: record.id.clone() })?,
            label: bucket_up(target_length(record, target)?, bucket),
            messages: record.messages.clone(),
            lengths: record.samples.iter().map(|s| s.tokens).collect(),
        })
    };
    records.iter().map(pair).collect()
}

fn target_length(record: &LengthRecord, target: LabelTarget) -> Result<u32, LabelError> {
    let mut tokens: Vec<u32> = record.samples.iter().map(|s| s.tokens).collect();
    tokens.sort_unstable();
    let n = tokens.len();
    let Some(&largest) = tokens.last() else {
        return Err(LabelError::NoSamples { id: record.id.clone() });
    };
    Ok(match target {
        LabelTarget::Max => largest,
        LabelTarget::Mean => (tokens.iter().map(|&t| f64::from(t)).sum::<f64>() / n as f64).round() as u32,
        LabelTarget::Median => tokens[(n - 1) / 2].midpoint(tokens[n / 2]),
        LabelTarget::Quantile(share) => tokens[((share * n as f64).ceil() as usize).clamp(1, n) - 1],
        LabelTarget::Temperature(temperature) => {
            let there = record.samples.iter().filter(|s| s.is_at(temperature)).map(|s| s.tokens);
            let missing = || LabelError::NoSample {
                id: record.id.clone(),
                temperature,
            };
            there.max().ok_or_else(missing)?
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
            messages: Vec::new(),
            samples: [(0.0, 115), (0.3, 126), (0.5, 53), (0.7, 61)].map(sample).to_vec(),
        }
    }

    #[test]
    fn labels_are_rounded_up_to_the_bucket() {
        let of = |target: &str, bucket| {
            label(&[record()], target.parse().expect("known"), bucket).expect("complete")[0].label
        };
        assert_eq!((of("max", 50), of("max", 1)), (150, 126));
        // 53, 61, 115, 126: their mean is 88.75, three of four are at most 115.
        assert_eq!((of("mean", 1), of("median", 1), of("t0.5", 1)), (89, 88, 53));
        assert_eq!(
            (of("q0.75", 1), of("q0.76", 1), of("q0.01", 1), of("q1", 1)),
            (115, 126, 53, 126)
        );
    }

    #[test]
    fn of_several_samples_at_a_temperature_the_largest_counts() {
        let mut record = record();
        record.samples[1].temperature = 0.5;
        let pairs = label(&[record], LabelTarget::Temperature(0.5), 50).expect("complete");
        assert_eq!(pairs[0].label, 150);
        assert_eq!(pairs[0].lengths, [115, 126, 53, 61]);
    }

    #[test]
    fn an_unknown_target_is_refused() {
        for text in ["biggest", "q0", "q1.5", "qNaN", "t-1", "tNaN", "t", ""] {
            text.parse::<LabelTarget>().expect_err(text);
        }
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
        let err = label(&[record()], LabelTarget::Temperature(0.9), 50).expect_err("no such sample");
        assert_eq!(err.to_string(), "record 5 has no sample at temperature 0.9");
        let empty = [LengthRecord {
            samples: Vec::new(),
            ..record()
        }];
        for target in ["max", "mean", "median", "q0.5", "t0.0"] {
            let err = label(&empty, target.parse().expect("known"), 50).expect_err("no samples");
            assert_eq!(err.to_string(), "record 5 has no samples: there is no length to take");
        }
    }
}
