//! Looking up paths in the kernel's memory only, without waiting for a disk.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use rustix::path::Arg;

/// The result of a lookup in the kernel's memory.
#[derive(Debug)]
pub enum Glance {
    /// The path exists. This is its file, opened with O_PATH; links are not followed.
    There(OwnedFd),
    /// The kernel knows that the path does not exist.
    Absent,
    /// The lookup would need a disk, or the kernel is older than Linux 5.12, or the file
    /// system does not remember names that do not exist (tmpfs).
    Unknown,
}

/// How often the lookup is tried. It fails if a mount is made anywhere on the host at the
/// same time.
const ATTEMPTS: usize = 3;

/// Looks for `path`, relative to `directory`, without waiting for a disk (openat2(2),
/// `RESOLVE_CACHED`).
pub fn glance(directory: impl AsFd, path: &str) -> Glance {
    match open_cached(directory, path, OFlags::NOFOLLOW, ResolveFlags::empty()) {
        Ok(file) => Glance::There(file),
        Err(Errno::NOENT) => Glance::Absent,
        Err(_) => Glance::Unknown,
    }
}

/// Opens `path` with O_PATH, relative to `directory`, without waiting for a disk.
///
/// # Errors
///
/// `EAGAIN` if the lookup would need a disk; `ENOSYS` or `EINVAL` if the kernel is older than
/// Linux 5.12.
pub fn open_cached(
    directory: impl AsFd,
    path: impl Arg + Copy,
    flags: OFlags,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    let resolve = resolve | ResolveFlags::CACHED;
    let open = || openat2(&directory, path, flags, Mode::empty(), resolve);
    let mut opened = open();
    for _ in 1..ATTEMPTS {
        if !matches!(opened, Err(Errno::AGAIN)) {
            break;
        }
        opened = open();
    }
    opened
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_in_memory_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let top = fs::File::open(dir.path()).unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        fs::metadata(dir.path().join("none")).unwrap_err();
        assert!(matches!(glance(&top, "file"), Glance::There(_)));
        assert!(!matches!(glance(&top, "none"), Glance::There(_)));
        std::os::unix::fs::symlink("none", dir.path().join("link")).unwrap();
        assert!(matches!(glance(&top, "link"), Glance::There(_)));
        // No file system can know the answer before a first lookup.
        assert!(!matches!(glance(&top, "never"), Glance::There(_)));
    }
}
