//! Where the hub and its cache are: the variables that every tool of Hugging Face obeys.

use std::ffi::OsString;
use std::path::PathBuf;

/// The hub that is asked when `HF_ENDPOINT` names no other.
const ENDPOINT: &str = "https://huggingface.co";

/// Where models come from and where they are kept.
#[derive(Clone)]
pub struct HubConfig {
    /// The hub's address, without a slash at the end.
    pub endpoint: String,
    /// The folder of `models--org--name`; `None` where there is no home folder.
    pub cache: Option<PathBuf>,
    /// Shows who asks.
    pub token: Option<String>,
    /// Only the cache may be used.
    pub offline: bool,
}

impl HubConfig {
    /// What the environment says.
    pub fn from_env() -> Self {
        Self::from_variables(&|name| std::env::var_os(name).filter(|value| !value.is_empty()))
    }

    /// The variables as `huggingface_hub` reads them: <https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>.
    fn from_variables(variable: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let text = |name: &str| variable(name).and_then(|value| value.into_string().ok());
        let path = |name: &str| variable(name).map(PathBuf::from);
        let cache_home = || path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")));
        let home = path("HF_HOME").or_else(|| Some(cache_home()?.join("huggingface")));
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let token_file = path("HF_TOKEN_PATH").or_else(|| Some(home.as_ref()?.join("token")));
        let token = text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN"));
        let token = token.or_else(|| std::fs::read_to_string(token_file?).ok());
        let is_set = |name: &str| {
            text(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.to_uppercase().as_str()))
        };
        Self {
            endpoint: text("HF_ENDPOINT").map_or(ENDPOINT.to_owned(), |url| url.trim_end_matches('/').to_owned()),
            cache: cache.or_else(|| Some(home?.join("hub"))),
            token: token.map(|t| t.trim().to_owned()).filter(|t| !t.is_empty()),
            offline: is_set("HF_HUB_OFFLINE") || is_set("TRANSFORMERS_OFFLINE"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(variables: &[(&str, &str)]) -> HubConfig {
        HubConfig::from_variables(&|name| {
            let found = variables.iter().find(|(n, _)| *n == name)?;
            Some(OsString::from(found.1))
        })
    }

    #[test]
    fn the_narrower_variable_decides_where_the_cache_is() {
        let cache = |variables: &[(&str, &str)]| config(variables).cache.map(|p| p.display().to_string());
        assert_eq!(cache(&[]), None);
        let mut variables = vec![("HOME", "/home/u")];
        for (name, value, want) in [
            ("HOME", "/home/u", "/home/u/.cache/huggingface/hub"),
            ("XDG_CACHE_HOME", "/x", "/x/huggingface/hub"),
            ("HF_HOME", "/hf", "/hf/hub"),
            ("HF_HUB_CACHE", "/cache", "/cache"),
        ] {
            variables.push((name, value));
            assert_eq!(cache(&variables).as_deref(), Some(want));
        }
    }

    #[test]
    fn a_token_comes_from_its_variable_or_the_file_that_a_login_leaves() -> anyhow::Result<()> {
        let home = tempfile::tempdir()?;
        std::fs::write(home.path().join("token"), "hf_file\n")?;
        let home = home.path().to_string_lossy();
        assert_eq!(config(&[("HF_HOME", &home)]).token.as_deref(), Some("hf_file"));
        let both = config(&[("HF_HOME", &home), ("HF_TOKEN", " hf_variable ")]);
        assert_eq!(both.token.as_deref(), Some("hf_variable"));
        assert_eq!(config(&[("HF_HOME", "/nowhere")]).token, None);
        Ok(())
    }

    #[test]
    fn the_endpoint_and_offline_are_read() {
        let default = config(&[("HF_HUB_OFFLINE", "0")]);
        assert_eq!((default.endpoint.as_str(), default.offline), (ENDPOINT, false));
        let mirror = config(&[("HF_ENDPOINT", "http://mirror:80/"), ("HF_HUB_OFFLINE", "yes")]);
        assert_eq!((mirror.endpoint.as_str(), mirror.offline), ("http://mirror:80", true));
    }
}
