//! What stands in when a predictor goes away.

use lengthwise_core::{LengthEstimate, LengthPredictor, PredictError, PredictInput};

/// Never fails: where the predictor inside does, a stated length stands in, so that a run goes on to its end. The first
/// failure is logged as a warning, the others are not.
pub struct FallbackPredictor<P> {
    inner: P,
    fallback: u32,
    warned: bool,
}

impl<P: LengthPredictor> FallbackPredictor<P> {
    /// `fallback`: the length, in tokens, that stands in.
    pub fn new(inner: P, fallback: u32) -> Self {
        Self {
            inner,
            fallback,
            warned: false,
        }
    }

    /// Whether the fallback has stood in for anything yet.
    pub fn has_failed(&self) -> bool {
        self.warned
    }

    fn stand_in(&mut self, input: &PredictInput, err: &PredictError) -> LengthEstimate {
        if !self.warned {
            let fallback = self.fallback;
            tracing::warn!("{err}; where a prediction fails, {fallback} tokens stand in: this is said once");
            self.warned = true;
        }
        LengthEstimate::fallback(self.fallback).capped(input.max_new_tokens)
    }
}

impl<P: LengthPredictor> LengthPredictor for FallbackPredictor<P> {
    fn predict(&mut self, inputs: &[PredictInput]) -> Result<Vec<Result<LengthEstimate, PredictError>>, PredictError> {
        match self.inner.predict(inputs) {
            Ok(answers) => {
                let each = inputs.iter().zip(answers);
                Ok(each
                    .map(|(i, answer)| answer.or_else(|err| Ok(self.stand_in(i, &err))))
                    .collect())
            }
            Err(err) => Ok(inputs.iter().map(|input| Ok(self.stand_in(input, &err))).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use lengthwise_core::Prompt;

    use super::*;

    /// Predicts 7, except of "bad"; fails as a whole of "worse".
    struct Fragile;

    impl LengthPredictor for Fragile {
        fn predict(
            &mut self,
            inputs: &[PredictInput],
        ) -> Result<Vec<Result<LengthEstimate, PredictError>>, PredictError> {
            let says = |input: &PredictInput, text: &str| input.prompt == Prompt::Instruction(text.to_owned());
            if inputs.iter().any(|input| says(input, "worse")) {
                return Err(PredictError::model("out of memory"));
            }
            let one = |input| {
                if says(input, "bad") {
                    Err(PredictError::EmptyPrompt)
                } else {
                    Ok(LengthEstimate::of(7))
                }
            };
            Ok(inputs.iter().map(one).collect())
        }
    }

    fn ask(predictor: &mut FallbackPredictor<Fragile>, prompts: &[&str]) -> Vec<(u32, bool)> {
        let input = |p: &&str| PredictInput {
            prompt: Prompt::Instruction((*p).to_owned()),
            max_new_tokens: 300,
        };
        let inputs: Vec<_> = prompts.iter().map(input).collect();
        let answers = predictor.predict(&inputs).unwrap().into_iter().map(Result::unwrap);
        answers.map(|estimate| (estimate.max_tokens, estimate.parsed)).collect()
    }

    #[test]
    fn the_fallback_stands_in_for_what_failed_and_no_more() {
        let mut predictor = FallbackPredictor::new(Fragile, 512);
        assert_eq!(ask(&mut predictor, &["a"]), [(7, true)]);
        assert!(!predictor.has_failed());
        // 512, but no more than the cap.
        assert_eq!(ask(&mut predictor, &["a", "bad"]), [(7, true), (300, false)]);
        assert_eq!(ask(&mut predictor, &["a", "worse"]), [(300, false), (300, false)]);
        assert!(predictor.has_failed());
        // It is asked again afterwards.
        assert_eq!(ask(&mut predictor, &["a"]), [(7, true)]);
    }
}
