//! What `--model` names, and everything that is read of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device};

use crate::{Llama, ModelConfig, ModelError, ModelTokenizer, PromptTemplate, Weights};

/// The name of the bundled model.
pub const TINY: &str = "tiny";

/// The dtype that weights are run in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DTypeChoice {
    /// f32 on the CPU, where narrower types are emulated; elsewhere the checkpoint's own.
    #[default]
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits with the exponent of f32.
    Bf16,
    /// 16 bits.
    F16,
}

impl DTypeChoice {
    fn resolve(self, config: &ModelConfig, device: &Device) -> DType {
        match (self, config.dtype.as_deref()) {
            (Self::F32, _) => DType::F32,
            (Self::Bf16, _) => DType::BF16,
            (Self::F16, _) => DType::F16,
            (Self::Auto, _) if device.is_cpu() => DType::F32,
            (Self::Auto, Some("float32")) => DType::F32,
            (Self::Auto, Some("float16")) => DType::F16,
            (Self::Auto, _) => DType::BF16,
        }
    }
}

/// A model with all that belongs to it.
#[derive(Debug, Clone)]
pub struct LoadedModel {
    /// As it was asked for.
    pub name: String,
    /// The network.
    pub network: Arc<Llama>,
    /// Text to tokens and back.
    pub tokenizer: Arc<ModelTokenizer>,
    /// Conversation to text.
    pub template: Arc<PromptTemplate>,
}

impl LoadedModel {
    /// Loads a model folder, a hub id that is in the local Hugging Face cache, or [`TINY`], the bundled model.
    ///
    /// # Errors
    /// It is not there, or a file of it is damaged.
    pub fn open(spec: &str, dtype: DTypeChoice, device: &Device) -> Result<Self, ModelError> {
        let folder = find(spec)?;
        let config = ModelConfig::from_folder(&folder)?;
        let tokenizer = ModelTokenizer::from_folder(&folder, &config)?;
        let template = PromptTemplate::from_folder(&folder)?;
        let weights = Weights::open(&folder, dtype.resolve(&config, device), device)?;
        Ok(Self {
            name: spec.to_owned(),
            network: Arc::new(Llama::new(&config, &weights)?),
            tokenizer: Arc::new(tokenizer),
            template: Arc::new(template),
        })
    }
}

fn find(spec: &str) -> Result<PathBuf, ModelError> {
    if spec == TINY {
        return bundled();
    }
    let folder = Path::new(spec);
    if folder.is_dir() {
        return Ok(folder.to_owned());
    }
    let missing = |reason: String| ModelError::NotFound { spec: spec.to_owned(), reason };
    let is_hub_id = spec.split('/').count() == 2 && !spec.starts_with(['.', '/']) && !folder.exists();
    if !is_hub_id {
        return Err(missing("there is no such folder".to_owned()));
    }
    cached_snapshot(spec).ok_or_else(|| {
        missing(format!("neither a folder nor in the Hugging Face cache; fetch it with `hf download {spec}`"))
    })
}

/// The newest revision of a hub model in the local cache.
fn cached_snapshot(id: &str) -> Option<PathBuf> {
    let home = std::env::var_os("HF_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/huggingface")))?;
    let model = home.join("hub").join(format!("models--{}", id.replace('/', "--")));
    let revision = std::fs::read_to_string(model.join("refs/main")).ok()?;
    let snapshot = model.join("snapshots").join(revision.trim());
    snapshot.is_dir().then_some(snapshot)
}

/// `data/tiny`, found from the current folder, the program's own, or where it was built.
fn bundled() -> Result<PathBuf, ModelError> {
    let named = std::env::var_os("LENGTHWISE_DATA").map(PathBuf::from);
    let current = std::env::current_dir().ok();
    let program = std::env::current_exe().ok();
    let above = |start: Option<PathBuf>| {
        let ancestors: Vec<PathBuf> = start.iter().flat_map(|p| p.ancestors()).map(|p| p.join("data")).collect();
        ancestors
    };
    let built = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../data")).to_owned();
    let mut candidates = named.into_iter().chain(above(current)).chain(above(program)).chain([built]);
    let found = candidates.find_map(|data| Some(data.join(TINY)).filter(|p| p.join("config.json").is_file()));
    found.ok_or_else(|| ModelError::NotFound {
        spec: TINY.to_owned(),
        reason: "data/tiny is not beside the program; set LENGTHWISE_DATA to the folder that holds it".to_owned(),
    })
}
