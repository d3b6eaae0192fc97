//! Examples as packed token sequences with the positions that carry the loss.

use std::collections::VecDeque;

use tokenizers::Tokenizer;

use super::PretrainError;
use crate::language::Example;
use crate::language_tokenizer::EOS;

/// One batch: whole sequences, and which of their packed positions predict a token of an answer.
pub(super) struct PackedExamples {
    tokens: Vec<Vec<u32>>,
    /// Packed positions whose next token is an answer's.
    pub positions: Vec<u32>,
    /// That next token.
    pub targets: Vec<u32>,
}

impl PackedExamples {
    pub fn sequences(&self) -> Vec<&[u32]> {
        self.tokens.iter().map(Vec::as_slice).collect()
    }

    pub fn tokens(&self) -> usize {
        self.tokens.iter().map(Vec::len).sum()
    }
}

/// An encoded example: the tokens, and how many of them are the prompt's.
struct Encoded {
    tokens: Vec<u32>,
    prompt: usize,
}

/// Cuts a stream of examples into batches of about the same number of tokens.
pub(super) struct Packer<'a> {
    tokenizer: &'a Tokenizer,
    batch_tokens: usize,
    waiting: VecDeque<Encoded>,
    waiting_tokens: usize,
}

impl<'a> Packer<'a> {
    pub fn new(tokenizer: &'a Tokenizer, batch_tokens: usize) -> Self {
        Self { tokenizer, batch_tokens, waiting: VecDeque::new(), waiting_tokens: 0 }
    }

    pub fn fill(&mut self, examples: &[Example]) -> Result<(), PretrainError> {
        for example in examples {
            let encoded = self.encode(example).map_err(PretrainError::Encode)?;
            self.waiting_tokens += encoded.tokens.len();
            self.waiting.push_back(encoded);
        }
        Ok(())
    }

    fn encode(&self, example: &Example) -> tokenizers::Result<Encoded> {
        let prompt = self.tokenizer.encode(format!("USER: {} ASSISTANT:", example.instruction), true)?;
        let answer = self.tokenizer.encode(format!(" {}{EOS}", example.answer), false)?;
        let mut tokens = prompt.get_ids().to_vec();
        let prompt = tokens.len();
        tokens.extend_from_slice(answer.get_ids());
        Ok(Encoded { tokens, prompt })
    }

    /// The next batch; `None` until enough examples wait for a full one.
    pub fn take(&mut self) -> Option<PackedExamples> {
        if self.waiting_tokens < self.batch_tokens {
            return None;
        }
        let mut batch = PackedExamples { tokens: Vec::new(), positions: Vec::new(), targets: Vec::new() };
        let mut start = 0;
        while start < self.batch_tokens {
            let Encoded { tokens, prompt } = self.waiting.pop_front()?;
            batch.positions.extend((prompt - 1..tokens.len() - 1).map(|p| (start + p) as u32));
            batch.targets.extend_from_slice(&tokens[prompt..]);
            start += tokens.len();
            batch.tokens.push(tokens);
        }
        self.waiting_tokens -= start;
        Some(batch)
    }
}
