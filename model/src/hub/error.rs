//! Why a model could not be fetched.

use std::io;
use std::path::{Path, PathBuf};

/// Every cause says what to do.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // The messages say what the fields are.
pub enum HubError {
    /// The hub has no such model, or does not show it to everybody.
    #[error(
        "there is no folder {id}, and {endpoint} has no model of that name or it is private: check the name; for a private model set HF_TOKEN"
    )]
    NoSuchModel { id: String, endpoint: String },
    /// The model is there, the revision is not.
    #[error("model {id} has no revision \"{revision}\": check the part after the @")]
    NoSuchRevision { id: String, revision: String },
    /// The model's owner decides who may have it.
    #[error(
        "model {id} is gated: ask for access at {endpoint}/{id}, then set HF_TOKEN to a token of that account ({with})"
    )]
    Gated {
        id: String,
        endpoint: String,
        with: &'static str,
    },
    /// The hub does not know the token.
    #[error("{endpoint} refused the token: check HF_TOKEN and the token file in HF_HOME")]
    BadToken { endpoint: String },
    /// Nothing may be fetched, and the cache lacks it.
    #[error(
        "model {id} is not, or not completely, in the cache {} and HF_HUB_OFFLINE is set: unset it once to fetch the model",
        cache.display()
    )]
    Offline { id: String, cache: PathBuf },
    /// No answer.
    #[error(
        "{endpoint} cannot be reached ({reason}): check the network, the proxy and HF_ENDPOINT, then run the same command again"
    )]
    Unreachable { endpoint: String, reason: String },
    /// An answer that is neither the file nor one of the causes above.
    #[error("{url} answered with status {status}: try again later")]
    Status { url: String, status: u16 },
    /// The server does not speak as the hub does.
    #[error("{url}: {reason}; is HF_ENDPOINT a hub?")]
    BadAnswer { url: String, reason: String },
    /// The repository is no model that can be run.
    #[error("model {id} has no {missing}: it is no checkpoint in Hugging Face's layout")]
    NoCheckpoint { id: String, missing: &'static str },
    /// The connection was lost again and again.
    #[error(
        "{file}: the download stopped at {got_bytes} of {total_bytes} bytes ({reason}); what is here is kept, run the same command again to go on"
    )]
    Interrupted {
        file: String,
        got_bytes: u64,
        total_bytes: u64,
        reason: String,
    },
    /// No space left.
    #[error(
        "{}: no space is left on the disk; make room or set HF_HUB_CACHE to a folder on a larger one, then run the same command again",
        path.display()
    )]
    DiskFull { path: PathBuf },
    /// What came is not what the hub says the file is.
    #[error(
        "{file} came damaged (its SHA-256 is another than the hub states) and was removed: run the same command again"
    )]
    Damaged { file: String },
    /// There is no home folder and no variable that names the cache.
    #[error("there is no place for the cache: set HF_HUB_CACHE to a folder")]
    NoCache,
    /// A file of the cache cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl HubError {
    /// What the system said of a file of the cache.
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Io { path, source },
        }
    }
}
