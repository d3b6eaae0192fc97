//! The predictor without a model.

use lengthwise_core::{LengthEstimate, LengthPredictor, PredictError, PredictInput};

/// Says the same length of every prompt: the baseline of an evaluation, and what stands in when nothing better is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConstantPredictor {
    /// The length.
    pub max_tokens: u32,
}

impl LengthPredictor for ConstantPredictor {
    fn predict(&mut self, inputs: &[PredictInput]) -> Result<Vec<Result<LengthEstimate, PredictError>>, PredictError> {
        let one = |input: &PredictInput| match input.prompt.is_blank() {
            true => Err(PredictError::EmptyPrompt),
            false => Ok(LengthEstimate::of(self.max_tokens).capped(input.max_new_tokens)),
        };
        Ok(inputs.iter().map(one).collect())
    }
}
