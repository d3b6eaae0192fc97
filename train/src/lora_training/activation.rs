//! Where an adapter begins that leaves the instruction to the base model.

use lengthwise_core::Prompt;
use lengthwise_model::LoadedModel;

use super::{LoraTrainingError, TrainObjective};

/// Instructions that have no end in common, and with which tokenizers join what follows in different ways.
const INSTRUCTIONS: [&str; 8] = [
    "Write a story",
    "What is 17 times 4?",
    "Translate it (all of it)",
    "Go on with 1, 2, 3\n",
    "Repeat this. ",
    "He said \"no\"",
    "Was heißt das für die Größe",
    "你好吗",
];

/// The tokens that every prompt of `objective` ends with, whatever the instruction: the length question where it is asked, and
/// what the model's template puts behind the instruction. An adapter that has them as its
/// [`lengthwise_model::LoraConfig::invocation_tokens`] changes nothing before them, so that a decoder's keys and values of the
/// instruction serve the prediction too.
///
/// # Errors
/// Prompts end in nothing common, or the template or the tokenizer failed.
pub fn invocation_tokens(model: &LoadedModel, objective: &TrainObjective) -> Result<Vec<u32>, LoraTrainingError> {
    let encode = |instruction: &&str| {
        let prompt = Prompt::Instruction(format!("{instruction}{}", objective.question()));
        model.template.encode(&model.tokenizer, &prompt)
    };
    let prompts = INSTRUCTIONS.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
    let common = prompts
        .iter()
        .skip(1)
        .fold(prompts[0].as_slice(), |common, prompt| common_end(common, prompt));
    match common {
        [] => Err(LoraTrainingError::NoInvocation),
        common => Ok(common.to_vec()),
    }
}

fn common_end<'a>(a: &'a [u32], b: &[u32]) -> &'a [u32] {
    let alike = a.iter().rev().zip(b.iter().rev()).take_while(|(a, b)| a == b).count();
    &a[a.len() - alike..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora_training::HeadObjective;
    use candle_core::Device;
    use lengthwise_model::{DTypeChoice, LENGTH_QUESTION, TINY};

    #[test]
    fn it_begins_behind_the_instruction_with_the_question_or_with_the_templates_own_end() -> anyhow::Result<()> {
        let model = LoadedModel::open(TINY, DTypeChoice::Auto, &Device::Cpu, &mut ())?;
        let number = invocation_tokens(&model, &TrainObjective::Number)?;
        let head = invocation_tokens(&model, &TrainObjective::Head(HeadObjective::default()))?;
        assert!(!head.is_empty() && number.ends_with(&head), "{head:?} of {number:?}");
        let text = model.tokenizer.decode(&number)?;
        let words = LENGTH_QUESTION.split_whitespace().skip(1).collect::<Vec<_>>().join(" ");
        assert!(text.contains(&words), "{text}");
        // Another instruction, with another end, ends in them as well.
        let prompt = Prompt::Instruction(format!("Name three colours!{LENGTH_QUESTION}"));
        assert!(model.template.encode(&model.tokenizer, &prompt)?.ends_with(&number));
        Ok(())
    }

    #[test]
    fn what_two_prompts_end_with_is_found() {
        assert_eq!(common_end(&[1, 2, 3, 4], &[9, 3, 4]), [3, 4]);
        assert_eq!(common_end(&[3, 4], &[9, 3, 4]), [3, 4]);
        assert!(common_end(&[1], &[2]).is_empty());
    }
}
