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

    /// The adapter that the head was trained with.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// The tokens of a prompt, with the length question where the head was trained to be asked, whose last hidden state
    /// tells the length. One position of the model is left for the answer.
    ///
    /// # Errors
    /// The prompt is empty or too long for the model.
    pub fn tokens(&self, input: &PredictInput) -> Result<Vec<u32>, PredictError> {
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

    /// The estimate that a hidden state tells: that of the last of [`HeadPredictor::tokens`], with the adapter, behind the
    /// network's last norm.
    ///
    /// # Errors
    /// It is not of this model's width, or not finite.
    pub fn read(&self, hidden: &[f32]) -> Result<LengthEstimate, PredictError> {
        let logits = self.head.read(hidden).map_err(PredictError::model)?;
        let estimates = self.estimates(&[logits]).map_err(PredictError::model)?;
        Ok(estimates.into_iter().next().expect("one for the one row of logits"))
    }

    fn estimates(&self, logits: &[Vec<f32>]) -> Result<Vec<LengthEstimate>, ModelError> {
        let point = self.head.config.point_probability;
        let distributions = self.head.distributions(logits)?;
        Ok(distributions.iter().map(|f| f.estimate(point)).collect())
    }

    fn predict_all(&self, prompts: &[&[u32]]) -> Result<Vec<LengthEstimate>, ModelError> {
        let adapter = Some(self.adapter.as_ref());
        let logits = self.head.predict(&self.model.network, adapter, prompts, PASS_TOKENS)?;
        self.estimates(&logits)
    }
}

impl LengthPredictor for HeadPredictor {
    fn predict(&mut self, inputs: &[PredictInput]) -> Result<Vec<Result<LengthEstimate, PredictError>>, PredictError> {
        let prompts: Vec<_> = inputs.iter().map(|input| self.tokens(input)).collect();
        let accepted: Vec<&[u32]> = prompts.iter().flatten().map(Vec::as_slice).collect();
        let mut estimates = self.predict_all(&accepted).map_err(PredictError::model)?.into_iter();
        let result = |(prompt, input): (Result<_, PredictError>, &PredictInput)| {
            prompt.map(|_| {
                let estimate = estimates.next().expect("one for every prompt that was accepted");
                estimate.capped(input.max_new_tokens)
            })
        };
        Ok(prompts.into_iter().zip(inputs).map(result).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use lengthwise_core::Prompt;
    use lengthwise_model::{DTypeChoice, LengthBins, LengthHeadConfig, LoraConfig, TINY};

    /// A head on the bundled model whose weights are not zero, so that prompts differ.
    fn predictor() -> anyhow::Result<HeadPredictor> {
        let device = Device::Cpu;
        let model = LoadedModel::open(TINY, DTypeChoice::Auto, &device, &mut ())?;
        let hidden = model.network.config().hidden_size;
        let config = LengthHeadConfig {
            bins: LengthBins::new(200),
            asks_length: false,
            smoothing: 0.05,
            samples: 4,
            temperature: 1.0,
            point_probability: 0.8,
        };
        let bins = config.bins.len();
        let head = LengthHead::init(config, hidden, &vec![1.0 / bins as f32; bins], &device)?;
        let wave: Vec<f32> = (0..bins * hidden).map(|i| (i as f32 * 0.37).sin() * 0.1).collect();
        let weight = Tensor::from_vec(wave, (bins, hidden), &device)?;
        head.tensors()["length_head.weight"].slice_set(&weight, 0, 0)?;
        let adapter = Adapter::init(model.network.config(), LoraConfig::default(), 1, &device)?;
        Ok(HeadPredictor::new(model, Arc::new(adapter), head))
    }

    fn input(text: &str, max_new_tokens: u32) -> PredictInput {
        PredictInput {
            prompt: Prompt::Instruction(text.to_owned()),
            max_new_tokens,
        }
    }

    #[test]
    fn a_batch_says_what_each_prompt_gets_alone_and_a_bad_prompt_fails_alone() -> anyhow::Result<()> {
        let mut predictor = predictor()?;
        let long = "word ".repeat(4000);
        let inputs = [
            input("Tell me a story.", 200),
            input(" ", 200),
            input("Spell the word cat.", 200),
            input(&long, 200),
            input("Tell me a story.", 9),
        ];
        let results = predictor.predict(&inputs)?;
        assert!(matches!(results[1], Err(PredictError::EmptyPrompt)));
        assert!(matches!(results[3], Err(PredictError::PromptTooLong { .. })));
        for i in [0, 2, 4] {
            let alone = predictor.predict(&inputs[i..=i])?;
            assert_eq!(alone[0].as_ref().ok(), results[i].as_ref().ok());
        }
        let (first, capped) = (results[0].as_ref().ok(), results[4].as_ref().ok());
        let (first, capped) = (first.expect("predicted"), capped.expect("predicted"));
        assert_ne!(first, results[2].as_ref().expect("predicted"), "prompts differ");
        assert_eq!(capped, &first.clone().capped(9));
        // The same of a hidden state that somebody else computed of the same tokens.
        let tokens = predictor.tokens(&inputs[0])?;
        let hidden = predictor
            .model
            .network
            .last_hidden(&[&tokens], Some(predictor.adapter()), None)?;
        assert_eq!(&predictor.read(&hidden.flatten_all()?.to_vec1::<f32>()?)?, first);
        assert!(predictor.predict(&[])?.is_empty());
        Ok(())
    }
}
