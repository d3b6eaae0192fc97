//! A small Hugging Face hub on loopback: the routes that a client needs, and the faults of a bad network.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// The commit that `main` is at.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// The only model.
pub const ID: &str = "org/name";

/// What the hub has and how it behaves; may be changed while it serves.
#[derive(Debug, Clone, Default)]
pub struct Behaviour {
    /// The model's files.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Asked for of whoever wants anything.
    pub token: Option<String>,
    /// The files are for those with access only, and nobody has it.
    pub gated: bool,
    /// Wait behind every 16 KiB of a large file.
    pub throttle: Duration,
    /// A connection ends after so many bytes of a large file.
    pub cut_after: Option<usize>,
    /// Always send the whole file.
    pub no_ranges: bool,
    /// Send other bytes than the hash promises.
    pub corrupt: bool,
}

/// A request as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// GET or HEAD.
    pub method: String,
    /// With everything behind it.
    pub path: String,
    /// The value of `Range`.
    pub range: Option<String>,
    /// The value of `Authorization`.
    pub authorization: Option<String>,
}

struct State {
    address: SocketAddr,
    behaviour: Mutex<Behaviour>,
    asked: Mutex<Vec<Asked>>,
}

/// The hub; its thread ends with the process.
pub struct FakeHub {
    state: Arc<State>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeHub {
    pub fn start(behaviour: Behaviour) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let state = Arc::new(State {
            address: listener.local_addr()?,
            behaviour: Mutex::new(behaviour),
            asked: Mutex::default(),
        });
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&shared);
                // A client that was killed is no fault of the server.
                std::thread::spawn(move || serve(&state, stream).ok());
            }
        });
        Ok(Self { state })
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.state.address)
    }

    pub fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut lock(&self.state.behaviour));
    }

    /// The requests since the last call.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut lock(&self.state.asked))
    }
}

/// The names under which the hub serves: the store of large files is another host to a client.
const STORE: &str = "localhost";

fn serve(state: &State, mut stream: TcpStream) -> Result<()> {
    let asked = read_request(&stream)?;
    lock(&state.asked).push(asked.clone());
    let behaviour = lock(&state.behaviour).clone();
    let head = asked.method == "HEAD";
    if let Some(hash) = asked.path.strip_prefix("/store/") {
        return store(&behaviour, &asked, hash, &mut stream);
    }
    if let Some(token) = &behaviour.token {
        let code = match &asked.authorization {
            Some(got) if got == &format!("Bearer {token}") => None,
            Some(_) => Some("X-Error-Message: Invalid credentials in Authorization header"),
            None => Some("X-Error-Code: RepoNotFound"),
        };
        if let Some(code) = code {
            return answer(&mut stream, "401 Unauthorized", &[code.to_owned()], b"", head);
        }
    }
    let revision = format!("/api/models/{ID}/revision/");
    let resolve = format!("/{ID}/resolve/{COMMIT}/");
    if let Some(revision) = asked.path.strip_prefix(&revision) {
        return listing(&behaviour, revision, &mut stream);
    }
    match asked
        .path
        .strip_prefix(&resolve)
        .and_then(|name| Some((name, behaviour.files.get(name)?)))
    {
        Some(_) if behaviour.gated => {
            let code = "X-Error-Code: GatedRepo".to_owned();
            answer(&mut stream, "401 Unauthorized", &[code], b"", head)
        }
        Some((name, content)) if is_large(name) => {
            let hash = sha256(content);
            let headers = [
                format!("X-Repo-Commit: {COMMIT}"),
                format!("X-Linked-Etag: \"{hash}\""),
                format!("X-Linked-Size: {}", content.len()),
                format!("Location: http://{STORE}:{}/store/{hash}", state.address.port()),
            ];
            answer(&mut stream, "302 Found", &headers, b"", head)
        }
        Some((_, content)) => {
            let etag = &sha256(content)[..40];
            let headers = [format!("X-Repo-Commit: {COMMIT}"), format!("ETag: \"{etag}\"")];
            answer(&mut stream, "200 OK", &headers, content, head)
        }
        None => answer(
            &mut stream,
            "404 Not Found",
            &["X-Error-Code: RepoNotFound".to_owned()],
            b"",
            head,
        ),
    }
}

fn read_request(stream: &TcpStream) -> Result<Asked> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next().context("no request")??;
    let mut words = first.split(' ').map(str::to_owned);
    let mut asked = Asked {
        method: words.next().context("no method")?,
        path: words.next().context("no path")?,
        range: None,
        authorization: None,
    };
    for line in lines {
        let line = line?;
        match line.split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("range") => asked.range = Some(value.to_owned()),
            Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
                asked.authorization = Some(value.to_owned());
            }
            None if line.is_empty() => break,
            _ => {}
        }
    }
    Ok(asked)
}

fn listing(behaviour: &Behaviour, revision: &str, stream: &mut TcpStream) -> Result<()> {
    if ![COMMIT, "main", "refs%2Fpr%2F1"].contains(&revision) {
        let code = "X-Error-Code: RevisionNotFound".to_owned();
        return answer(stream, "404 Not Found", &[code], b"", false);
    }
    let siblings: Vec<_> = behaviour
        .files
        .keys()
        .map(|name| serde_json::json!({"rfilename": name}))
        .collect();
    let body = serde_json::json!({"id": ID, "sha": COMMIT, "siblings": siblings}).to_string();
    answer(
        stream,
        "200 OK",
        &["Content-Type: application/json".to_owned()],
        body.as_bytes(),
        false,
    )
}

/// The store: other credentials than its own make it refuse, as the real one does.
fn store(behaviour: &Behaviour, asked: &Asked, hash: &str, stream: &mut TcpStream) -> Result<()> {
    if asked.authorization.is_some() {
        return answer(stream, "400 Bad Request", &[], b"", false);
    }
    let content = behaviour.files.values().find(|content| sha256(content) == hash);
    let mut content = content.context("no such blob")?.clone();
    if behaviour.corrupt {
        content[0] ^= 1;
    }
    let total = content.len();
    let from = asked.range.as_ref().filter(|_| !behaviour.no_ranges);
    let from = from.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    let mut head = match from {
        Some(from) => format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{}/{total}\r\n",
            total - 1
        ),
        None => "HTTP/1.1 200 OK\r\n".to_owned(),
    };
    let rest = &content[from.unwrap_or(0)..];
    head += &format!("Content-Length: {}\r\nConnection: close\r\n\r\n", rest.len());
    stream.write_all(head.as_bytes())?;
    let sent = behaviour.cut_after.map_or(rest.len(), |cut| cut.min(rest.len()));
    for chunk in rest[..sent].chunks(16 << 10) {
        stream.write_all(chunk)?;
        std::thread::sleep(behaviour.throttle);
    }
    Ok(())
}

fn answer(stream: &mut TcpStream, status: &str, headers: &[String], body: &[u8], head: bool) -> Result<()> {
    let mut text = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n",
        body.len()
    );
    for header in headers {
        text += header;
        text += "\r\n";
    }
    stream.write_all((text + "\r\n").as_bytes())?;
    if !head {
        stream.write_all(body)?;
    }
    Ok(())
}

/// Whether the hub keeps a file in its store.
fn is_large(name: &str) -> bool {
    name.ends_with(".safetensors") || name.ends_with(".bin")
}

pub fn sha256(content: &[u8]) -> String {
    Sha256::digest(content)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
