//! The examples of a run as tokens, and the shards of its forward passes.

use candle_core::Tensor;
use lengthwise_model::{LengthHead, ModelError, TrainPass};

use super::order::Order;
use super::{
    HeadObjective, LoraTrainingConfig, LoraTrainingError, TrainExample, TrainObjective, TrainRun, TrainTarget,
};
use crate::packed::{EncodedExample, PackedExamples, Shard};

/// Fewest examples that are worth calibrating on.
const LEAST_CALIBRATION: usize = 20;

/// Names the draw of the held-out examples: no run has so many epochs.
const CALIBRATION_DRAW: u64 = 1 << 40;

/// An example as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Encoded {
    /// A prompt with its answer.
    Answer(EncodedExample),
    /// A prompt, and the lengths of its sampled responses.
    Lengths { prompt: Vec<u32>, lengths: Vec<u32> },
}

impl Encoded {
    fn new(run: &TrainRun, set: &'static str, example: &TrainExample) -> Result<Self, LoraTrainingError> {
        let (tokenizer, template) = (&run.model.tokenizer, &run.model.template);
        match &example.target {
            TrainTarget::Answer(answer) => Ok(Self::Answer(EncodedExample::new(
                tokenizer,
                template,
                &example.prompt,
                answer,
            )?)),
            TrainTarget::Lengths(lengths) if lengths.is_empty() => Err(LoraTrainingError::NoLengths {
                id: example.id.clone(),
                set,
            }),
            TrainTarget::Lengths(lengths) => Ok(Self::Lengths {
                prompt: template.encode(tokenizer, &example.prompt)?,
                lengths: lengths.clone(),
            }),
        }
    }

    pub fn tokens(&self) -> &[u32] {
        match self {
            Self::Answer(example) => &example.tokens,
            Self::Lengths { prompt, .. } => prompt,
        }
    }

    /// The sampled lengths; none of an answer.
    pub fn lengths(&self) -> &[u32] {
        match self {
            Self::Answer(_) => &[],
            Self::Lengths { lengths, .. } => lengths,
        }
    }
}

/// What a run sees.
pub(super) struct Data {
    pub train: Vec<Encoded>,
    pub eval: Vec<Encoded>,
    /// Held out of the training examples for a head's calibration.
    pub calibration: Vec<Encoded>,
    pub order: Order,
}

impl Data {
    pub fn new(
        run: &TrainRun,
        config: &LoraTrainingConfig,
        train: &[TrainExample],
        eval: &[TrainExample],
    ) -> Result<Self, LoraTrainingError> {
        let eval = encode(run, config, "evaluation", eval)?;
        let mut train = encode(run, config, "training", train)?;
        let held_out = match &config.objective {
            TrainObjective::Head(head) if eval.is_empty() => held_out(head, train.len()),
            _ => 0,
        };
        let order = |examples| Order {
            examples,
            batch_size: config.batch_size,
            accumulation: config.gradient_accumulation_steps,
            seed: config.seed,
        };
        let mut calibration = Vec::with_capacity(held_out);
        if held_out > 0 {
            // Drawn and not the last ones: a file may be sorted.
            let shuffled = order(train.len()).shuffled(CALIBRATION_DRAW);
            let (out, kept) = shuffled.split_at(held_out);
            calibration.extend(out.iter().map(|&i| train[i].clone()));
            train = kept.iter().map(|&i| train[i].clone()).collect();
        }
        Ok(Self {
            order: order(train.len()),
            train,
            eval,
            calibration,
        })
    }
}

fn held_out(head: &HeadObjective, examples: usize) -> usize {
    match (head.calibration_share * examples as f64).round() as usize {
        n if n < LEAST_CALIBRATION => 0,
        n => n.min(examples / 2),
    }
}

fn encode(
    run: &TrainRun,
    config: &LoraTrainingConfig,
    set: &'static str,
    examples: &[TrainExample],
) -> Result<Vec<Encoded>, LoraTrainingError> {
    let max = run.model.network.config().max_position_embeddings;
    let encode = |example: &TrainExample| {
        let encoded = Encoded::new(run, set, example)?;
        let id = example.id.clone();
        match encoded.tokens().len() {
            got if got > max => Err(LoraTrainingError::ExampleTooLong { id, set, got, max }),
            _ if config.lora.active_from(encoded.tokens()) == usize::MAX => {
                Err(LoraTrainingError::NotInvoked { id, set })
            }
            _ => Ok(encoded),
        }
    };
    examples.iter().map(encode).collect()
}

/// Examples that go through the network together.
pub(super) enum Batch<'a> {
    Answers(PackedExamples),
    Lengths {
        prompts: Vec<&'a [u32]>,
        /// `[prompts, bins]`.
        labels: Tensor,
        head: &'a LengthHead,
    },
}

impl<'a> Batch<'a> {
    /// `head`: the one that is trained, where lengths are what is learnt.
    pub fn new(examples: impl Iterator<Item = &'a Encoded>, head: Option<&'a LengthHead>) -> Result<Self, ModelError> {
        let Some(head) = head else {
            let answer = |example: &Encoded| match example {
                Encoded::Answer(example) => Some(example.clone()),
                Encoded::Lengths { .. } => None,
            };
            return Ok(Self::Answers(examples.filter_map(answer).collect()));
        };
        let (bins, smoothing) = (&head.config.bins, head.config.smoothing);
        let (mut prompts, mut labels) = (Vec::new(), Vec::new());
        for example in examples {
            prompts.push(example.tokens());
            labels.extend(bins.soft_label(example.lengths(), smoothing));
        }
        let labels = Tensor::from_vec(labels, (prompts.len(), bins.len()), head.device())?;
        Ok(Self::Lengths { prompts, labels, head })
    }

    /// What its loss is a mean over: tokens of answers, or prompts.
    pub fn targets(&self) -> usize {
        match self {
            Self::Answers(packed) => packed.answer_tokens(),
            Self::Lengths { prompts, .. } => prompts.len(),
        }
    }

    /// Tokens that go through the network.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Answers(packed) => packed.tokens(),
            Self::Lengths { prompts, .. } => prompts.iter().map(|p| p.len()).sum(),
        }
    }
}

impl Shard for Batch<'_> {
    fn loss(&self, pass: &TrainPass, divisor: f64) -> Result<Tensor, ModelError> {
        match self {
            Self::Answers(packed) => packed.loss(pass, divisor),
            Self::Lengths { prompts, labels, head } => head.loss(&pass.last_hidden(prompts)?, labels, divisor),
        }
    }
}
