//! The predictor that knows the lengths already.

use std::collections::HashMap;

use lengthwise_core::{LengthEstimate, LengthPredictor, PredictError, PredictInput, Prompt};

/// Looks the length up by the instruction: true lengths for an upper bound, chosen ones for tests. Of a conversation the
/// last turn of the user is looked up.
#[derive(Debug, Clone, Default)]
pub struct TablePredictor {
    lengths: HashMap<String, u32>,
}

impl TablePredictor {
    /// `lengths`: tokens by instruction.
    pub fn new(lengths: HashMap<String, u32>) -> Self {
        Self { lengths }
    }

    fn one(&self, input: &PredictInput) -> Result<LengthEstimate, PredictError> {
        if input.prompt.is_blank() {
            return Err(PredictError::EmptyPrompt);
        }
        let instruction = match &input.prompt {
            Prompt::Instruction(text) => text.as_str(),
            Prompt::Chat(turns) => turns
                .iter()
                .rev()
                .find(|turn| turn.role == "user")
                .map_or("", |turn| &turn.content),
        };
        let length = self.lengths.get(instruction);
        let length = length.ok_or_else(|| PredictError::model(format!("no length is known for {instruction:?}")))?;
        Ok(LengthEstimate::of(*length).capped(input.max_new_tokens))
    }
}

impl LengthPredictor for TablePredictor {
    fn predict(&mut self, inputs: &[PredictInput]) -> Result<Vec<Result<LengthEstimate, PredictError>>, PredictError> {
        Ok(inputs.iter().map(|input| self.one(input)).collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use lengthwise_core::ChatMessage;

    use super::*;

    #[test]
    fn an_unknown_instruction_fails_alone() {
        let mut table = TablePredictor::new(HashMap::from([("a".to_owned(), 7), ("b".to_owned(), 90)]));
        let input = |prompt| PredictInput {
            prompt,
            max_new_tokens: 50,
        };
        let chat = vec![
            ChatMessage::user("a"),
            ChatMessage::assistant("x"),
            ChatMessage::user("b"),
        ];
        let inputs = [
            input(Prompt::Instruction("a".into())),
            input(Prompt::Instruction("c".into())),
            input(Prompt::Chat(chat)),
        ];
        let got = table.predict(&inputs).unwrap();
        assert_eq!(got[0].as_ref().unwrap().max_tokens, 7);
        assert!(got[1].is_err());
        // The last turn of the user, and no more than the cap.
        assert_eq!(got[2].as_ref().unwrap().max_tokens, 50);
    }
}
