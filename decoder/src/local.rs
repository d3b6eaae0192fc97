//! Text in, text out, on a model of this process.

use std::num::NonZeroUsize;
use std::sync::Arc;

use lengthwise_core::{DecodeError, Decoder, Request, Response};
use lengthwise_model::{Adapter, LoadedModel, ModelTokenizer};
use lengthwise_scheduler::{AdmissionOrder, ScheduleConfig, Strategy};

use crate::{Engine, EngineConfig, PredictedRequest, SequenceOutput, SequenceRequest, run_strategy};

/// Answers requests with continuous batching.
pub struct LocalDecoder {
    model: LoadedModel,
    engine: Engine,
    slots: NonZeroUsize,
}

impl LocalDecoder {
    /// # Errors
    /// No memory for the KV cache.
    pub fn new(
        model: LoadedModel,
        adapter: Option<Arc<Adapter>>,
        slots: NonZeroUsize,
        config: EngineConfig,
    ) -> Result<Self, DecodeError> {
        let eos = model.tokenizer.eos().to_vec();
        let engine = Engine::new(model.network.clone(), adapter, eos, config)?;
        Ok(Self { model, engine, slots })
    }

    /// The model.
    pub fn model(&self) -> &LoadedModel {
        &self.model
    }

    /// Most tokens that a prompt may have: one position is left for the answer.
    pub fn max_prompt_tokens(&self) -> usize {
        self.model.network.config().max_position_embeddings - 1
    }

    /// A request's prompt as tokens, checked against the model's context and the cache.
    ///
    /// # Errors
    /// It is empty or does not fit.
    pub fn tokenize(&self, request: &Request) -> Result<SequenceRequest, DecodeError> {
        if request.prompt.is_blank() {
            return Err(DecodeError::EmptyPrompt { id: request.id.clone() });
        }
        let template = &self.model.template;
        let prompt = template
            .encode(&self.model.tokenizer, &request.prompt)
            .map_err(DecodeError::model)?;
        let sequence = SequenceRequest {
            id: request.id.clone(),
            prompt,
            max_new_tokens: request.max_new_tokens,
            sampling: request.sampling,
            replay_tokens: None,
        };
        self.engine.check(&sequence)?;
        Ok(sequence)
    }

    /// The text of an answer.
    ///
    /// # Errors
    /// The tokenizer failed.
    pub fn response_of(model: &LoadedModel, output: SequenceOutput) -> Result<Response, DecodeError> {
        response(&model.tokenizer, output)
    }

    /// The engine, for runs under another strategy.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }
}

impl Decoder for LocalDecoder {
    fn decode(
        &mut self,
        requests: Vec<Request>,
        on_response: &mut dyn FnMut(Response) -> Result<(), DecodeError>,
    ) -> Result<(), DecodeError> {
        let longest = requests.iter().map(|r| r.max_new_tokens).max().unwrap_or(1);
        let predicted = |request: &Request| {
            let request = self.tokenize(request)?;
            Ok(PredictedRequest {
                predicted: request.max_new_tokens,
                request,
            })
        };
        let sequences = requests
            .iter()
            .map(predicted)
            .collect::<Result<Vec<_>, DecodeError>>()?;
        let config = ScheduleConfig {
            batch_size: self.slots,
            max_new_tokens: longest,
            // Nothing is predicted here, so nothing is gained by another order.
            order: AdmissionOrder::FirstCome,
            ..ScheduleConfig::new(Strategy::Continuous)
        };
        let tokenizer = self.model.tokenizer.clone();
        run_strategy(&mut self.engine, sequences, &config, &mut |output| {
            on_response(response(&tokenizer, output)?)
        })?;
        Ok(())
    }
}

fn response(tokenizer: &ModelTokenizer, output: SequenceOutput) -> Result<Response, DecodeError> {
    let tokens = output.tokens.len() as u32;
    let text = tokenizer.decode(&output.tokens).map_err(DecodeError::model)?;
    Ok(Response {
        id: output.id,
        text: text.trim_start().to_owned(),
        tokens,
        finish: output.finish,
    })
}
