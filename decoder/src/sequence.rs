//! One request on its way through the decoder.

use lengthwise_core::{FinishReason, RequestId, SamplingParams};
use lengthwise_model::{Adapter, BlockTable, Sampler, Segment, Wanted};

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
    /// The first token that the engine's adapter changes.
    adapted_from: usize,
    pub table: BlockTable,
    sampler: Sampler,
    pub finish: Option<FinishReason>,
    /// Tokens at which it stops for now.
    pub stop_at: u32,
    /// How many of the last tokens only the device knows.
    unseen: usize,
    /// The engine's number for it, from its first pass to its eviction.
    pub run: Option<u64>,
}

impl Sequence {
    /// The prompt is moved, not copied: a long one is there once.
    pub fn new(mut request: SequenceRequest, adapter: Option<&Adapter>) -> Self {
        let tokens = std::mem::take(&mut request.prompt);
        let adapted_from = adapter.map_or(0, |adapter| adapter.config().active_from(&tokens));
        Self {
            prompt_tokens: tokens.len(),
            tokens,
            cached: 0,
            adapted_from,
            table: BlockTable::default(),
            sampler: Sampler::new(request.sampling),
            finish: None,
            stop_at: u32::MAX,
            unseen: 0,
            run: None,
            request,
        }
    }

    /// Tokens of the answer so far, those left out that only the device knows yet.
    pub fn generated(&self) -> u32 {
        (self.tokens.len() - self.prompt_tokens - self.unseen) as u32
    }

    /// Whether it will have ended or stopped when the tokens that only the device knows yet are seen, whichever they are.
    pub fn ends_unseen(&self) -> bool {
        let generated = self.generated() + self.unseen as u32;
        let last = self.request.replay_tokens.unwrap_or(u32::MAX);
        self.unseen > 0 && generated >= last.min(self.request.max_new_tokens).min(self.stop_at)
    }

    /// Whether it has tokens that only the device knows yet.
    pub fn is_unseen(&self) -> bool {
        self.unseen > 0
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

    /// The next `count` tokens that the cache does not hold yet, for a forward pass, and what is wanted of it: the token that
    /// follows them, if one does.
    pub fn pass(&mut self, count: usize) -> (Segment<'_>, Wanted<'_>) {
        let draws = count == self.pending() && self.finish.is_none();
        let segment = Segment {
            tokens: &self.tokens[self.cached..self.cached + count],
            start: self.cached,
            table: &self.table,
            adapted_from: self.adapted_from.saturating_sub(self.cached),
        };
        match draws {
            true => (segment, Wanted::Token(&mut self.sampler)),
            false => (segment, Wanted::Nothing),
        }
    }

    /// Takes a cache over that holds its first `tokens` tokens, before any pass of its own.
    pub fn adopt(&mut self, table: BlockTable, tokens: usize) {
        self.table = table;
        self.cached = tokens;
    }

    /// After a forward pass over `count` tokens was launched: where those were the last, a token follows that has not
    /// been seen yet and stands as `unseen`. Whether one does.
    pub fn advance(&mut self, count: usize, unseen: u32) -> bool {
        self.cached += count;
        if self.pending() > 0 {
            return false;
        }
        if self.finish.is_some() {
            // A finished row of a static batch holds its slot until the batch ends: it repeats its last token.
            self.cached -= 1;
            return false;
        }
        self.tokens.push(unseen);
        self.unseen += 1;
        true
    }

    /// Takes the first token that has not been seen. What was launched behind the last is forgotten.
    pub fn see(&mut self, token: u32, eos: &[u32]) {
        let at = self.tokens.len() - self.unseen;
        self.tokens[at] = token;
        self.unseen -= 1;
        self.finish = self.end_after(token, eos);
        if self.finish.is_some() {
            self.tokens.truncate(at + 1);
            self.unseen = 0;
            // Where it stays in its batch it repeats its last token, as `advance` says.
            self.cached = self.cached.min(at);
        }
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

    /// Forgets what the cache holds and what has not been seen; the tokens stay, and are run again. The sampler is the one
    /// that stands where this one does, without its memory for a vocabulary.
    pub fn evict(&mut self) -> BlockTable {
        self.cached = 0;
        self.tokens.truncate(self.tokens.len() - self.unseen);
        self.unseen = 0;
        self.run = None;
        self.sampler = Sampler::at(self.request.sampling, u64::from(self.generated()));
        std::mem::take(&mut self.table)
    }

    /// The answer; of a sequence that has not ended the tokens so far, as cancelled.
    pub fn into_output(mut self) -> SequenceOutput {
        SequenceOutput {
            finish: self.finish.unwrap_or(FinishReason::Cancelled),
            tokens: self.tokens.split_off(self.prompt_tokens),
            id: self.request.id,
        }
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
        let sequence = Sequence::new(request, None);
        assert_eq!(sequence.tokens.as_ptr(), at, "moved, not copied");
        assert!(sequence.request.prompt.is_empty());
        assert_eq!((sequence.generated(), sequence.most_tokens(3)), (0, 103));
    }
}
