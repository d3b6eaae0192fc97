//! The cache folder, laid out as `huggingface_hub` does, so that both share what was fetched:
//! `models--org--name/{blobs/<etag>, refs/<revision>, snapshots/<commit>/<file> -> ../../blobs/<etag>}`.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::HubError;
use crate::weights;

/// One model's folder in the cache.
pub(super) struct CachedRepo {
    folder: PathBuf,
    /// Beside all models, where the others look for them.
    locks: PathBuf,
}

impl CachedRepo {
    pub fn new(cache: &Path, id: &str) -> Self {
        let name = format!("models--{}", id.replace('/', "--"));
        Self {
            folder: cache.join(&name),
            locks: cache.join(".locks").join(name),
        }
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// The snapshot that `revision` was at last, or that it is itself, if it is whole. The default revision is also
    /// satisfied by any other whole snapshot.
    pub fn whole_snapshot(&self, revision: &str) -> Option<PathBuf> {
        let commit = fs::read_to_string(self.reference(revision)).ok();
        let named = [commit.as_deref().map(str::trim), Some(revision)];
        let named = named.into_iter().flatten().map(|commit| self.snapshot(commit));
        named.into_iter().find(|folder| is_whole(folder)).or_else(|| {
            let snapshots = fs::read_dir(self.folder.join("snapshots")).ok()?;
            // In the order of their names, so that the same is taken every time.
            let whole = snapshots.filter_map(|e| Some(e.ok()?.path())).filter(|p| is_whole(p));
            whole.max().filter(|_| revision == super::MAIN)
        })
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.folder.join("refs").join(revision)
    }

    /// Notes the commit that `revision` is at.
    pub fn set_reference(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        let path = self.reference(revision);
        if revision == commit || fs::read_to_string(&path).is_ok_and(|known| known == commit) {
            return Ok(());
        }
        create_parent(&path)?;
        let beside = path.with_extension("lengthwise");
        fs::write(&beside, commit).map_err(|err| HubError::io(&beside, err))?;
        fs::rename(&beside, &path).map_err(|err| HubError::io(&path, err))
    }

    /// Makes `file` of the snapshot `commit` stand for a blob.
    pub fn link(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let pointer = self.snapshot(commit).join(file);
        create_parent(&pointer)?;
        let target = Path::new("../../blobs").join(etag);
        // A link to a blob that is no more.
        let _ = fs::remove_file(&pointer);
        match symlink(&target, &pointer) {
            Err(err) if err.kind() != io::ErrorKind::AlreadyExists => {
                let blob = self.blob(etag);
                fs::copy(&blob, &pointer).map_err(|err| HubError::io(&pointer, err))?;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Waits until no other process writes the blob; it is free again when the file is dropped, or the process killed.
    /// `huggingface_hub` takes the same lock.
    pub fn lock(&self, etag: &str) -> Result<File, HubError> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        let open = File::options().create(true).append(true).open(&path);
        let file = open.map_err(|err| HubError::io(&path, err))?;
        if file.try_lock().is_err() {
            tracing::info!("waiting for another process that fetches the same file");
            // Some network file systems have no locks: then nothing can be waited for.
            let _ = file.lock();
        }
        Ok(file)
    }
}

#[cfg(unix)]
fn symlink(target: &Path, pointer: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, pointer)
}

#[cfg(not(unix))]
fn symlink(_target: &Path, _pointer: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

pub(super) fn create_parent(path: &Path) -> Result<(), HubError> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(|err| HubError::io(parent, err)),
        None => Ok(()),
    }
}

/// Whether all that a model needs is there: the weights are fetched last.
fn is_whole(folder: &Path) -> bool {
    folder.join("config.json").is_file() && weights::are_in(folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_snapshot_that_a_revision_names_is_taken_if_it_is_whole() -> anyhow::Result<()> {
        let cache = tempfile::tempdir()?;
        let repo = CachedRepo::new(cache.path(), "org/name");
        for commit in ["aa", "bb"] {
            fs::create_dir_all(repo.snapshot(commit))?;
            for file in ["config.json", "model.safetensors"] {
                fs::write(repo.snapshot(commit).join(file), "{}")?;
            }
        }
        let main = || repo.whole_snapshot("main");
        assert_eq!(main(), Some(repo.snapshot("bb")), "no refs: the last");
        repo.set_reference("main", "aa")?;
        assert_eq!(main(), Some(repo.snapshot("aa")));
        assert_eq!(repo.whole_snapshot("bb"), Some(repo.snapshot("bb")));
        assert_eq!(repo.whole_snapshot("v2"), None, "another revision is no substitute");
        fs::remove_file(repo.snapshot("aa").join("model.safetensors"))?;
        assert_eq!(main(), Some(repo.snapshot("bb")), "a download that was cut short");
        assert_eq!(CachedRepo::new(cache.path(), "org/other").whole_snapshot("main"), None);
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn a_file_of_a_snapshot_is_a_relative_link_to_its_blob() -> anyhow::Result<()> {
        let cache = tempfile::tempdir()?;
        let repo = CachedRepo::new(cache.path(), "org/name");
        create_parent(&repo.blob("e1"))?;
        fs::write(repo.blob("e1"), "text")?;
        for _ in 0..2 {
            repo.link("aa", "config.json", "e1")?;
        }
        let pointer = repo.snapshot("aa").join("config.json");
        assert_eq!(fs::read_link(&pointer)?, Path::new("../../blobs/e1"));
        assert_eq!(fs::read_to_string(pointer)?, "text");
        Ok(())
    }
}
