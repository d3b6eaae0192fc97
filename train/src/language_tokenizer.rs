//! The tokenizer of the bundled model: byte-level BPE trained on the instruction language.
//!
//! Every number that counting or a length needs is one token together with the space before it, so that
//! to count is to name the successor. The merges of those numbers are put in by hand; the rest is trained
//! on the words. All bytes are in the vocabulary, so that any text encodes and decodes to itself.

use thiserror::Error;
use tokenizers::models::bpe::{BPE, BpeTrainer, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{
    AddedToken, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper,
    SplitDelimiterBehavior, Tokenizer, Trainer,
};

use crate::language::{self, Family};

/// Vocabulary of the bundled model.
pub const VOCAB_SIZE: usize = 1024;
/// Beginning of a sequence, id 0; put in front by the tokenizer.
pub const BOS: &str = "<s>";
/// End of an answer, id 1.
pub const EOS: &str = "</s>";
/// Padding, id 2.
pub const PAD: &str = "<pad>";
/// The chat template of the bundled model, for `tokenizer_config.json`. It writes `<s>` itself, as engines that render it expect.
pub const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}";

/// Words and numbers take the space before them; every other character stands alone, so that the ids of
/// a prompt that ends in `:` do not depend on the answer behind it.
const PIECES: &str = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+";
/// How a space looks in the byte-level alphabet.
const SPACE: &str = "Ġ";
/// Texts that are not in the examples but that the model reads in later stages.
const LATER_TEXTS: [&str; 3] = [
    "\nDon't output the response for the above instruction. Instead, you need to predict the number of tokens in your response. Output one number only.",
    "\nBefore responding to the above instruction, you have to predict the length of your response. Print the estimated number of tokens in your response in the first line. Then change to a new line to respond to the instruction.",
    "USER: a ASSISTANT: b",
];
/// How often those texts are in the corpus: enough for their words to become tokens.
const LATER_REPEATS: usize = 150;

/// Why no tokenizer was made.
#[derive(Debug, Error)]
pub enum TrainTokenizerError {
    /// The tokenizers library refused.
    #[error("the tokenizers library failed")]
    Library(#[source] tokenizers::Error),
    /// The trained model does not have the form that is read back.
    #[error("the trained BPE could not be read back")]
    Form(#[from] serde_json::Error),
    /// The vocabulary has no room for words.
    #[error("a vocabulary of {got} is too small: bytes, numbers and special tokens take {fixed}")]
    VocabTooSmall {
        /// What was asked for.
        got: usize,
        /// What is always there.
        fixed: usize,
    },
}

/// Trained model, as the library writes it.
#[derive(serde::Deserialize)]
struct Trained {
    merges: Vec<(String, String)>,
}

/// Numbers that are one token: 0 to 240 (products in tables) and the multiples of ten up to 510.
fn single_numbers() -> impl Iterator<Item = u32> {
    (0..=240).chain((250..=510).step_by(10))
}

/// Trains the tokenizer on a corpus of texts; the same corpus gives the same tokenizer.
pub fn train_tokenizer(corpus: &[String], vocab_size: usize) -> Result<Tokenizer, TrainTokenizerError> {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut tokens: Vec<String> = [BOS, EOS, PAD].map(String::from).to_vec();
    tokens.extend(alphabet.iter().map(char::to_string));
    let mut merges = Vec::new();
    for n in single_numbers() {
        let digits = n.to_string();
        let (head, last) = digits.split_at(digits.len() - 1);
        merges.push((format!("{SPACE}{head}"), last.to_owned()));
        tokens.push(format!("{SPACE}{digits}"));
    }
    let room = vocab_size
        .checked_sub(tokens.len())
        .ok_or(TrainTokenizerError::VocabTooSmall {
            got: vocab_size,
            fixed: tokens.len(),
        })?;
    for (left, right) in word_merges(corpus, room + alphabet.len())?.into_iter().take(room) {
        tokens.push(format!("{left}{right}"));
        merges.push((left, right));
    }
    let vocab: Vocab = tokens.into_iter().zip(0..).collect();
    assemble(vocab, merges)
}

/// Merges of the words of the corpus; numbers are left out.
fn word_merges(corpus: &[String], vocab_size: usize) -> Result<Vec<(String, String)>, TrainTokenizerError> {
    let library = TrainTokenizerError::Library;
    let splitter = pre_tokenizer().map_err(library)?;
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let later = LATER_TEXTS
        .iter()
        .flat_map(|text| std::iter::repeat_n(*text, LATER_REPEATS));
    let texts = corpus.iter().map(String::as_str).chain(later);
    trainer
        .feed(texts, |text| {
            let mut text = PreTokenizedString::from(text);
            splitter.pre_tokenize(&mut text)?;
            let pieces = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
            Ok(pieces
                .into_iter()
                .filter(|(piece, ..)| !piece.contains(|c: char| c.is_ascii_digit()))
                .map(|(piece, ..)| piece.to_owned())
                .collect())
        })
        .map_err(library)?;
    let mut model = BPE::default();
    trainer.train(&mut model).map_err(library)?;
    let trained: Trained = serde_json::from_value(serde_json::to_value(&model)?)?;
    Ok(trained.merges)
}

fn pre_tokenizer() -> tokenizers::Result<PreTokenizerWrapper> {
    let split = Split::new(
        SplitPattern::Regex(PIECES.to_owned()),
        SplitDelimiterBehavior::Isolated,
        false,
    )?;
    let bytes = ByteLevel::new(false, true, false);
    Ok(Sequence::new(vec![split.into(), bytes.into()]).into())
}

fn assemble(vocab: Vocab, merges: Vec<(String, String)>) -> Result<Tokenizer, TrainTokenizerError> {
    let library = TrainTokenizerError::Library;
    let model = BPE::builder()
        .vocab_and_merges(vocab, merges)
        .build()
        .map_err(library)?;
    let mut tokenizer = Tokenizer::new(model);
    let special = [BOS, EOS, PAD].map(|token| AddedToken::from(token, true));
    tokenizer.add_special_tokens(special).map_err(library)?;
    let processor = TemplateProcessing::builder()
        .try_single(format!("{BOS} $A"))
        .and_then(|b| b.try_pair(format!("{BOS} $A $B:1")))
        .map_err(|e| library(e.into()))?
        .special_tokens(vec![(BOS, 0)])
        .build()
        .map_err(|e| library(e.into()))?;
    tokenizer
        .with_pre_tokenizer(Some(pre_tokenizer().map_err(library)?))
        .with_decoder(Some(ByteLevel::default()))
        .with_post_processor(Some(processor));
    Ok(tokenizer)
}

/// The texts that the bundled model's tokenizer is trained on: every family has the same share, since
/// the frequent words of the long families would else take the whole vocabulary.
pub fn corpus(seed: u64, examples_per_family: usize) -> Vec<String> {
    use rand::SeedableRng;
    let rng = &mut rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut texts = Vec::with_capacity(Family::ALL.len() * examples_per_family);
    for &family in Family::ALL {
        for _ in 0..examples_per_family {
            let example = language::example(family, rng);
            texts.push(format!("USER: {} ASSISTANT:", example.instruction));
            texts.push(format!(" {}", example.answer));
        }
    }
    texts
}

#[cfg(test)]
mod tests;
