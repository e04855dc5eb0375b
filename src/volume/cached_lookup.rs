//! Looks that wait for no disk: only for what the kernel has in memory.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

/// What such a look finds.
#[derive(Debug)]
pub(super) enum Glance {
    /// The file itself, links not followed; opened to be looked at only.
    There(OwnedFd),
    /// It is known that there is none.
    Absent,
    /// A disk would have to be asked, or the kernel is older than Linux 5.12, or the
    /// file system does not remember what it does not have (tmpfs).
    Unknown,
}

/// A mount made elsewhere on the host meanwhile lets such a look fail.
const ATTEMPTS: usize = 3;

/// Looks for `path`, relative to `directory` (openat2(2), `RESOLVE_CACHED`).
pub(super) fn glance(directory: impl AsFd, path: &str) -> Glance {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    for _ in 0..ATTEMPTS {
        match openat2(&directory, path, flags, Mode::empty(), ResolveFlags::CACHED) {
            Ok(file) => return Glance::There(file),
            Err(Errno::NOENT) => return Glance::Absent,
            Err(Errno::AGAIN) => {}
            Err(_) => break,
        }
    }
    Glance::Unknown
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_in_memory_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let top = fs::File::open(dir.path()).unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        fs::metadata(dir.path().join("none")).unwrap_err();
        assert!(matches!(glance(&top, "file"), Glance::There(_)));
        assert!(!matches!(glance(&top, "none"), Glance::There(_)));
        std::os::unix::fs::symlink("none", dir.path().join("link")).unwrap();
        assert!(matches!(glance(&top, "link"), Glance::There(_)));
        // No file system can know what nobody has looked for yet.
        assert!(!matches!(glance(&top, "never"), Glance::There(_)));
    }
}
