//! Only one daemon may serve a root directory. The running daemon locks the file `<root>/lock`
//! with flock(2), and the kernel releases the lock however the daemon ends.

use std::thread;
use std::time::{Duration, Instant};

use rustix::fd::OwnedFd;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, ftruncate, openat};
use rustix::io::{Errno, read, write};

use crate::error::{Context, Error, Result};
use crate::volume::Root;

/// The lock of a root, released when dropped.
pub struct Lock {
    _file: OwnedFd,
}

/// The result of trying to take a lock.
pub enum Acquired {
    /// The lock is taken.
    Lock(Lock),
    /// Another process has the lock: the one with this process number.
    Held(String),
}

/// Takes the lock of a root directory, if no other process has the lock.
pub fn acquire(root: &Root) -> Result<Acquired> {
    let locking = || format!("lock {}/lock", root.path());
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = |flags| openat(root.fd(), "lock", flags, Mode::from_raw_mode(0o600));
    let file = match open(flags) {
        // On a read-only file system, a command that only looks can take the lock all the same.
        Err(Errno::ROFS) => open(OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC),
        file => file,
    }
    .context(locking)?;
    if let Some(holder) = holder_of(&file, root)? {
        return Ok(Acquired::Held(holder));
    }
    // Only error messages of other processes use this number, so a failed write is ignored.
    let text = format!("{}\n", std::process::id());
    let _ = ftruncate(&file, 0).and_then(|()| write(&file, text.as_bytes()));
    Ok(Acquired::Lock(Lock { _file: file }))
}

/// Returns an error if another process has the lock of the root directory. Does not take the
/// lock, so a daemon may start at any moment after this check.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`](crate::error::ErrorKind::FailedPrecondition) naming
/// the process that has the lock.
pub fn require_free(root: &Root) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match openat(root.fd(), "lock", flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        file => file.context(|| format!("look at {}/lock", root.path()))?,
    };
    match holder_of(&file, root)? {
        Some(holder) => Err(held(root, &holder)),
        None => Ok(()),
    }
}

/// How long [`require`] waits for the lock. A command such as `status` holds the lock only for
/// a moment.
const PATIENCE: Duration = Duration::from_secs(2);
const BETWEEN: Duration = Duration::from_millis(20);

/// Takes the lock of a root directory. Waits at most two seconds for the lock.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`](crate::error::ErrorKind::FailedPrecondition) naming
/// the process that has the lock.
pub fn require(root: &Root) -> Result<Lock> {
    let begun = Instant::now();
    loop {
        match acquire(root)? {
            Acquired::Lock(lock) => return Ok(lock),
            Acquired::Held(holder) if begun.elapsed() >= PATIENCE => {
                return Err(held(root, &holder));
            }
            Acquired::Held(_) => thread::sleep(BETWEEN),
        }
    }
}

/// Locks an open lock file. If another process has locked the file already, returns the number
/// of that process.
fn holder_of(file: &OwnedFd, root: &Root) -> Result<Option<String>> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => {
            let mut holder = [0_u8; 16];
            let length = read(file, &mut holder).unwrap_or(0);
            let holder = String::from_utf8_lossy(&holder[..length]);
            Ok(Some(holder.trim_end().to_owned()))
        }
        locked => locked
            .context(|| format!("lock {}/lock", root.path()))
            .map(|()| None),
    }
}

fn held(root: &Root, holder: &str) -> Error {
    Error::refused(format!(
        "another snapshotter (process {holder}) serves or checks the root directory {path}: stop \
         that process, or give this one another --root-dir",
        path = root.path()
    ))
}
