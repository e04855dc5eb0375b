//! One daemon for each root: `<root>/lock`, held with flock(2) by the running
//! one. The kernel lets go of it however the daemon ends.

use rustix::fd::OwnedFd;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, ftruncate, openat};
use rustix::io::{Errno, read, write};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::volume::Root;

/// The lock; let go when dropped.
pub struct Lock {
    _file: OwnedFd,
}

/// Takes the lock of a root.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] naming the daemon that has it.
pub fn acquire(root: &Root, path: &str) -> Result<Lock> {
    let locking = || format!("lock {path}/lock");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat(root.fd(), "lock", flags, Mode::from_raw_mode(0o600)).context(locking)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => {
            let mut holder = [0_u8; 16];
            let length = read(&file, &mut holder).unwrap_or(0);
            let holder = String::from_utf8_lossy(&holder[..length]);
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "another snapshotter (process {}) serves the root {path}: \
                     stop that one, or give this one another --root-dir",
                    holder.trim_end()
                ),
            ));
        }
        locked => locked.context(locking)?,
    }
    // For the message above; that the file can be written is no condition.
    let text = format!("{}\n", std::process::id());
    let _ = ftruncate(&file, 0).and_then(|()| write(&file, text.as_bytes()));
    Ok(Lock { _file: file })
}
