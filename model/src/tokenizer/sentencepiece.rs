//! SentencePiece's `tokenizer.model` as a pipeline of `tokenizers`: Vicuna and the first Llamas bring nothing else.
//!
//! The pipeline is the one that transformers' LlamaConverter makes (convert_slow_tokenizer.py).

use std::collections::HashMap;

use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::{Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use super::protobuf::{Fields, Malformed, Value};

/// How a space looks inside pieces.
const SPACE: &str = "▁";
/// `TrainerSpec.ModelType.BPE`; 1, the default, is unigram.
const BPE_MODEL: u64 = 2;

/// What tokenizer_config.json says about the use of the model.
pub(super) struct Options {
    /// Whether a space goes before the text after a special token too, as it did before transformers 4.31.
    pub legacy: bool,
    pub add_bos_token: bool,
    /// Tokens behind those of the model, with their ids.
    pub added: Vec<(u32, AddedToken)>,
}

/// `SentencePiece.Type`.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

struct Piece {
    text: String,
    score: f32,
    kind: Kind,
}

/// `ModelProto`, as far as it decides about the ids.
struct Model {
    pieces: Vec<Piece>,
    model_type: u64,
    byte_fallback: bool,
    bos_id: Option<usize>,
    /// Rules of normalisation that are not the identity.
    rules: bool,
    add_dummy_prefix: bool,
}

/// Builds the tokenizer; the error is the reason alone.
pub(super) fn tokenizer(bytes: &[u8], options: &Options) -> Result<Tokenizer, String> {
    let cut = |Malformed| "truncated or not a SentencePiece model".to_owned();
    let model = Model::parse(bytes).map_err(cut)?;
    model.check()?;
    build(&model, options)
}

fn build(model: &Model, options: &Options) -> Result<Tokenizer, String> {
    let text = |err: tokenizers::Error| err.to_string();
    let unknown = model.pieces.iter().find(|p| p.kind == Kind::Unknown);
    let unknown = unknown.ok_or("the model has no piece for the unknown")?;
    let ids = model.pieces.iter().zip(0u32..).map(|(p, id)| (p.text.clone(), id));
    let bpe = BPE::builder()
        .vocab_and_merges(ids.collect::<Vocab>(), model.merges())
        .unk_token(unknown.text.clone())
        .fuse_unk(true)
        .byte_fallback(model.byte_fallback)
        .build();
    let mut tokenizer = Tokenizer::new(bpe.map_err(text)?);
    if options.legacy || !model.add_dummy_prefix {
        let prepend = model.add_dummy_prefix.then(|| Prepend::new(SPACE.to_owned()).into());
        let replace = Replace::new(" ", SPACE).map_err(text)?.into();
        let steps = prepend.into_iter().chain([replace]).collect();
        tokenizer.with_normalizer(Some(Normalizers::new(steps))).map_err(text)?;
    } else {
        tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::First, false)));
    }
    let mut steps = vec![
        Replace::new(SPACE, " ").map_err(text)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if model.add_dummy_prefix {
        steps.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(Decoders::new(steps)));
    add_tokens(&mut tokenizer, model, options)?;
    if let Some(bos) = model.bos_id.filter(|_| options.add_bos_token) {
        let bos = (model.pieces[bos].text.clone(), bos as u32);
        let template = TemplateProcessing::builder()
            .try_single(format!("{} $A", bos.0))?
            .special_tokens(vec![bos])
            .build();
        tokenizer.with_post_processor(Some(template.map_err(|err| err.to_string())?));
    }
    Ok(tokenizer)
}

/// The pieces that a text may name whole, and the tokens that the folder adds.
fn add_tokens(tokenizer: &mut Tokenizer, model: &Model, options: &Options) -> Result<(), String> {
    let special = |p: &&Piece| matches!(p.kind, Kind::Unknown | Kind::Control);
    let special = model.pieces.iter().filter(special);
    let special: Vec<AddedToken> = special.map(|p| AddedToken::from(p.text.clone(), true)).collect();
    tokenizer.add_special_tokens(special).map_err(|err| err.to_string())?;
    let defined = model.pieces.iter().filter(|p| p.kind == Kind::UserDefined);
    let defined: Vec<AddedToken> = defined
        .map(|p| AddedToken::from(p.text.clone(), false).normalized(false))
        .collect();
    tokenizer.add_tokens(defined).map_err(|err| err.to_string())?;
    for (id, token) in &options.added {
        let text = token.content.clone();
        tokenizer.add_tokens([token.clone()]).map_err(|err| err.to_string())?;
        let got = tokenizer.token_to_id(&text);
        if got != Some(*id) {
            return Err(format!("added token {text} should have id {id}, it would get {got:?}"));
        }
    }
    Ok(())
}

impl Model {
    fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut model = Self {
            pieces: Vec::new(),
            model_type: 1,
            byte_fallback: false,
            bos_id: Some(1),
            rules: false,
            add_dummy_prefix: true,
        };
        let mut removes_spaces = true;
        for field in Fields::of(bytes) {
            match field? {
                (1, Value::Bytes(piece)) => model.pieces.push(Piece::parse(piece)?),
                (2, Value::Bytes(trainer)) => model.read_trainer(trainer)?,
                (3, Value::Bytes(normalizer)) => {
                    for field in Fields::of(normalizer) {
                        match field? {
                            (2, value) => model.rules |= !value.bytes().ok_or(Malformed)?.is_empty(),
                            (3, value) => model.add_dummy_prefix = value.varint().ok_or(Malformed)? != 0,
                            (4, value) => removes_spaces = value.varint().ok_or(Malformed)? != 0,
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        model.rules |= removes_spaces;
        Ok(model)
    }

    fn read_trainer(&mut self, trainer: &[u8]) -> Result<(), Malformed> {
        for field in Fields::of(trainer) {
            match field? {
                (3, value) => self.model_type = value.varint().ok_or(Malformed)?,
                (35, value) => self.byte_fallback = value.varint().ok_or(Malformed)? != 0,
                // An int32; -1, sign-extended to 64 bits, means that there is none.
                (41, value) => {
                    self.bos_id = i32::try_from(value.varint().ok_or(Malformed)? as i64)
                        .ok()
                        .and_then(|id| usize::try_from(id).ok())
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), String> {
        if self.pieces.is_empty() {
            return Err("truncated or not a SentencePiece model".to_owned());
        }
        if self.model_type != BPE_MODEL {
            return Err("only BPE models of SentencePiece are supported; bring a tokenizer.json".to_owned());
        }
        if self.rules {
            return Err("SentencePiece's normalisation rules are not supported; bring a tokenizer.json".to_owned());
        }
        let mut seen = std::collections::HashSet::new();
        if let Some(twice) = self.pieces.iter().find(|p| !seen.insert(&p.text)) {
            return Err(format!("piece {:?} occurs twice", twice.text));
        }
        match self.bos_id {
            Some(id) if id >= self.pieces.len() => Err(format!("bos_id {id} is no piece")),
            _ => Ok(()),
        }
    }

    /// Every pair of pieces that makes a third, the best piece first: SentencePiece merges by the score of the result.
    fn merges(&self) -> Merges {
        let usable = |p: &&Piece| matches!(p.kind, Kind::Normal | Kind::UserDefined | Kind::Unused);
        let ids: HashMap<&str, usize> = self
            .pieces
            .iter()
            .enumerate()
            .map(|(id, p)| (p.text.as_str(), id))
            .collect();
        let mut merges = Vec::new();
        for piece in self.pieces.iter().filter(usable) {
            let cuts = piece.text.char_indices().skip(1).map(|(at, _)| piece.text.split_at(at));
            let mut pairs: Vec<(usize, usize)> = cuts
                .filter_map(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?)))
                .collect();
            pairs.sort_unstable();
            merges.extend(pairs.into_iter().map(|pair| (piece.score, pair)));
        }
        let chars = |id: usize| self.pieces[id].text.chars().count();
        let lengths = |(left, right): (usize, usize)| (chars(left), chars(right));
        // A stable sort, so that equal scores are in transformers' order: the longer left part, then the earlier piece.
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| lengths(b.1).cmp(&lengths(a.1))));
        let text = |id: usize| self.pieces[id].text.clone();
        merges
            .into_iter()
            .map(|(_, (left, right))| (text(left), text(right)))
            .collect()
    }
}

impl Piece {
    fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut piece = Self {
            text: String::new(),
            score: 0.0,
            kind: Kind::Normal,
        };
        for field in Fields::of(bytes) {
            match field? {
                (1, value) => {
                    let text = std::str::from_utf8(value.bytes().ok_or(Malformed)?);
                    piece.text = text.map_err(|_| Malformed)?.to_owned();
                }
                (2, value) => piece.score = value.float().ok_or(Malformed)?,
                (3, value) => {
                    piece.kind = match value.varint() {
                        Some(1) => Kind::Normal,
                        Some(2) => Kind::Unknown,
                        Some(3) => Kind::Control,
                        Some(4) => Kind::UserDefined,
                        Some(5) => Kind::Unused,
                        Some(6) => Kind::Byte,
                        _ => return Err(Malformed),
                    }
                }
                _ => {}
            }
        }
        Ok(piece)
    }
}
