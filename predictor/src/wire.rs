//! Messages of the wire format, from and to the types of the core.

use std::time::{Duration, Instant};

use lengthwise_core::{ChatMessage, LengthEstimate, PredictError, PredictInput, Prompt, Quantile};
use lengthwise_proto::v1;
use lengthwise_proto::v1::predict_request::Input;
use tonic::metadata::MetadataMap;

/// Most time before a caller's deadline at which it is answered that its time is up.
const DEADLINE_MARGIN: Duration = Duration::from_millis(100);

/// The caller's deadline, from the `grpc-timeout` header: a number and a unit. A little earlier than the header says
/// (a tenth, at most 100 ms): at the very end tonic's own timer would answer `CANCELLED`.
pub(crate) fn deadline(metadata: &MetadataMap) -> Option<Instant> {
    let text = metadata.get("grpc-timeout")?.to_str().ok()?;
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = number.parse().ok()?;
    let timeout = match unit {
        "H" => Duration::from_secs(number.checked_mul(3600)?),
        "M" => Duration::from_secs(number.checked_mul(60)?),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    };
    Instant::now().checked_add(timeout - DEADLINE_MARGIN.min(timeout / 10))
}

/// What is asked. `max`: the server's cap, in tokens.
pub(crate) fn input(request: &v1::PredictRequest, max: u32) -> Result<PredictInput, PredictError> {
    let prompt = match &request.input {
        None => return Err(PredictError::EmptyPrompt),
        Some(Input::Instruction(text)) => Prompt::Instruction(text.clone()),
        Some(Input::Chat(chat)) => {
            let turn = |m: &v1::ChatMessage| ChatMessage::new(&m.role, m.content.as_str());
            match chat.messages[..] {
                [] => return Err(PredictError::EmptyPrompt),
                _ => Prompt::chat(chat.messages.iter().map(turn).collect::<Result<_, _>>()?)?,
            }
        }
    };
    if prompt.is_blank() {
        return Err(PredictError::EmptyPrompt);
    }
    let max_new_tokens = match request.max_new_tokens {
        0 => max,
        got if got > max => return Err(PredictError::CapOutOfRange { got, max }),
        got => got,
    };
    Ok(PredictInput { prompt, max_new_tokens })
}

/// `input` as a request. A cap above `max`, the server's, is left to the server, which would refuse it.
pub(crate) fn request(request_id: String, input: &PredictInput, max: u32) -> v1::PredictRequest {
    let prompt = match &input.prompt {
        Prompt::Instruction(text) => Input::Instruction(text.clone()),
        Prompt::Chat(turns) => {
            let turn = |m: &ChatMessage| v1::ChatMessage {
                role: m.role.clone(),
                content: m.content.clone(),
            };
            Input::Chat(v1::Chat {
                messages: turns.iter().map(turn).collect(),
            })
        }
    };
    let max_new_tokens = if input.max_new_tokens > max {
        0
    } else {
        input.max_new_tokens
    };
    v1::PredictRequest {
        request_id,
        input: Some(prompt),
        max_new_tokens,
    }
}

pub(crate) fn response(request_id: String, estimate: &LengthEstimate) -> v1::PredictResponse {
    let quantile = |q: &Quantile| v1::Quantile {
        probability: q.probability,
        tokens: q.tokens,
    };
    v1::PredictResponse {
        request_id,
        max_tokens: estimate.max_tokens,
        quantiles: estimate.quantiles.iter().map(quantile).collect(),
        parsed: estimate.parsed,
    }
}

pub(crate) fn estimate(response: v1::PredictResponse) -> LengthEstimate {
    let quantile = |q: v1::Quantile| Quantile {
        probability: q.probability,
        tokens: q.tokens,
    };
    LengthEstimate {
        max_tokens: response.max_tokens,
        quantiles: response.quantiles.into_iter().map(quantile).collect(),
        parsed: response.parsed,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn seconds_left(header: &str) -> Option<f64> {
        let mut metadata = MetadataMap::new();
        metadata.insert("grpc-timeout", header.parse().unwrap());
        deadline(&metadata).map(|at| at.saturating_duration_since(Instant::now()).as_secs_f64())
    }

    #[test]
    fn a_timeout_is_a_number_and_a_unit() {
        for (header, seconds) in [
            ("1H", 3600.0),
            ("2M", 120.0),
            ("30S", 30.0),
            ("5000m", 5.0),
            ("5000000u", 5.0),
        ] {
            let got = seconds_left(header).unwrap();
            assert!((seconds - 0.2..=seconds - 0.04).contains(&got), "{header}: {got}");
        }
        // A tenth of a short one.
        let got = seconds_left("200000000n").unwrap();
        assert!((0.1..=0.19).contains(&got), "{got}");
        for header in ["", "S", "5", "5x", "-5S", "99999999999999999999H"] {
            assert_eq!(seconds_left(header), None, "{header}");
        }
    }

    #[test]
    fn estimates_survive_the_wire() {
        let quantiles = vec![
            Quantile {
                probability: 0.5,
                tokens: 80,
            },
            Quantile {
                probability: 0.9,
                tokens: 120,
            },
        ];
        let sent = LengthEstimate {
            max_tokens: 150,
            quantiles,
            parsed: false,
        };
        assert_eq!(estimate(response("a".to_owned(), &sent)), sent);
    }
}
