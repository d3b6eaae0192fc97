//! Training examples as packed token sequences, and their gradients.

use std::collections::BTreeMap;

use candle_core::Tensor;
use lengthwise_core::Prompt;
use lengthwise_model::{Adapter, Dropout, Llama, ModelError, ModelTokenizer, PromptTemplate, TrainPass, cross_entropy};

use crate::optim::Gradients;

/// A prompt and its answer as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedExample {
    /// Prompt, answer, and the token that ends it.
    pub tokens: Vec<u32>,
    /// How many of them are the prompt's: those carry no loss.
    pub prompt_tokens: usize,
}

impl EncodedExample {
    /// Encodes a prompt with its answer as one text, since a tokenizer may treat the seam in its own way.
    ///
    /// # Errors
    /// The template or the tokenizer refuses it, or the model has no end-of-sequence token.
    pub fn new(
        tokenizer: &ModelTokenizer,
        template: &PromptTemplate,
        prompt: &Prompt,
        answer: &str,
    ) -> Result<Self, ModelError> {
        let no_end = || ModelError::Tokenizer {
            reason: "the model has no end-of-sequence token".to_owned(),
        };
        let eos = *tokenizer.eos().first().ok_or_else(no_end)?;
        let prompt_tokens = template.encode(tokenizer, prompt)?;
        let mut tokens = template.encode_with_answer(tokenizer, prompt, answer)?;
        let shared = prompt_tokens.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
        tokens.push(eos);
        Ok(Self {
            tokens,
            prompt_tokens: shared,
        })
    }
}

/// Examples that go through the network together, and what is wanted of them.
pub trait Shard: Sync {
    /// The summed loss of the examples divided by `divisor`, with its graph.
    ///
    /// # Errors
    /// A sequence longer than the model's context, or the device failed.
    fn loss(&self, pass: &TrainPass, divisor: f64) -> Result<Tensor, ModelError>;
}

/// Examples one behind the other, and which packed positions predict a token of an answer.
#[derive(Debug, Clone, Default)]
pub struct PackedExamples {
    sequences: Vec<Vec<u32>>,
    positions: Vec<u32>,
    targets: Vec<u32>,
    tokens: usize,
}

impl PackedExamples {
    /// Adds an example.
    pub fn push(&mut self, example: EncodedExample) {
        let EncodedExample { tokens, prompt_tokens } = example;
        let first = prompt_tokens.max(1);
        self.positions
            .extend((first - 1..tokens.len() - 1).map(|p| (self.tokens + p) as u32));
        self.targets.extend_from_slice(&tokens[first..]);
        self.tokens += tokens.len();
        self.sequences.push(tokens);
    }

    /// Tokens of all examples together.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens that carry a loss.
    pub fn answer_tokens(&self) -> usize {
        self.targets.len()
    }
}

impl Shard for PackedExamples {
    fn loss(&self, pass: &TrainPass, divisor: f64) -> Result<Tensor, ModelError> {
        let sequences: Vec<&[u32]> = self.sequences.iter().map(Vec::as_slice).collect();
        let logits = pass.logits(&sequences, &self.positions)?;
        Ok(cross_entropy(&logits, &self.targets, divisor)?)
    }
}

impl FromIterator<EncodedExample> for PackedExamples {
    fn from_iter<T: IntoIterator<Item = EncodedExample>>(examples: T) -> Self {
        let mut packed = Self::default();
        examples.into_iter().for_each(|example| packed.push(example));
        packed
    }
}

/// What a gradient is taken of.
pub struct Objective<'a> {
    /// The network.
    pub llama: &'a Llama,
    /// The adapter that is trained, if it is one.
    pub adapter: Option<&'a Adapter>,
    /// The variables whose gradients are wanted.
    pub parameters: &'a BTreeMap<String, Tensor>,
    /// Share of the adapter's inputs dropped, and the seed of this step.
    pub dropout: Option<(f64, u64)>,
    /// Keep no activations but those between layers; only where the weights are frozen.
    pub checkpointing: bool,
}

impl Objective<'_> {
    /// Loss and gradients of the examples in `shards`, the loss a sum divided by `divisor`; the gradients are
    /// added to `grads`.
    ///
    /// The shards run side by side, a thread each, since candle's element-wise ops use one core. Their number is the
    /// caller's and not the machine's, so that sums, and with them the result, are the same everywhere.
    ///
    /// # Errors
    /// The forward or backward pass failed.
    pub fn gradients<S: Shard>(&self, shards: &[S], divisor: f64, grads: &mut Gradients) -> Result<f64, ModelError> {
        let run = |shard: &S, index: u64| -> Result<_, ModelError> {
            let dropout = self
                .dropout
                .map(|(p, seed)| Dropout::new(p, seed.wrapping_mul(31).wrapping_add(index)));
            let pass = TrainPass::new(self.llama, self.adapter, dropout.as_ref(), self.checkpointing);
            let loss = shard.loss(&pass, divisor)?;
            let mut grads = Gradients::default();
            pass.backward(&loss, &mut |store| Ok(grads.add(self.parameters, store)?))?;
            Ok((f64::from(loss.to_scalar::<f32>()?), grads))
        };
        let run = &run;
        let results: Vec<_> = std::thread::scope(|scope| {
            let shards = shards.iter().zip(0..);
            let threads: Vec<_> = shards.map(|(shard, i)| scope.spawn(move || run(shard, i))).collect();
            threads
                .into_iter()
                .map(|t| t.join().expect("a shard does not panic"))
                .collect()
        });
        let mut total = 0.0;
        for result in results {
            let (loss, of_shard) = result?;
            total += loss;
            grads.merge(of_shard)?;
        }
        Ok(total)
    }
}
