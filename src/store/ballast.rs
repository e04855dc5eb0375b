//! Ballast files: space reserved beside the database, and released when its disk
//! is full. A removal needs a few pages of the log before it frees anything, and
//! a start needs two new files for the log and its index.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FallocateFlags, Mode, OFlags, fallocate, openat, unlink};
use rustix::io::Errno;

use super::files::{BALLAST, beside};

/// Reserves space beside the closed database at `path`, if the disk has some,
/// because the disk may be full when the database is opened next.
pub fn set_space_aside(path: &Path) {
    Ballast::of(path).fill();
}

/// The size of each ballast file. It is enough to record dozens of removals, and each
/// removal frees more space than it takes.
const BYTES: u64 = 1 << 19;

/// The ballast files of a database.
pub(super) struct Ballast {
    paths: [PathBuf; 2],
}

impl Ballast {
    /// The ballast of the database at `path`.
    pub(super) fn of(path: &Path) -> Ballast {
        Ballast {
            paths: BALLAST.map(|suffix| beside(path, suffix)),
        }
    }

    /// Creates the ballast, unless it exists already or the disk has no room for
    /// it.
    pub(super) fn fill(&self) {
        for path in &self.paths {
            fill(path);
        }
    }

    /// Releases the ballast. Returns `false` if there was none.
    pub(super) fn release(&self) -> bool {
        let released = self.paths.each_ref().map(|path| release(path));
        released.contains(&true)
    }
}

fn fill(path: &Path) {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let filled = openat(CWD, path, flags, Mode::from_raw_mode(0o600))
        .and_then(|file| fallocate(&file, FallocateFlags::empty(), 0, BYTES));
    // On a full disk, the file takes the space that was left. The next call extends it to
    // its full size.
    if let Err(errno) = filled {
        log::debug!(
            "cannot reserve space for removals in {}: {errno}",
            path.display()
        );
    }
}

fn release(path: &Path) -> bool {
    match unlink(path) {
        Ok(()) => true,
        Err(Errno::NOENT) => false,
        Err(errno) => {
            log::debug!("cannot remove the ballast file {}: {errno}", path.display());
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn space_is_taken_once_and_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let ballast = Ballast::of(&dir.path().join("metadata.db"));
        ballast.fill();
        ballast.fill();
        let sizes = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512);
        assert!(sizes.sum::<u64>() >= 2 * BYTES);
        assert!(ballast.release());
        assert!(!ballast.release());
    }
}
