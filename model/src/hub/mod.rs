//! Models from the Hugging Face hub, fetched once into the cache that all its tools share.
//!
//! Of the crate `hf-hub`, version 1.0 cannot go on with a file that was cut short, and 0.5 neither checks what it
//! appended nor knows offline use; both would bring a second HTTP client. Hence our own, on the one that is here.

mod cache;
mod client;
mod config;
mod download;
mod error;

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::OpenProgress;
use cache::CachedRepo;
use client::{Client, Listing, Repo};
pub use config::HubConfig;
use download::Download;
pub use error::HubError;

/// The revision that is meant where none is named.
const MAIN: &str = "main";

/// Everything small that is read of a model folder. What else a repository holds, weights for other frameworks mostly,
/// is left there.
const SMALL_FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
];

/// Weights in one file, the better format first; the name of the index of shards follows from it.
const WEIGHTS: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];

/// A model's name on the hub, `org/name`, and what follows it behind an `@`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    id: String,
    revision: String,
}

impl HubId {
    /// Reads `org/name` or `org/name@revision`; `None` where it can be neither.
    pub fn parse(spec: &str) -> Option<Self> {
        let (id, revision) = spec.split_once('@').unwrap_or((spec, MAIN));
        let (org, name) = id.split_once('/')?;
        let is_part = |part: &str, others: &str| {
            let fits = |c: char| c.is_ascii_alphanumeric() || others.contains(c);
            !part.is_empty() && part.chars().all(fits) && !part.starts_with(['.', '-', '/']) && !part.contains("..")
        };
        let is_id = is_part(org, "-_.") && is_part(name, "-_.") && is_part(revision, "-_./");
        is_id.then(|| Self {
            id: id.to_owned(),
            revision: revision.to_owned(),
        })
    }
}

/// The hub and its cache.
pub struct Hub {
    config: HubConfig,
}

impl Hub {
    /// As the config says.
    pub fn new(config: HubConfig) -> Self {
        Self { config }
    }

    /// The folder of the model in the cache; what is not there of it is fetched first.
    ///
    /// The hub is asked which commit a branch is at; if it cannot be reached, what is cached will do.
    ///
    /// # Errors
    /// No such model, no access, no network, no space: see [`HubError`].
    pub fn fetch(&self, model: &HubId, progress: &mut dyn OpenProgress) -> Result<PathBuf, HubError> {
        let cache = self.config.cache.clone().ok_or(HubError::NoCache)?;
        let cached = CachedRepo::new(&cache, &model.id);
        let whole = cached.whole_snapshot(&model.revision);
        if self.config.offline {
            let id = model.id.clone();
            return whole.ok_or(HubError::Offline { id, cache });
        }
        if let Some(folder) = whole.as_ref().filter(|_| is_commit(&model.revision)) {
            return Ok(folder.clone());
        }
        let client = Client::new(&self.config);
        let repo = Repo {
            id: &model.id,
            revision: &model.revision,
        };
        match (client.listing(repo), whole) {
            (Ok(listing), _) => Fetch {
                client: &client,
                cached: &cached,
                repo,
                listing,
            }
            .run(progress),
            (Err(err @ (HubError::Unreachable { .. } | HubError::Status { .. })), Some(folder)) => {
                tracing::warn!("{err}; going on with what is cached");
                Ok(folder)
            }
            (Err(err), _) => Err(err),
        }
    }
}

/// The fetching of one revision.
struct Fetch<'a> {
    client: &'a Client,
    cached: &'a CachedRepo,
    repo: Repo<'a>,
    listing: Listing,
}

impl Fetch<'_> {
    fn run(&self, progress: &mut dyn OpenProgress) -> Result<PathBuf, HubError> {
        let weights = self.weights()?;
        for file in SMALL_FILES.into_iter().filter(|file| self.listing.has(file)) {
            self.file(file, progress)?;
        }
        // The weights last: a snapshot that has them has everything.
        for file in self.shards(&weights, progress)? {
            self.file(&file, progress)?;
        }
        // Now, so that a branch that moved on is still at its old commit if this is cut short.
        self.cached.set_reference(self.repo.revision, &self.listing.sha)?;
        Ok(self.cached.snapshot(&self.listing.sha))
    }

    /// The file of weights or the index of its shards.
    fn weights(&self) -> Result<String, HubError> {
        let missing = |missing| HubError::NoCheckpoint {
            id: self.repo.id.to_owned(),
            missing,
        };
        if !self.listing.has("config.json") {
            return Err(missing("config.json"));
        }
        let forms = WEIGHTS.iter().flat_map(|name| [(*name).to_owned(), index_of(name)]);
        let found = forms.into_iter().find(|name| self.listing.has(name));
        found.ok_or_else(|| missing("model.safetensors, pytorch_model.bin or an index of either"))
    }

    /// The files that hold the tensors, each once.
    fn shards(&self, weights: &str, progress: &mut dyn OpenProgress) -> Result<Vec<String>, HubError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: std::collections::BTreeMap<String, String>,
        }
        if WEIGHTS.contains(&weights) {
            return Ok(vec![weights.to_owned()]);
        }
        self.file(weights, progress)?;
        let path = self.cached.snapshot(&self.listing.sha).join(weights);
        let text = std::fs::read_to_string(&path).map_err(|err| HubError::io(&path, err))?;
        let bad = |reason: String| HubError::BadAnswer {
            url: self.client.address(self.repo, weights),
            reason,
        };
        let index: Index = serde_json::from_str(&text).map_err(|err| bad(err.to_string()))?;
        let shards: std::collections::BTreeSet<String> = index.weight_map.into_values().collect();
        match shards
            .iter()
            .find(|shard| !self.listing.has(shard) || shard.contains(['/', '\\']))
        {
            Some(shard) => Err(bad(format!("it names a shard that the model does not have: {shard}"))),
            None => Ok(shards.into_iter().collect()),
        }
    }

    /// Makes `file` part of the snapshot.
    fn file(&self, file: &str, progress: &mut dyn OpenProgress) -> Result<(), HubError> {
        let commit = self.listing.sha.as_str();
        if self.cached.snapshot(commit).join(file).is_file() {
            return Ok(());
        }
        // By the commit: a branch may move on between two files.
        let repo = Repo {
            id: self.repo.id,
            revision: commit,
        };
        let info = self.client.info(repo, file)?;
        let download = Download {
            client: self.client,
            repo,
            file,
            info,
        };
        download.run(self.cached, progress)?;
        self.cached.link(commit, file, &download.info.etag)
    }
}

fn index_of(weights: &str) -> String {
    format!("{weights}.index.json")
}

/// A full commit hash never comes to mean something else.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The wait before attempt `n + 1`.
fn pause(n: u32) -> Duration {
    Duration::from_millis(250 << n.min(6))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_an_organisation_and_a_name() {
        let id = |spec: &str| HubId::parse(spec).map(|id| (id.id, id.revision));
        let some = |id: &str, revision: &str| Some((id.to_owned(), revision.to_owned()));
        assert_eq!(id("lmsys/vicuna-7b-v1.5"), some("lmsys/vicuna-7b-v1.5", "main"));
        assert_eq!(id("org/name@refs/pr/1"), some("org/name", "refs/pr/1"));
        for wrong in [
            "name", "./folder", "../a", "/a/b", "a/b/c", "a/..", "a/b@", "a/b@../x", "~/m", "a b/c", "a/b@/x",
        ] {
            assert_eq!(id(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn only_a_full_hash_needs_no_question() {
        assert!(is_commit(&"a1".repeat(20)));
        assert!(!is_commit("main") && !is_commit("a1b2c3") && !is_commit(&"g1".repeat(20)));
    }
}
