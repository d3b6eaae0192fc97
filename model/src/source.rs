//! What `--model` names, and everything that is read of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::Device;
use lengthwise_core::SamplingParams;

use crate::{
    Hub, HubConfig, HubId, Llama, ModelConfig, ModelError, ModelTokenizer, OpenProgress, Precision, PromptTemplate,
    Weights,
};

/// The name of the bundled model.
pub const TINY: &str = "tiny";

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
    /// How tokens are drawn where the user says nothing, by generation_config.json.
    pub sampling: SamplingParams,
}

impl LoadedModel {
    /// Loads a model folder, a model of the Hugging Face hub (`org/name`, `org/name@revision`), which is fetched into
    /// its cache where it is not there yet, or [`TINY`], the bundled model.
    ///
    /// # Errors
    /// It is not there and cannot be fetched, a file of it is damaged, or the device does not run that precision.
    pub fn open(
        spec: &str,
        precision: impl Into<Precision>,
        device: &Device,
        progress: &mut dyn OpenProgress,
    ) -> Result<Self, ModelError> {
        let folder = find(spec, HubConfig::from_env, progress)?;
        let config = ModelConfig::from_folder(&folder)?;
        let tokenizer = ModelTokenizer::from_folder(&folder, &config)?;
        let template = PromptTemplate::from_folder(&folder)?;
        let sampling = crate::generation::sampling(&folder)?;
        let precision = precision.into();
        let dtype = precision.dtype.resolve(&config, device);
        let weights = Weights::open(&folder, dtype, device)?.quantized(precision.quantization)?;
        let network = Llama::load(&config, &weights, progress)?;
        weights.warn_of_surplus(&folder);
        Ok(Self {
            name: spec.to_owned(),
            network: Arc::new(network),
            tokenizer: Arc::new(tokenizer),
            template: Arc::new(template),
            sampling,
        })
    }
}

/// The folder that is meant; a folder of that name comes before a model of the hub.
fn find(spec: &str, hub: impl FnOnce() -> HubConfig, progress: &mut dyn OpenProgress) -> Result<PathBuf, ModelError> {
    if spec == TINY {
        return bundled();
    }
    let folder = Path::new(spec);
    if folder.is_dir() {
        return Ok(folder.to_owned());
    }
    let missing = |reason: &str| ModelError::NotFound {
        spec: spec.to_owned(),
        reason: reason.to_owned(),
    };
    if folder.is_file() {
        return Err(missing("it is a file; name the model folder that holds it"));
    }
    match HubId::parse(spec) {
        Some(id) => Ok(Hub::new(hub()).fetch(&id, progress)?),
        None => Err(missing(
            "there is no such folder, and it is no name on the hub (org/name or org/name@revision)",
        )),
    }
}

/// `data/tiny`, found from the current folder, the program's own, or where it was built.
fn bundled() -> Result<PathBuf, ModelError> {
    let named = std::env::var_os("LENGTHWISE_DATA").map(PathBuf::from);
    let current = std::env::current_dir().ok();
    let program = std::env::current_exe().ok();
    let above = |start: Option<PathBuf>| {
        let ancestors: Vec<PathBuf> = start
            .iter()
            .flat_map(|p| p.ancestors())
            .map(|p| p.join("data"))
            .collect();
        ancestors
    };
    let built = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../data")).to_owned();
    let mut candidates = named
        .into_iter()
        .chain(above(current))
        .chain(above(program))
        .chain([built]);
    let found = candidates.find_map(|data| Some(data.join(TINY)).filter(|p| p.join("config.json").is_file()));
    found.ok_or_else(|| ModelError::NotFound {
        spec: TINY.to_owned(),
        reason: "data/tiny is not beside the program; set LENGTHWISE_DATA to the folder that holds it".to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;
    use crate::DTypeChoice;

    #[test]
    fn what_is_not_there_says_what_to_do() -> anyhow::Result<()> {
        let cache = tempfile::tempdir()?;
        let offline = || HubConfig {
            endpoint: "http://hub.invalid".to_owned(),
            cache: Some(cache.path().to_owned()),
            token: None,
            offline: true,
        };
        let message = |spec: &str| find(spec, offline, &mut ()).expect_err(spec).to_string();
        assert!(message("nobody/no-such-model").contains("HF_HUB_OFFLINE is set"));
        assert!(message("./no-such-folder").contains("no such folder"));
        let file = tempfile::NamedTempFile::new()?;
        assert!(message(&file.path().to_string_lossy()).contains("it is a file"));
        Ok(())
    }

    /// A whole model folder; its tokenizer knows one word.
    fn model_folder(config: &ModelConfig) -> anyhow::Result<tempfile::TempDir> {
        let zeros = |shape: &[usize]| candle_core::Tensor::zeros(shape, DType::F16, &Device::Cpu);
        let h = config.hidden_size;
        let mut tensors = std::collections::HashMap::new();
        tensors.insert("model.embed_tokens.weight".to_owned(), zeros(&[config.vocab_size, h])?);
        tensors.insert("model.norm.weight".to_owned(), zeros(&[h])?);
        for layer in 0..config.num_hidden_layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            for kind in crate::LinearKind::ALL {
                let (out, input) = kind.shape(config);
                tensors.insert(name(&kind.path()), zeros(&[out, input])?);
            }
            tensors.insert(name("input_layernorm"), zeros(&[h])?);
            tensors.insert(name("post_attention_layernorm"), zeros(&[h])?);
        }
        let dir = tempfile::tempdir()?;
        candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors"))?;
        std::fs::write(dir.path().join("config.json"), config.to_json())?;
        let tokenizer = r#"{"model": {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"}}"#;
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer)?;
        Ok(dir)
    }

    #[test]
    fn a_folder_opens_whole_or_names_the_file_that_is_missing() -> anyhow::Result<()> {
        let config = crate::testing::config();
        let dir = model_folder(&config)?;
        let spec = dir.path().to_string_lossy().into_owned();
        let open = || LoadedModel::open(&spec, DTypeChoice::Auto, &Device::Cpu, &mut ());
        let model = open()?;
        assert_eq!((model.network.config(), model.network.dtype()), (&config, DType::F32));
        assert_eq!(model.tokenizer.encode("a", true)?, [0]);
        for file in ["model.safetensors", "tokenizer.json", "config.json"] {
            std::fs::remove_file(dir.path().join(file))?;
            let err = open().expect_err(file).to_string();
            assert!(
                err.contains(file) && err.contains(&spec) && !err.contains('\n'),
                "{err}"
            );
        }
        Ok(())
    }
}
