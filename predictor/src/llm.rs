//! Length prediction by a language model that is asked for it.

use std::collections::HashMap;

use lengthwise_core::{
    DecodeError, Decoder, LengthEstimate, LengthPredictor, PredictError, PredictInput, Request, RequestId,
    SamplingParams,
};
use lengthwise_decoder::LocalDecoder;
use lengthwise_model::{LENGTH_QUESTION, PIA_QUESTION};

use crate::parse_length;

/// Which question is put to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Question {
    /// For the length alone; an adapter was tuned to answer it.
    Length,
    /// For the length before the response, without tuning.
    Pia,
}

impl Question {
    fn text(self) -> &'static str {
        match self {
            Self::Length => LENGTH_QUESTION,
            Self::Pia => PIA_QUESTION,
        }
    }

    /// Tokens of an answer that are looked at: the published code reads eight.
    fn answer_tokens(self) -> u32 {
        match self {
            Self::Length => 8,
            Self::Pia => 16,
        }
    }
}

/// Asks a model for the length of its response, and reads the number in its answer.
pub struct LlmPredictor {
    decoder: LocalDecoder,
    question: Question,
    fallback: u32,
}

impl LlmPredictor {
    /// `decoder` holds the model, with the adapter if there is one; `fallback` is the length, in tokens, that stands in
    /// where the model's answer has no number.
    pub fn new(decoder: LocalDecoder, question: Question, fallback: u32) -> Self {
        Self {
            decoder,
            question,
            fallback,
        }
    }

    fn estimate(&self, answer: Option<&String>, cap: u32) -> LengthEstimate {
        match answer.and_then(|text| parse_length(text)) {
            Some(tokens) => LengthEstimate::of(tokens.max(1)).capped(cap),
            None => LengthEstimate::fallback(self.fallback).capped(cap),
        }
    }
}

impl LengthPredictor for LlmPredictor {
    fn predict(&mut self, inputs: &[PredictInput]) -> Result<Vec<Result<LengthEstimate, PredictError>>, PredictError> {
        let mut requests = Vec::with_capacity(inputs.len());
        let mut refused: HashMap<usize, PredictError> = HashMap::new();
        for (i, input) in inputs.iter().enumerate() {
            if input.prompt.is_blank() {
                refused.insert(i, PredictError::EmptyPrompt);
                continue;
            }
            let request = Request {
                id: i.to_string().into(),
                prompt: input.prompt.with_suffix(self.question.text()),
                max_new_tokens: self.question.answer_tokens(),
                sampling: SamplingParams::GREEDY,
            };
            match self.decoder.tokenize(&request) {
                Ok(_) => requests.push(request),
                Err(err) => _ = refused.insert(i, predict_error(err)),
            }
        }
        let mut answers: HashMap<RequestId, String> = HashMap::with_capacity(requests.len());
        let keep = &mut |response: lengthwise_core::Response| {
            answers.insert(response.id, response.text);
            Ok(())
        };
        self.decoder.decode(requests, keep).map_err(predict_error)?;
        let result = |(i, input): (usize, &PredictInput)| match refused.remove(&i) {
            Some(err) => Err(err),
            None => Ok(self.estimate(answers.get(&RequestId::from(i.to_string())), input.max_new_tokens)),
        };
        Ok(inputs.iter().enumerate().map(result).collect())
    }
}

fn predict_error(err: DecodeError) -> PredictError {
    match err {
        DecodeError::PromptTooLong { got, max, .. } => PredictError::PromptTooLong { got, max },
        DecodeError::EmptyPrompt { .. } => PredictError::EmptyPrompt,
        other => PredictError::model(other),
    }
}
