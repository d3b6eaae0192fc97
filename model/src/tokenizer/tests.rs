//! Tokenizers of both kinds of file, and the beginning-of-sequence token.

use std::path::PathBuf;

use lengthwise_core::{ChatMessage, Prompt};

use super::*;
use crate::PromptTemplate;

fn config(vocab_size: usize) -> ModelConfig {
    ModelConfig {
        vocab_size,
        ..crate::testing::config()
    }
}

/// A word-level tokenizer whose rule puts `<s>` in front.
fn json() -> String {
    serde_json::json!({
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false},
            {"id": 1, "content": "</s>", "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false},
        ],
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "?": 4}, "unk_token": "?"},
    })
    .to_string()
}

#[test]
fn a_tokenizer_json_is_read_without_its_truncation() -> anyhow::Result<()> {
    let tokenizer = ModelTokenizer::from_bytes(json().as_bytes(), &config(5))?;
    assert_eq!(tokenizer.encode("a b a b zzz", true)?, [0, 2, 3, 2, 3, 4]);
    assert_eq!(tokenizer.encode("a</s>b", false)?, [2, 1, 3]);
    assert_eq!(tokenizer.decode(&[0, 2, 3, 1])?, "a b");
    Ok(())
}

#[test]
fn tokens_beyond_the_models_vocabulary_are_refused() {
    let err = ModelTokenizer::from_bytes(json().as_bytes(), &config(4))
        .expect_err("5 tokens")
        .to_string();
    assert!(err.contains("token 4 is outside the model's vocabulary of 4"), "{err}");
}

#[test]
fn a_model_s_own_template_says_whether_a_sequence_begins_with_a_token() -> anyhow::Result<()> {
    let tokenizer = ModelTokenizer::from_bytes(json().as_bytes(), &config(5))?;
    let prompt = Prompt::Chat(vec![ChatMessage::user("a")]);
    let of = |source| PromptTemplate::from_jinja(source, "<s>", "</s>");
    for (source, begins) in [
        ("{{ messages[0].content }}", &[][..]),
        ("{{ bos_token }}{{ messages[0].content }}", &[0]),
    ] {
        let tokens = |more: &[u32]| [begins, &[2], more].concat();
        assert_eq!(of(source)?.encode(&tokenizer, &prompt)?, tokens(&[]), "{source}");
        let answered = of(source)?.encode_with_answer(&tokenizer, &prompt, "b")?;
        assert_eq!(answered, tokens(&[3]), "{source}");
    }
    let vicuna = PromptTemplate::vicuna_v1_1()?;
    assert_eq!(
        vicuna.encode(&tokenizer, &prompt)?[..2],
        [0, 4],
        "FastChat leaves it to the tokenizer"
    );
    Ok(())
}

#[test]
fn the_end_is_the_configs_else_the_tokenizers() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("tokenizer.json"), json())?;
    let mut config = config(5);
    config.eos_token_ids = vec![3];
    assert_eq!(ModelTokenizer::from_folder(dir.path(), &config)?.eos(), [3]);
    config.eos_token_ids = vec![];
    assert_eq!(ModelTokenizer::from_folder(dir.path(), &config)?.eos(), [1]);
    std::fs::write(
        dir.path().join("tokenizer_config.json"),
        r#"{"eos_token": {"content": "b"}}"#,
    )?;
    assert_eq!(ModelTokenizer::from_folder(dir.path(), &config)?.eos(), [3]);
    Ok(())
}

#[test]
fn a_missing_or_damaged_file_is_named() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let error = || {
        ModelTokenizer::from_folder(dir.path(), &config(5))
            .expect_err("damaged")
            .to_string()
    };
    assert!(error().contains("no tokenizer.json"), "{}", error());
    std::fs::write(dir.path().join("tokenizer.model"), b"\x0a\x05a")?;
    assert!(error().contains("tokenizer.model: truncated"), "{}", error());
    std::fs::write(dir.path().join("tokenizer.json"), &json()[..100])?;
    assert!(error().contains("tokenizer.json: not a tokenizer"), "{}", error());
    Ok(())
}

/// A protobuf field of bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2, bytes.len() as u8], bytes].concat()
}

fn piece(text: &str, score: f32, kind: u8) -> Vec<u8> {
    let score = score.to_le_bytes();
    field(
        1,
        &[field(1, text.as_bytes()), vec![0x15], score.to_vec(), vec![0x18, kind]].concat(),
    )
}

/// A SentencePiece model whose best merge is `ab`, then `▁a`; bytes stand in for what it lacks.
fn small_model(model_type: u8) -> Vec<u8> {
    let mut model = [piece("<unk>", 0.0, 2), piece("<s>", 0.0, 3), piece("</s>", 0.0, 3)].concat();
    for byte in 0..=255u8 {
        model.extend(piece(&format!("<0x{byte:02X}>"), 0.0, 6));
    }
    for (text, score) in [("ab", -0.0), ("▁a", -1.0), ("▁", -2.0), ("a", -3.0), ("b", -4.0)] {
        model.extend(piece(text, score, 1));
    }
    // trainer_spec: model_type, byte_fallback (35); normalizer_spec: remove_extra_whitespaces (4) off.
    model.extend(field(2, &[0x18, model_type, 0x98, 0x02, 1]));
    model.extend(field(3, &[0x20, 0]));
    model
}

fn small_folder(model_type: u8) -> anyhow::Result<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    std::fs::write(dir.path().join("tokenizer.model"), small_model(model_type))?;
    Ok(dir)
}

#[test]
fn sentencepiece_merges_the_best_piece_first() -> anyhow::Result<()> {
    let dir = small_folder(2)?;
    let tokenizer = ModelTokenizer::from_folder(dir.path(), &config(300))?;
    let [ab, space_a, space, b] = [259, 260, 261, 263];
    assert_eq!(tokenizer.encode("ab", true)?, [1, space, ab], "ab is better than ▁a");
    assert_eq!(tokenizer.encode("a b", false)?, [space_a, space, b]);
    assert_eq!(
        tokenizer.encode("é", false)?,
        [space, 3 + 0xC3, 3 + 0xA9],
        "by its bytes"
    );
    assert_eq!(
        tokenizer.decode(&[1, space, ab, space_a, 3 + 0xC3, 3 + 0xA9, 2])?,
        "ab aé"
    );
    Ok(())
}

#[test]
fn the_space_after_a_special_token_is_as_the_folder_says() -> anyhow::Result<()> {
    let dir = small_folder(2)?;
    let encode = || ModelTokenizer::from_folder(dir.path(), &config(300))?.encode("b</s>b", true);
    assert_eq!(encode()?, [1, 261, 263, 2, 261, 263]);
    std::fs::write(
        dir.path().join("tokenizer_config.json"),
        r#"{"legacy": false, "add_bos_token": false}"#,
    )?;
    assert_eq!(encode()?, [261, 263, 2, 263]);
    Ok(())
}

#[test]
fn added_tokens_get_the_ids_that_the_folder_names() -> anyhow::Result<()> {
    let dir = small_folder(2)?;
    let added = dir.path().join("added_tokens.json");
    std::fs::write(&added, r#"{"[PAD]": 264}"#)?;
    let tokenizer = ModelTokenizer::from_folder(dir.path(), &config(300))?;
    assert_eq!(tokenizer.encode("[PAD]", false)?, [264]);
    std::fs::write(&added, r#"{"[PAD]": 270}"#)?;
    let err = ModelTokenizer::from_folder(dir.path(), &config(300))
        .expect_err("a gap")
        .to_string();
    assert!(err.contains("[PAD] should have id 270"), "{err}");
    Ok(())
}

#[test]
fn a_sentencepiece_model_is_an_error_wherever_it_is_cut() -> anyhow::Result<()> {
    let options = sentencepiece::Options {
        legacy: true,
        add_bos_token: true,
        added: Vec::new(),
    };
    let whole = small_model(2);
    for keep in (0..whole.len()).step_by(3) {
        assert!(
            sentencepiece::tokenizer(&whole[..keep], &options).is_err(),
            "{keep} bytes"
        );
    }
    let dir = small_folder(1)?;
    let err = ModelTokenizer::from_folder(dir.path(), &config(300))
        .expect_err("unigram")
        .to_string();
    assert!(err.contains("only BPE models"), "{err}");
    Ok(())
}

/// LLaMA's tokenizer.model, which is not part of the project: `LENGTHWISE_SHARED_DATA` names the folder that has it.
fn llama_model() -> Option<PathBuf> {
    let folder = PathBuf::from(std::env::var_os("LENGTHWISE_SHARED_DATA")?);
    Some(folder.join("llama-tokenizer.model")).filter(|p| p.is_file())
}

#[test]
fn llamas_ids_are_those_of_sentencepiece() -> anyhow::Result<()> {
    let Some(path) = llama_model() else {
        eprintln!("skipped: LENGTHWISE_SHARED_DATA names no folder with llama-tokenizer.model");
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    std::fs::copy(path, dir.path().join("tokenizer.model"))?;
    let tokenizer = ModelTokenizer::from_folder(dir.path(), &config(32_000))?;
    // Text, ids, and what they decode to: 250 rows, or as many as scripts/make_model_fixtures.py was told to make.
    let rows = match std::env::var_os("LENGTHWISE_TOKENIZER_ROWS") {
        Some(path) => std::fs::read_to_string(path)?,
        None => include_str!("../../fixtures/sentencepiece.json").to_owned(),
    };
    let rows: Vec<(String, Vec<u32>, String)> = serde_json::from_str(&rows)?;
    let differs = |(text, ids, decoded): &&(String, Vec<u32>, String)| {
        tokenizer.encode(text, false).ok().as_ref() != Some(ids) || tokenizer.decode(ids).ok().as_ref() != Some(decoded)
    };
    let wrong: Vec<_> = rows.iter().filter(differs).map(|(text, _, _)| text).collect();
    eprintln!("{} rows compared", rows.len());
    anyhow::ensure!(
        wrong.is_empty(),
        "{} of {} differ: {:?}",
        wrong.len(),
        rows.len(),
        wrong.first()
    );
    Ok(())
}
