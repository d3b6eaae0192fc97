//! One file into the cache, however often the connection or the process is lost.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use ureq::http::{Response, StatusCode, header};
use ureq::{Body, BodyReader};

use super::HubError;
use super::cache::{CachedRepo, create_parent};
use super::client::{Client, FileInfo, Repo};
use crate::OpenProgress;

/// Times that a connection may be lost one after the other without a byte between them.
const ATTEMPTS: u32 = 5;
const CHUNK_BYTES: usize = 1 << 18;

/// A file that is to become a blob.
pub(super) struct Download<'a> {
    pub client: &'a Client,
    pub repo: Repo<'a>,
    pub file: &'a str,
    pub info: FileInfo,
}

/// Why the content ended early.
enum Lost {
    /// The connection: worth another attempt.
    Connection(String),
    /// Anything else.
    For(HubError),
}

impl Download<'_> {
    /// Fetches what is missing of the blob. What came is kept as `<etag>.incomplete`, and the next run goes on there.
    pub fn run(&self, cached: &CachedRepo, progress: &mut dyn OpenProgress) -> Result<(), HubError> {
        let blob = cached.blob(&self.info.etag);
        let is_here = || blob.metadata().is_ok_and(|m| m.len() == self.info.bytes);
        if is_here() {
            return Ok(());
        }
        create_parent(&blob)?;
        let _lock = cached.lock(&self.info.etag)?;
        // Another process may have fetched it meanwhile.
        if is_here() {
            return Ok(());
        }
        let partial = PathBuf::from(format!("{}.incomplete", blob.display()));
        self.fill(&partial, progress)?;
        self.verify(&partial)?;
        fs::rename(&partial, &blob).map_err(|err| HubError::io(&blob, err))
    }

    fn fill(&self, partial: &Path, progress: &mut dyn OpenProgress) -> Result<(), HubError> {
        let total = self.info.bytes;
        let open = File::options().create(true).append(true).open(partial);
        let mut file = open.map_err(|err| HubError::io(partial, err))?;
        let length = |file: &File| file.metadata().map_or(0, |m| m.len());
        let mut lost = 0;
        loop {
            let here = length(&file);
            progress.downloaded(self.file, here, total);
            if here == total {
                return file.sync_all().map_err(|err| HubError::io(partial, err));
            }
            let reason = match self.fetch_from(here, &mut file, partial, progress) {
                Ok(()) => "the server closed the connection".to_owned(),
                Err(Lost::Connection(reason)) => reason,
                Err(Lost::For(err)) => return Err(err),
            };
            let got_bytes = length(&file);
            if got_bytes == total {
                continue;
            }
            lost = if got_bytes > here { 1 } else { lost + 1 };
            if lost >= ATTEMPTS {
                let file = self.file.to_owned();
                return Err(HubError::Interrupted {
                    file,
                    got_bytes,
                    total_bytes: total,
                    reason,
                });
            }
            tracing::debug!(
                "{}: connection lost at {got_bytes} of {total} bytes ({reason})",
                self.file
            );
            std::thread::sleep(super::pause(lost));
        }
    }

    /// Appends what one connection brings of the bytes from `from` on.
    fn fetch_from(
        &self,
        from: u64,
        file: &mut File,
        partial: &Path,
        progress: &mut dyn OpenProgress,
    ) -> Result<(), Lost> {
        let response = match self.client.content(self.repo, self.file, from) {
            // It was there for the question what the file is: a network that comes and goes.
            Err(HubError::Unreachable { reason, .. }) => return Err(Lost::Connection(reason)),
            other => other.map_err(Lost::For)?,
        };
        let start = match continues_at(&response, from) {
            true => from,
            // The server sends all of it, or there is more here than the file has: from the beginning.
            false => {
                let cut = if from > 0 { file.set_len(0) } else { Ok(()) };
                cut.map_err(|err| Lost::For(HubError::io(partial, err)))?;
                0
            }
        };
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(());
        }
        let mut body = response.into_body().into_reader();
        let mut done = start;
        let mut buffer = vec![0; CHUNK_BYTES];
        while done < self.info.bytes {
            let read = read_some(&mut body, &mut buffer).map_err(|err| Lost::Connection(err.to_string()))?;
            if read == 0 {
                break;
            }
            // Not a byte more than the file has, whatever the server sends.
            let wanted = read.min(usize::try_from(self.info.bytes - done).unwrap_or(usize::MAX));
            let written = file.write_all(&buffer[..wanted]);
            written.map_err(|err| Lost::For(HubError::io(partial, err)))?;
            done += wanted as u64;
            progress.downloaded(self.file, done, self.info.bytes);
        }
        Ok(())
    }

    /// The hub's name for a large file is its SHA-256; a file put together over several runs is held against it.
    fn verify(&self, partial: &Path) -> Result<(), HubError> {
        if self.info.etag.len() != 64 {
            return Ok(());
        }
        let mut hash = Sha256::new();
        let read = File::open(partial).and_then(|mut file| io::copy(&mut file, &mut HashWriter(&mut hash)));
        read.map_err(|err| HubError::io(partial, err))?;
        let got: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if got.eq_ignore_ascii_case(&self.info.etag) {
            return Ok(());
        }
        fs::remove_file(partial).map_err(|err| HubError::io(partial, err))?;
        Err(HubError::Damaged {
            file: self.file.to_owned(),
        })
    }
}

struct HashWriter<'a>(&'a mut Sha256);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn read_some(body: &mut BodyReader, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match body.read(buffer) {
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Whether the answer is the rest that was asked for: a server or a proxy without ranges sends all.
fn continues_at(response: &Response<Body>, from: u64) -> bool {
    let range = response.headers().get(header::CONTENT_RANGE);
    let range = range.and_then(|value| value.to_str().ok()).unwrap_or_default();
    response.status() == StatusCode::PARTIAL_CONTENT && range.starts_with(&format!("bytes {from}-"))
}
