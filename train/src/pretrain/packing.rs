//! A stream of examples, cut into batches.

use std::collections::VecDeque;

use tokenizers::Tokenizer;

use super::PretrainError;
use crate::language::Example;
use crate::language_tokenizer::EOS;
use crate::packed::{EncodedExample, PackedExamples};

/// Cuts a stream of examples into batches of about the same number of tokens.
pub(super) struct Packer<'a> {
    tokenizer: &'a Tokenizer,
    batch_tokens: usize,
    waiting: VecDeque<EncodedExample>,
    waiting_tokens: usize,
}

impl<'a> Packer<'a> {
    pub fn new(tokenizer: &'a Tokenizer, batch_tokens: usize) -> Self {
        Self {
            tokenizer,
            batch_tokens,
            waiting: VecDeque::new(),
            waiting_tokens: 0,
        }
    }

    pub fn fill(&mut self, examples: &[Example]) -> Result<(), PretrainError> {
        for example in examples {
            let encoded = self.encode(example).map_err(PretrainError::Encode)?;
            self.waiting_tokens += encoded.tokens.len();
            self.waiting.push_back(encoded);
        }
        Ok(())
    }

    fn encode(&self, example: &Example) -> tokenizers::Result<EncodedExample> {
        let prompt = self
            .tokenizer
            .encode(format!("USER: {} ASSISTANT:", example.instruction), true)?;
        let answer = self.tokenizer.encode(format!(" {}{EOS}", example.answer), false)?;
        let mut tokens = prompt.get_ids().to_vec();
        let prompt_tokens = tokens.len();
        tokens.extend_from_slice(answer.get_ids());
        Ok(EncodedExample { tokens, prompt_tokens })
    }

    /// The next batch; `None` until enough examples wait for a full one.
    pub fn take(&mut self) -> Option<PackedExamples> {
        if self.waiting_tokens < self.batch_tokens {
            return None;
        }
        let mut batch = PackedExamples::default();
        while batch.tokens() < self.batch_tokens {
            batch.push(self.waiting.pop_front()?);
        }
        self.waiting_tokens -= batch.tokens();
        Some(batch)
    }
}
