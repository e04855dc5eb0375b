//! Space set aside beside the database, given back when its disk is full: a
//! removal writes a few pages to the log before it frees anything.

use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FallocateFlags, Mode, OFlags, fallocate, openat, unlink};
use rustix::io::Errno;

/// Enough for dozens of removals, of which one is to free more.
const BYTES: u64 = 1 << 20;

/// The file that holds the space.
pub(super) struct Ballast {
    path: PathBuf,
}

impl Ballast {
    /// That of the database at `path`.
    pub(super) fn of(path: &Path) -> Ballast {
        let mut name = path.as_os_str().to_owned();
        name.push(".ballast");
        Ballast { path: name.into() }
    }

    /// Takes the space, unless it is taken or not there to be had.
    pub(super) fn fill(&self) {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let file = match openat(CWD, &self.path, flags, Mode::from_raw_mode(0o600)) {
            Ok(file) => file,
            Err(Errno::EXIST) => return,
            Err(errno) => return log::debug!("create {}: {errno}", self.path.display()),
        };
        if let Err(errno) = fallocate(&file, FallocateFlags::empty(), 0, BYTES) {
            log::debug!("set space aside in {}: {errno}", self.path.display());
            self.release();
        }
    }

    /// Gives the space back. `false` if none was set aside.
    pub(super) fn release(&self) -> bool {
        match unlink(&self.path) {
            Ok(()) => true,
            Err(Errno::NOENT) => false,
            Err(errno) => {
                log::debug!("remove {}: {errno}", self.path.display());
                false
            }
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
        let metadata = fs::metadata(dir.path().join("metadata.db.ballast")).unwrap();
        assert!(metadata.blocks() * 512 >= BYTES, "{}", metadata.blocks());
        assert!(ballast.release());
        assert!(!ballast.release());
    }
}
