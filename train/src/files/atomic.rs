//! Files that nobody ever sees half of.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::{FileError, beside, folder_of, io};

/// Most links that a name is followed through, as on Linux.
const MOST_LINKS: usize = 40;

/// Writes a file beside its name (`.tmp`) and renames it, so that nobody ever sees half of it, not even after a power
/// failure. A symbolic link stays and its target is written; a pipe, a terminal or an open file (`/dev/stdout`) gets the
/// content as it is.
///
/// # Errors
/// The folder cannot be written.
pub fn write_atomic(path: &Path, content: impl AsRef<[u8]>) -> Result<(), FileError> {
    let content = content.as_ref();
    match target(path) {
        Target::Stream => write_through(path, content).map_err(io(path)),
        Target::File(target) => replace(&target, content),
    }
}

/// Whether a name stands for a pipe, a terminal or an open file, which can be written once and not replaced.
pub(super) fn is_stream(path: &Path) -> bool {
    target(path) == Target::Stream
}

/// What a name stands for.
#[derive(Debug, PartialEq)]
enum Target {
    /// A file that is there, or will be.
    File(PathBuf),
    /// Something that a rename would put a file in the place of.
    Stream,
}

/// Follows links. The target of a link in /proc is what a process has open: its name would be another file's once it is
/// replaced.
fn target(path: &Path) -> Target {
    if std::fs::metadata(path).is_ok_and(|there| !there.is_file() && !there.is_dir()) {
        return Target::Stream;
    }
    let mut name = path.to_owned();
    for _ in 0..MOST_LINKS {
        if name.starts_with("/proc") || name.starts_with("/dev/fd") {
            return Target::Stream;
        }
        match std::fs::read_link(&name) {
            Ok(link) => name = folder_of(&name).join(link),
            Err(_) => break,
        }
    }
    Target::File(name)
}

/// At the end of what is there already: `lengthwise … --output /dev/stdout >> file` adds to the file. Standard output itself
/// is not opened a second time, since what is printed later would begin where it stands.
fn write_through(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut to = OpenOptions::new().append(true).open(path)?;
    if is_standard_output(&to) {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(content)?;
        return stdout.flush();
    }
    to.write_all(content)
}

#[cfg(unix)]
fn is_standard_output(file: &File) -> bool {
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;
    let stdout = std::io::stdout().as_fd().try_clone_to_owned().map(File::from);
    let place = |file: &File| file.metadata().map(|there| (there.dev(), there.ino()));
    matches!((stdout.and_then(|out| place(&out)), place(file)), (Ok(a), Ok(b)) if a == b)
}

#[cfg(not(unix))]
fn is_standard_output(_: &File) -> bool {
    false
}

fn replace(path: &Path, content: &[u8]) -> Result<(), FileError> {
    let folder = folder_of(path);
    std::fs::create_dir_all(folder).map_err(io(folder))?;
    let tmp = beside(path, ".tmp");
    let write = || {
        let mut file = File::create(&tmp)?;
        file.write_all(content)?;
        file.sync_all()
    };
    let written = write()
        .map_err(io(&tmp))
        .and_then(|()| std::fs::rename(&tmp, path).map_err(io(path)));
    if written.is_err() {
        // Half a file helps nobody; the first error is the one to tell.
        let _ = std::fs::remove_file(&tmp);
        return written;
    }
    // The new name is on the disk once its folder is. Not every system lets a folder be opened.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("new/out.jsonl");
        write_atomic(&path, "first\n")?;
        write_atomic(&path, "second\n")?;
        assert_eq!(std::fs::read_to_string(&path)?, "second\n");
        assert_eq!(std::fs::read_dir(dir.path().join("new"))?.count(), 1);
        // A folder in the way is an error and stays.
        write_atomic(&dir.path().join("new"), "x").expect_err("a folder");
        assert!(path.exists());
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn a_link_stays_and_its_target_is_written() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let (first, second, file) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("sub/file"));
        std::os::unix::fs::symlink("b", &first)?;
        std::os::unix::fs::symlink("sub/file", &second)?;
        // The first time the target is not there yet.
        for content in ["first\n", "second\n"] {
            write_atomic(&first, content)?;
            assert_eq!(std::fs::read_to_string(&file)?, content);
            assert_eq!(std::fs::read_link(&first)?, Path::new("b"));
            assert_eq!(std::fs::read_link(&second)?, Path::new("sub/file"));
        }
        Ok(())
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_open_file_gets_the_content_behind_what_it_holds() -> anyhow::Result<()> {
        use std::os::fd::AsRawFd;
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("log");
        let mut open = File::create(&path)?;
        open.write_all(b"before\n")?;
        let link = dir.path().join("stdout");
        std::os::unix::fs::symlink(format!("/proc/self/fd/{}", open.as_raw_fd()), &link)?;
        write_atomic(&link, "after\n")?;
        assert_eq!(std::fs::read_to_string(&path)?, "before\nafter\n");
        assert!(std::fs::symlink_metadata(&link)?.is_symlink());
        assert_eq!(std::fs::read_dir(dir.path())?.count(), 2);
        write_atomic(Path::new("/dev/null"), "x")?;
        assert_eq!(target(Path::new("/dev/null")), Target::Stream);
        Ok(())
    }
}
