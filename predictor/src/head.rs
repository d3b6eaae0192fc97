//! Length prediction by a head on the network: one forward pass over the prompts, and nothing is decoded.

use std::sync::Arc;

use lengthwise_core::{LengthEstimate, LengthPredictor, PredictError, PredictInput};
use lengthwise_model::{Adapter, LENGTH_QUESTION, LengthHead, LoadedModel, ModelError};

/// Prompt tokens in one forward pass.
const PASS_TOKENS: usize = 2048;

/// Reads the distribution of a response's length off a head.
pub struct HeadPredictor {
    model: LoadedModel,
    adapter: Arc<Adapter>,
    head: LengthHead,
}

impl HeadPredictor {
    /// `head` and `adapter` were trained together, on `model`.
    pub fn new(model: LoadedModel, adapter: Arc<Adapter>, head: LengthHead) -> Self {
        Self { model, adapter, head }
    }

    /// The tokens of a prompt that the model can take: one position is left for the answer.
    fn tokens(&self, input: &PredictInput) -> Result<Vec<u32>, PredictError> {
        if input.prompt.is_blank() {
            return Err(PredictError::EmptyPrompt);
        }
        let question = if self.head.config.asks_length {
            LENGTH_QUESTION
        } else {
            ""
        };
        let prompt = input.prompt.with_suffix(question);
        let template = &self.model.template;
        let tokens = template
            .encode(&self.model.tokenizer, &prompt)
            .map_err(PredictError::model)?;
        let (got, max) = (tokens.len(), self.model.network.config().max_position_embeddings - 1);
        if got > max {
            return Err(PredictError::PromptTooLong { got, max });
        }
        Ok(tokens)
    }

    fn estimates(&self, prompts: &[&[u32]]) -> Result<Vec<LengthEstimate>, ModelError> {
        let (head, adapter) = (&self.head, Some(self.adapter.as_ref()));
        let logits = head.predict(&self.model.network, adapter, prompts, PASS_TOKENS)?;
        let distributions = head.distributions(&logits)?;
        let point = head.config.point_probability;
        Ok(distributions.iter().map(|f| f.estimate(point)).collect())
    }
}

impl LengthPredictor for HeadPredictor {
    fn predict(&mut self, inputs: &[PredictInput]) -> Result<Vec<Result<LengthEstimate, PredictError>>, PredictError> {
        let prompts: Vec<_> = inputs.iter().map(|input| self.tokens(input)).collect();
        let accepted: Vec<&[u32]> = prompts.iter().flatten().map(Vec::as_slice).collect();
        let mut estimates = self.estimates(&accepted).map_err(PredictError::model)?.into_iter();
        let result = |(prompt, input): (Result<_, PredictError>, &PredictInput)| {
            prompt.map(|_| {
                let estimate = estimates.next().expect("one for every prompt that was accepted");
                estimate.capped(input.max_new_tokens)
            })
        };
        Ok(prompts.into_iter().zip(inputs).map(result).collect())
    }
}
