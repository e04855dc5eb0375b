//! Where a layer is unpacked again, to be compared with what is there, and how it takes
//! the place of a damaged one.
//!
//! It is unpacked in `<root>/snapshots/.unpacked`, which belongs to the process that has
//! locked it (flock(2)); what a killed process has left there is nobody's. A layer that is
//! to take the place of another is handed over: it is moved to a name of its own, so that
//! it belongs to what heals, the daemon or the command, whatever becomes of the lock. Then
//! it gets the name `.replaced-<id>`, and changes names with the damaged directory in one
//! step. After a crash, what is called so is one of the two, and the layer itself is whole
//! or as it was.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FlockOperation, Mode, flock, fstat, fsync, mkdirat, statat, unlinkat};
use rustix::io::Errno;

use super::dirs::{Dirs, Owner, Shape, ensure_directory, fill, move_aside, open_to_list};
use super::image::Image;
use super::paths::{HANDED_OVER, REPLACED, UNPACKED, UPPER, WORK, upper_in};
use crate::error::{Context, Error, Result};
use crate::types::{SnapshotId, SnapshotPaths};

/// The directory of the layer that is being unpacked.
const LAYER: &str = "layer";

/// The id in the name of a directory that has changed places with a layer, or was about to.
pub fn replaced_id(name: &[u8]) -> Option<SnapshotId> {
    SnapshotId::from_directory_name(name.strip_prefix(REPLACED.as_bytes())?)
}

/// Whether an entry of `snapshots/` has the name of what is unpacked to be compared.
pub fn is_unpacked(name: &[u8]) -> bool {
    name == UNPACKED.as_bytes()
}

/// Whether an entry of `snapshots/` has the name of an unpacked layer that was handed over.
pub fn is_handed_over(name: &[u8]) -> bool {
    let is_number = |c: &u8| c.is_ascii_digit() || *c == b'-';
    name.strip_prefix(HANDED_OVER.as_bytes())
        .is_some_and(|numbers| !numbers.is_empty() && numbers.iter().all(is_number))
}

/// The directory for one unpacked layer at a time, locked.
pub struct UnpackDir<'a> {
    image: &'a Image,
    fd: OwnedFd,
}

impl Image {
    /// Makes and locks the directory.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`](crate::error::ErrorKind::FailedPrecondition) if
    /// another process has locked it.
    pub fn take_unpack_dir(&self) -> Result<UnpackDir<'_>> {
        let snapshots = self.dirs().snapshots_fd();
        let path = self.snapshots_path();
        loop {
            let fd = ensure_directory(snapshots, &path, UNPACKED)?;
            if !lock(&fd).context(|| format!("lock {path}/{UNPACKED}"))? {
                return Err(Error::refused(format!(
                    "another `check --deep` or `check --heal` is at work on {}: wait for its end",
                    self.path()
                )));
            }
            // The one before may have removed it just before this one has locked it.
            if is_named(&fd, snapshots).context(|| format!("look at {path}/{UNPACKED}"))? {
                return Ok(UnpackDir { image: self, fd });
            }
        }
    }

    /// Moves what a killed process has unpacked to the trash. `false` if there is nothing,
    /// or its process is at work.
    pub fn trash_abandoned_unpack(&self) -> Result<bool> {
        let fd = match open_to_list(self.dirs().snapshots_fd(), UNPACKED) {
            Err(Errno::NOENT) => return Ok(false),
            fd => fd.context(|| format!("open {}/{UNPACKED}", self.snapshots_path()))?,
        };
        let locking = || format!("lock {}/{UNPACKED}", self.snapshots_path());
        if !lock(&fd).context(locking)? {
            return Ok(false);
        }
        Ok(self.dirs().trash_entry(UNPACKED)?.is_some())
    }
}

impl UnpackDir<'_> {
    /// The directory itself, to be emptied.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Makes the directories of a layer in it, which has to be empty. Returns their paths,
    /// and `fs`, opened.
    pub fn begin(&self, owner: Owner) -> Result<(SnapshotPaths, OwnedFd)> {
        let top = format!("{}/{UNPACKED}/{LAYER}", self.image.snapshots_path());
        let making = || format!("create the directory {top}");
        mkdirat(&self.fd, LAYER, Mode::from_raw_mode(0o700)).context(making)?;
        let prefix = format!("{LAYER}/");
        fill(&self.fd, &prefix, Shape::UpperAndWork, owner).context(making)?;
        let paths = SnapshotPaths {
            upper: upper_in(&top),
            work: format!("{top}/{WORK}"),
        };
        Ok((paths, self.open()?))
    }

    /// Opens `fs` of the unpacked layer.
    pub fn open(&self) -> Result<OwnedFd> {
        open_to_list(&self.fd, LAYER)
            .and_then(|layer| open_to_list(layer, UPPER))
            .context(|| "open the directory of an unpacked layer")
    }

    /// Moves the unpacked layer to a name of its own in `snapshots/`, and returns that.
    pub fn hand_over(&self) -> Result<String> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let snapshots = self.image.dirs().snapshots_fd();
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!("{HANDED_OVER}{}-{number}", std::process::id());
            match move_aside(&self.fd, LAYER, snapshots, &name) {
                // Of a killed process with the same number.
                Err(Errno::EXIST | Errno::NOTEMPTY) => {}
                moved => {
                    let path = self.image.snapshots_path();
                    moved.context(|| format!("move the unpacked layer to {path}/{name}"))?;
                    return Ok(name);
                }
            }
        }
    }

    /// Removes the directory, which has to be empty.
    pub fn remove(self) {
        // What is in it is removed by the next one, or the next start.
        let _ = unlinkat(
            self.image.dirs().snapshots_fd(),
            UNPACKED,
            AtFlags::REMOVEDIR,
        );
    }
}

impl Image {
    /// Opens `fs` of an unpacked layer that was handed over.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`](crate::error::ErrorKind::InvalidArgument) for a name
    /// that [`UnpackDir::hand_over`] does not give.
    pub fn open_handed_over(&self, name: &str) -> Result<OwnedFd> {
        if !is_handed_over(name.as_bytes()) {
            return Err(Error::invalid(format!(
                "{name:?} is not the name of an unpacked layer"
            )));
        }
        open_to_list(self.dirs().snapshots_fd(), name)
            .and_then(|layer| open_to_list(layer, UPPER))
            .context(|| format!("open the unpacked layer {}/{name}", self.snapshots_path()))
    }

    /// Puts an unpacked layer that was handed over, and is durable, into the place of a
    /// layer that is damaged or missing. What had the layer's name is called
    /// [`REPLACED`]`<id>` after that; nothing may have that name before.
    ///
    /// # Errors
    ///
    /// As of [`Image::exchange`]. The unpacked layer is then called [`REPLACED`]`<id>`.
    pub fn put_in_place(&self, handed_over: &str, id: SnapshotId) -> Result<()> {
        let (snapshots, path) = (self.dirs().snapshots_fd(), self.snapshots_path());
        let replaced = replaced_name(id);
        move_aside(snapshots, handed_over, snapshots, &replaced)
            .context(|| format!("rename the unpacked layer {path}/{handed_over} to {replaced}"))?;
        if self.layer_entry(id)?.is_some() {
            return self.exchange_with(&replaced, id);
        }
        move_aside(snapshots, &replaced, snapshots, &id.to_string())
            .and_then(|()| fsync(snapshots))
            .context(|| format!("put the layer {path}/{id} into place"))
    }
}

impl Dirs {
    /// Moves what has changed places with a layer to the trash, and returns its name there;
    /// `None` if there was nothing.
    pub fn trash_replaced(&self, id: SnapshotId) -> Result<Option<String>> {
        self.trash_entry(&replaced_name(id))
    }
}

fn replaced_name(id: SnapshotId) -> String {
    format!("{REPLACED}{id}")
}

/// `false` if another process has the lock.
fn lock(directory: &OwnedFd) -> std::result::Result<bool, Errno> {
    match flock(directory, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(false),
        locked => locked.map(|()| true),
    }
}

fn is_named(directory: &OwnedFd, parent: BorrowedFd<'_>) -> std::result::Result<bool, Errno> {
    let opened = fstat(directory)?;
    match statat(parent, UNPACKED, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(false),
        named => named.map(|named| (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)),
    }
}
