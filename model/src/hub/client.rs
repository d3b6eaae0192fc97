//! The hub's HTTP interface.

use std::time::Duration;

use serde::Deserialize;
use ureq::config::RedirectAuthHeaders;
use ureq::http::{Response, StatusCode, header};
use ureq::{Agent, Body};

use super::HubError;
use super::config::HubConfig;

/// Longest silence of the server before a connection counts as lost.
const SILENCE: Duration = Duration::from_secs(60);
const CONNECT: Duration = Duration::from_secs(15);
/// Attempts at what a busy server turns down.
const ATTEMPTS: u32 = 4;
/// Addresses within the hub that one file's address may lead through, for models that were renamed.
const RENAMED: usize = 5;

/// A model at one revision.
#[derive(Debug, Clone, Copy)]
pub(super) struct Repo<'a> {
    pub id: &'a str,
    pub revision: &'a str,
}

/// What a revision is made of.
#[derive(Debug, Deserialize)]
pub(super) struct Listing {
    /// The commit.
    pub sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
}

impl Listing {
    pub fn has(&self, file: &str) -> bool {
        self.siblings.iter().any(|s| s.rfilename == file)
    }
}

/// What identifies a file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FileInfo {
    /// The SHA-256 of large files, git's own of small ones.
    pub etag: String,
    pub bytes: u64,
}

pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

impl Client {
    pub fn new(config: &HubConfig) -> Self {
        let agent = Agent::config_builder()
            // The headers of an error say its cause.
            .http_status_as_error(false)
            // The token is the hub's; the store that it leads to has its own signature in the address.
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(CONNECT))
            .timeout_recv_response(Some(SILENCE))
            .timeout_per_read(Some(SILENCE))
            .user_agent(concat!("lengthwise/", env!("CARGO_PKG_VERSION")))
            // Sizes and ranges are those of the file, not of a packed form of it.
            .accept_encoding("identity")
            .build();
        Self {
            agent: agent.new_agent(),
            endpoint: config.endpoint.clone(),
            token: config.token.clone(),
        }
    }

    /// The commit that the revision is at, and its files.
    pub fn listing(&self, repo: Repo) -> Result<Listing, HubError> {
        let url = format!(
            "{}/api/models/{}/revision/{}",
            self.endpoint,
            repo.id,
            encoded(repo.revision)
        );
        let mut response = self.answer(repo, &url, || self.get(&url, None))?;
        let bad = |reason: String| HubError::BadAnswer {
            url: url.clone(),
            reason,
        };
        let listing: Listing = response.body_mut().read_json().map_err(|err| bad(err.to_string()))?;
        // It becomes the name of a folder.
        match is_name(&listing.sha) {
            true => Ok(listing),
            false => Err(bad("the commit is no hash".to_owned())),
        }
    }

    /// What a file is, asked of the hub itself: the store that it may lead to knows neither its hash nor the commit.
    pub fn info(&self, repo: Repo, file: &str) -> Result<FileInfo, HubError> {
        let mut url = self.address(repo, file);
        for _ in 0..RENAMED {
            let response = self.answer(repo, &url, || self.head(&url))?;
            let location = text(&response, header::LOCATION.as_str());
            match location.filter(|l| response.status().is_redirection() && l.starts_with('/') && !l.starts_with("//"))
            {
                Some(path) => url = format!("{}{path}", self.host()),
                None => return file_info(&response).map_err(|reason| HubError::BadAnswer { url, reason }),
            }
        }
        let reason = "it leads from one address to the next".to_owned();
        Err(HubError::BadAnswer { url, reason })
    }

    /// The file's content from byte `from` on, where the server can do that: look at the status.
    pub fn content(&self, repo: Repo, file: &str, from: u64) -> Result<Response<Body>, HubError> {
        let url = self.address(repo, file);
        self.answer(repo, &url, || self.get(&url, (from > 0).then_some(from)))
    }

    pub fn address(&self, repo: Repo, file: &str) -> String {
        format!(
            "{}/{}/resolve/{}/{file}",
            self.endpoint,
            repo.id,
            encoded(repo.revision)
        )
    }

    /// The endpoint without a path.
    fn host(&self) -> &str {
        let start = self.endpoint.find("://").map_or(0, |at| at + 3);
        let end = self.endpoint[start..]
            .find('/')
            .map_or(self.endpoint.len(), |at| start + at);
        &self.endpoint[..end]
    }

    fn get(&self, url: &str, from: Option<u64>) -> Result<Response<Body>, ureq::Error> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some(from) = from {
            request = request.header(header::RANGE, format!("bytes={from}-"));
        }
        request.call()
    }

    /// The first answer, redirection or not.
    fn head(&self, url: &str) -> Result<Response<Body>, ureq::Error> {
        let mut request = self.agent.head(url).config();
        request = request.max_redirects(0).max_redirects_will_error(false);
        let mut request = request.build();
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        request.call()
    }

    /// Sends until the server is neither silent nor too busy, and turns what it refuses into its cause.
    fn answer(
        &self,
        repo: Repo,
        url: &str,
        send: impl Fn() -> Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, HubError> {
        let mut attempt = 1;
        loop {
            let sent = send();
            let may_pass = match &sent {
                Ok(response) => {
                    response.status() == StatusCode::TOO_MANY_REQUESTS || response.status().is_server_error()
                }
                Err(ureq::Error::Timeout(_)) => true,
                Err(_) => false,
            };
            if may_pass && attempt < ATTEMPTS {
                std::thread::sleep(super::pause(attempt));
                attempt += 1;
                continue;
            }
            let response = sent.map_err(|err| self.not_sent(url, &err))?;
            return match response.status() {
                status
                    if status.is_success()
                        || status.is_redirection()
                        || status == StatusCode::RANGE_NOT_SATISFIABLE =>
                {
                    Ok(response)
                }
                _ => Err(self.refused(repo, url, &response)),
            };
        }
    }

    fn not_sent(&self, url: &str, err: &ureq::Error) -> HubError {
        match err {
            ureq::Error::Http(_) | ureq::Error::BadUri(_) | ureq::Error::Protocol(_) => HubError::BadAnswer {
                url: url.to_owned(),
                reason: err.to_string(),
            },
            ureq::Error::HostNotFound => self.unreachable("there is no such host"),
            ureq::Error::Io(err) => self.unreachable(&err.to_string()),
            err => self.unreachable(&err.to_string()),
        }
    }

    fn unreachable(&self, reason: &str) -> HubError {
        HubError::Unreachable {
            endpoint: self.endpoint.clone(),
            reason: reason.to_owned(),
        }
    }

    /// The cause as the hub's headers tell it; where a proxy has eaten them, as the status does.
    fn refused(&self, repo: Repo, url: &str, response: &Response<Body>) -> HubError {
        let (id, endpoint) = (repo.id.to_owned(), self.endpoint.clone());
        let says = |name: &str, what: &str| text(response, name).is_some_and(|value| value.contains(what));
        let with = if self.token.is_some() {
            "the present token has no access"
        } else {
            "no token is set now"
        };
        match response.status() {
            _ if says("x-error-code", "RevisionNotFound") => HubError::NoSuchRevision {
                id,
                revision: repo.revision.to_owned(),
            },
            _ if says("x-error-code", "EntryNotFound") => HubError::BadAnswer {
                url: url.to_owned(),
                reason: "the file is in the model's list and not there".to_owned(),
            },
            _ if says("x-error-code", "GatedRepo") => HubError::Gated { id, endpoint, with },
            StatusCode::FORBIDDEN => HubError::Gated { id, endpoint, with },
            StatusCode::UNAUTHORIZED if self.token.is_some() && !says("x-error-code", "RepoNotFound") => {
                HubError::BadToken { endpoint }
            }
            StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND => HubError::NoSuchModel { id, endpoint },
            status => HubError::Status {
                url: url.to_owned(),
                status: status.as_u16(),
            },
        }
    }
}

fn text<'a>(response: &'a Response<Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name)?.to_str().ok()
}

/// Of a file that lies in a store elsewhere, the hub gives hash and size under names of their own.
fn file_info(response: &Response<Body>) -> Result<FileInfo, String> {
    let first = |names: [&str; 2]| names.into_iter().find_map(|name| text(response, name));
    let etag = first(["x-linked-etag", "etag"]).ok_or("the answer has no ETag")?;
    let etag = etag.trim_start_matches("W/").trim_matches('"');
    if !is_name(etag) {
        return Err("the ETag is no hash".to_owned());
    }
    let bytes = first(["x-linked-size", "content-length"]).and_then(|size| size.parse().ok());
    Ok(FileInfo {
        etag: etag.to_owned(),
        bytes: bytes.ok_or("the answer has no size")?,
    })
}

/// Whether a text from outside may become the name of a file.
fn is_name(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// A revision as one part of an address.
fn encoded(revision: &str) -> String {
    let mut encoded = String::new();
    for byte in revision.bytes() {
        match byte {
            b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' | b'-' | b'_' | b'.' | b'~' => encoded.push(char::from(byte)),
            other => encoded.push_str(&format!("%{other:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revision_is_one_part_of_the_address() {
        assert_eq!(encoded("refs/pr/1"), "refs%2Fpr%2F1");
        assert_eq!(encoded("v1.5-a_b"), "v1.5-a_b");
    }

    #[test]
    fn the_host_is_the_endpoint_without_its_path() {
        let client = |endpoint: &str| {
            Client::new(&HubConfig {
                endpoint: endpoint.to_owned(),
                cache: None,
                token: None,
                offline: false,
            })
        };
        assert_eq!(client("https://hub.example").host(), "https://hub.example");
        assert_eq!(client("http://mirror:80/hf").host(), "http://mirror:80");
    }

    #[test]
    fn hash_and_size_are_those_of_the_file_not_of_the_redirection() -> anyhow::Result<()> {
        let response = |headers: &[(&str, &str)]| {
            let builder = headers
                .iter()
                .fold(Response::builder(), |b, (name, value)| b.header(*name, *value));
            builder.body(Body::builder().data(Vec::new()))
        };
        let own = [("etag", "W/\"a1\""), ("content-length", "9")];
        let info = |etag: &str, bytes| {
            Ok(FileInfo {
                etag: etag.to_owned(),
                bytes,
            })
        };
        assert_eq!(file_info(&response(&own)?), info("a1", 9));
        let linked = [own[0], own[1], ("x-linked-etag", "\"b2\""), ("x-linked-size", "77")];
        assert_eq!(file_info(&response(&linked)?), info("b2", 77));
        assert!(file_info(&response(&[("etag", "\"../../x\""), own[1]])?).is_err());
        assert!(file_info(&response(&own[..1])?).is_err());
        Ok(())
    }
}
