//! One request on its way through the decoder.

use lengthwise_core::{FinishReason, RequestId, SamplingParams};
use lengthwise_model::{BlockTable, Sampler, Segment};

/// A tokenised request.
#[derive(Debug, Clone, PartialEq)]
pub struct SequenceRequest {
    /// Returned with the answer.
    pub id: RequestId,
    /// The rendered prompt, at least one token.
    pub prompt: Vec<u32>,
    /// Cap on the answer, in tokens, the end-of-sequence token counted.
    pub max_new_tokens: u32,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Replay: the answer ends at exactly this many tokens, whatever the model says, so that weights without a useful
    /// end-of-sequence can be timed.
    pub replay_tokens: Option<u32>,
}

/// The answer to a [`SequenceRequest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceOutput {
    /// The id of its request.
    pub id: RequestId,
    /// The generated tokens, the end-of-sequence token included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
}

/// A request that has been begun: its tokens so far, and how much of them the KV cache holds.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// What was asked; its prompt stands at the beginning of `tokens`.
    pub request: SequenceRequest,
    prompt_tokens: usize,
    /// Prompt and answer so far.
    tokens: Vec<u32>,
    /// How many of `tokens` are in the cache.
    cached: usize,
    pub table: BlockTable,
    sampler: Sampler,
    pub finish: Option<FinishReason>,
}

impl Sequence {
    /// The prompt is moved, not copied: a long one is there once.
    pub fn new(mut request: SequenceRequest) -> Self {
        let tokens = std::mem::take(&mut request.prompt);
        Self {
            prompt_tokens: tokens.len(),
            tokens,
            cached: 0,
            table: BlockTable::default(),
            sampler: Sampler::new(request.sampling),
            finish: None,
            request,
        }
    }

    /// Tokens of the answer so far.
    pub fn generated(&self) -> u32 {
        (self.tokens.len() - self.prompt_tokens) as u32
    }

    /// Tokens of the answer so far that the cache does not hold, the last one left out: that was never computed on.
    pub fn generated_uncached(&self) -> u32 {
        (self.pending().saturating_sub(1) as u32).min(self.generated().saturating_sub(1))
    }

    /// Most tokens that the cache must hold for it: prompt, and an answer of at most `answer` tokens or its cap.
    pub fn most_tokens(&self, answer: u32) -> usize {
        let answer = answer.max(self.generated()).min(self.request.max_new_tokens);
        self.prompt_tokens + answer as usize
    }

    /// Tokens that have to go through the model before the next one can be drawn.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.cached
    }

    /// Tokens that the cache holds.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// The next `count` tokens that the cache does not hold yet, for a forward pass, and what draws the token that
    /// follows them, if one does.
    pub fn pass(&mut self, count: usize) -> (Segment<'_>, Option<&mut Sampler>) {
        let draws = count == self.pending() && self.finish.is_none();
        let segment = Segment {
            tokens: &self.tokens[self.cached..self.cached + count],
            start: self.cached,
            table: &self.table,
            adapted: true,
        };
        (segment, draws.then_some(&mut self.sampler))
    }

    /// After a forward pass over `count` tokens: takes the next token if those were the last.
    pub fn advance(&mut self, count: usize, token: u32, eos: &[u32]) {
        self.cached += count;
        if self.pending() > 0 {
            return;
        }
        if self.finish.is_some() {
            // A finished row of a static batch holds its slot until the batch ends: it repeats its last token.
            self.cached -= 1;
            return;
        }
        self.tokens.push(token);
        self.finish = self.end_after(token, eos);
    }

    fn end_after(&self, token: u32, eos: &[u32]) -> Option<FinishReason> {
        let generated = self.generated();
        let ended = match self.request.replay_tokens {
            Some(length) => generated >= length,
            None => eos.contains(&token),
        };
        match ended {
            true => Some(FinishReason::Stop),
            false => (generated >= self.request.max_new_tokens).then_some(FinishReason::Length),
        }
    }

    /// Forgets what the cache holds; the tokens stay, and are run again. The sampler is the one that stands where this
    /// one does, without its memory for a vocabulary.
    pub fn evict(&mut self) -> BlockTable {
        self.cached = 0;
        self.sampler = Sampler::at(self.request.sampling, u64::from(self.generated()));
        std::mem::take(&mut self.table)
    }

    /// The answer; the sequence must have ended.
    pub fn into_output(self) -> Option<SequenceOutput> {
        Some(SequenceOutput {
            finish: self.finish?,
            id: self.request.id.clone(),
            tokens: self.into_tokens(),
        })
    }

    /// The tokens of the answer so far.
    pub fn into_tokens(self) -> Vec<u32> {
        self.tokens[self.prompt_tokens..].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_is_there_once() {
        let request = SequenceRequest {
            id: "a".into(),
            prompt: vec![7; 100],
            max_new_tokens: 5,
            sampling: SamplingParams::GREEDY,
            replay_tokens: None,
        };
        let at = request.prompt.as_ptr();
        let sequence = Sequence::new(request);
        assert_eq!(sequence.tokens.as_ptr(), at, "moved, not copied");
        assert!(sequence.request.prompt.is_empty());
        assert_eq!((sequence.generated(), sequence.most_tokens(3)), (0, 103));
    }
}
