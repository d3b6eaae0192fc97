//! Tests of the tokenizer, and the measure of the language's lengths with it.
#![allow(clippy::unwrap_used)]

use std::sync::LazyLock;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::language::{Split as Part, examples, instructions};

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| train_tokenizer(&corpus(1, 150), VOCAB_SIZE).unwrap());

/// Generated tokens of an answer, the end-of-sequence token counted.
fn length(answer: &str) -> f64 {
    let text = format!(" {answer}");
    TOKENIZER.encode(text, false).unwrap().len() as f64 + 1.0
}

#[test]
fn same_corpus_gives_the_same_tokenizer() {
    let again = train_tokenizer(&corpus(1, 150), VOCAB_SIZE).unwrap();
    assert_eq!(again.to_string(false).unwrap(), TOKENIZER.to_string(false).unwrap());
    assert_eq!(TOKENIZER.get_vocab_size(true), VOCAB_SIZE);
}

#[test]
fn numbers_of_counting_and_of_lengths_are_single_tokens() {
    for n in (0..=240).chain((250..=510).step_by(10)) {
        let got = TOKENIZER.encode(format!(" {n}"), false).unwrap();
        assert_eq!(got.len(), 1, "{n}: {:?}", got.get_tokens());
    }
    let list = TOKENIZER.encode(" 7 8. 120", false).unwrap();
    assert_eq!(list.get_tokens(), ["Ġ7", "Ġ8", ".", "Ġ120"]);
    // Not a single one, but still of the right digits.
    assert_eq!(TOKENIZER.encode(" 357", false).unwrap().get_tokens(), ["Ġ35", "7"]);
}

#[test]
fn special_tokens_come_first_and_bos_is_added() {
    assert_eq!(
        [BOS, EOS, PAD].map(|t| TOKENIZER.token_to_id(t)),
        [Some(0), Some(1), Some(2)]
    );
    assert_eq!(TOKENIZER.encode("USER: a", true).unwrap().get_ids()[0], 0);
    assert_ne!(TOKENIZER.encode("USER: a", false).unwrap().get_ids()[0], 0);
    let ended = TOKENIZER.encode(" 31</s>", false).unwrap();
    assert_eq!(ended.get_tokens(), ["Ġ31", EOS]);
}

#[test]
fn letters_of_a_spelling_are_single_tokens() {
    let got = TOKENIZER.encode(" c-a-t", false).unwrap();
    assert_eq!(got.get_tokens(), ["Ġc", "-", "a", "-", "t"]);
}

#[test]
fn prompt_and_answer_encode_apart_as_together_and_decode_to_themselves() {
    for e in examples(Part::Train, 3, 2000) {
        let (prompt, answer) = (format!("USER: {} ASSISTANT:", e.instruction), format!(" {}", e.answer));
        let both = TOKENIZER.encode(format!("{prompt}{answer}"), false).unwrap();
        let mut ids = TOKENIZER.encode(prompt.as_str(), false).unwrap().get_ids().to_vec();
        ids.extend(TOKENIZER.encode(answer.as_str(), false).unwrap().get_ids());
        assert_eq!(both.get_ids(), ids);
        assert_eq!(TOKENIZER.decode(&ids, false).unwrap(), format!("{prompt}{answer}"));
    }
}

#[test]
fn any_text_encodes_and_decodes_to_itself() {
    for text in ["Größe 你好 🦊\t x  y\n", "a\u{0}b", "3.14 -5 x1y2 10000"] {
        let ids = TOKENIZER.encode(text, false).unwrap();
        assert_eq!(TOKENIZER.decode(ids.get_ids(), false).unwrap(), text);
    }
}

#[test]
fn saved_tokenizer_reads_back_the_same() {
    let json = TOKENIZER.to_string(true).unwrap();
    let back = Tokenizer::from_bytes(json.as_bytes()).unwrap();
    let text = "USER: Count from 7 to 31. ASSISTANT: 7 8";
    assert_eq!(
        back.encode(text, true).unwrap().get_ids(),
        TOKENIZER.encode(text, true).unwrap().get_ids()
    );
}

#[test]
fn vocabulary_without_room_is_refused() {
    let error = train_tokenizer(&corpus(1, 1), 300).unwrap_err();
    assert!(matches!(
        error,
        TrainTokenizerError::VocabTooSmall { got: 300, fixed: 527 }
    ));
}

#[test]
fn no_answer_is_above_440_tokens() {
    let rng = &mut ChaCha8Rng::seed_from_u64(5);
    for &family in Family::ALL {
        for _ in 0..1500 {
            let e = crate::language::example(family, rng);
            let got = length(&e.answer);
            assert!((2.0..=440.0).contains(&got), "{got}: {e:?}");
        }
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (n, sum) = values.into_iter().fold((0.0, 0.0), |(n, s), v| (n + 1.0, s + v));
    sum / n
}

/// The point of the language: the largest of four samples is widely spread over instructions, yet told
/// by the instruction. The best possible guess for one is the median over many draws of it.
#[test]
fn largest_of_four_is_widely_spread_and_told_by_the_instruction() {
    let rng = &mut ChaCha8Rng::seed_from_u64(11);
    let mut labels = Vec::new();
    let mut errors = Vec::new();
    let mut per_family = std::collections::BTreeMap::<_, Vec<[f64; 4]>>::new();
    for question in instructions(Part::Train, 7, 700) {
        let open = question.reference().is_none();
        let draws: Vec<f64> = if open {
            (0..60).map(|_| length(&question.answer(rng))).collect()
        } else {
            vec![length(&question.answer(rng)); 4]
        };
        let largest: Vec<f64> = draws.chunks(4).map(|c| c.iter().copied().fold(0.0, f64::max)).collect();
        let guess = median(largest.clone());
        let error = mean(largest.iter().map(|l| (l - guess).abs()));
        let average = mean(draws.iter().copied());
        let deviation = mean(draws.iter().map(|d| (d - average).powi(2))).sqrt();
        labels.push(largest[0]);
        errors.push(error);
        let size = ["short ", "long "]
            .into_iter()
            .find(|s| question.instruction.contains(s));
        let size = if open { size.unwrap_or("plain") } else { "" };
        let row = [average, guess, error, deviation / average];
        per_family.entry((question.family, size)).or_default().push(row);
    }
    for ((family, size), rows) in per_family {
        let [m, l, e, cv] = [0, 1, 2, 3].map(|i| mean(rows.iter().map(|r| r[i])));
        let name = format!("{} {size}", family.name());
        println!(
            "{name:20} n {:3} mean {m:5.1} largest {l:5.1} error {e:4.1} cv {cv:.2}",
            rows.len()
        );
    }
    let mut sorted = labels.clone();
    sorted.sort_by(f64::total_cmp);
    let quantiles = [5, 25, 50, 75, 95].map(|q| sorted[q * sorted.len() / 100]);
    let middle = median(labels.clone());
    let constant = mean(labels.iter().map(|l| (l - middle).abs()));
    let irreducible = mean(errors);
    let shown = examples(Part::Train, 7, 2000);
    let answers = mean(shown.iter().map(|e| length(&e.answer)));
    let prompts = mean(shown.iter().map(|e| length(&e.instruction)));
    println!("pre-training mixture: instruction {prompts:.1}, answer {answers:.1} tokens");
    println!("labels at 5/25/50/75/95 %: {quantiles:?}; median guess {constant:.1}; irreducible {irreducible:.1}");
    assert!(constant >= 75.0, "{constant}");
    assert!(irreducible <= 10.0, "{irreducible}");
}
