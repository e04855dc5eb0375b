//! Unpacking a layer again, to compare it with the existing one, and replacing a damaged
//! layer by the new one.
//!
//! A layer is unpacked in `<root>/snapshots/.unpacked`, which belongs to the process that
//! has locked this directory (flock(2)). If that process was killed, it belongs to none. A
//! layer that will replace another is handed over: it is renamed, so that it belongs to the
//! daemon or command that heals, whatever happens to the lock. Then it is renamed to
//! `.replaced-<id>`, and exchanges its name with the damaged directory in one step. After
//! a crash, `.replaced-<id>` is the unpacked layer or the damaged directory, and the layer
//! itself is unchanged or healed.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FlockOperation, Mode, flock, fstat, fsync, mkdirat, statat, unlinkat};
use rustix::io::Errno;

use super::dirs::{Dirs, Owner, Shape, ensure_directory, fill, move_aside, open_to_list};
use super::image::Image;
use super::paths::{HANDED_OVER, REPLACED, UNPACKED, UPPER, WORK, upper_in};
use crate::error::{Context, Error, Result};
use crate::types::{SnapshotId, SnapshotPaths};

/// The start of the name of the directory of one unpack. A number follows, which each unpack
/// increases, because containerd may still write into the previous directory for a moment.
const LAYER: &str = "layer-";

/// The id in the name of an entry `.replaced-<id>`; `None` for other names.
pub fn replaced_id(name: &[u8]) -> Option<SnapshotId> {
    SnapshotId::from_directory_name(name.strip_prefix(REPLACED.as_bytes())?)
}

/// Whether an entry of `snapshots/` has the name of the directory in which layers are
/// unpacked again.
pub fn is_unpacked(name: &[u8]) -> bool {
    name == UNPACKED.as_bytes()
}

/// Whether an entry of `snapshots/` has the name of an unpacked layer that was handed over.
pub fn is_handed_over(name: &[u8]) -> bool {
    let is_number = |c: &u8| c.is_ascii_digit() || *c == b'-';
    name.strip_prefix(HANDED_OVER.as_bytes())
        .is_some_and(|numbers| !numbers.is_empty() && numbers.iter().all(is_number))
}

/// The locked directory `.unpacked`, which holds one unpacked layer at a time.
pub struct UnpackDir<'a> {
    image: &'a Image,
    fd: OwnedFd,
    number: Cell<u64>,
}

impl Image {
    /// Creates and locks the directory `.unpacked`.
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
                    "another `check --deep` or `check --heal` is running on {}: wait until \
                     it has ended",
                    self.path()
                )));
            }
            // The previous owner of the directory may have removed it just before this
            // process locked it.
            if is_named(&fd, snapshots, UNPACKED)
                .context(|| format!("look at {path}/{UNPACKED}"))?
            {
                return Ok(UnpackDir {
                    image: self,
                    fd,
                    number: Cell::new(0),
                });
            }
        }
    }

    /// Moves `.unpacked` to the trash if a killed process has left it. Returns `false` if there
    /// is no such directory, or its process is still running.
    pub fn trash_abandoned_unpack(&self) -> Result<bool> {
        let snapshots = self.dirs().snapshots_fd();
        let fd = match open_to_list(snapshots, UNPACKED) {
            Err(Errno::NOENT) => return Ok(false),
            fd => fd.context(|| format!("open {}/{UNPACKED}", self.snapshots_path()))?,
        };
        let locking = || format!("lock {}/{UNPACKED}", self.snapshots_path());
        // A check may have removed this directory and created a new one before the lock.
        if !lock(&fd).context(locking)? || !is_named(&fd, snapshots, UNPACKED).context(locking)? {
            return Ok(false);
        }
        Ok(self.dirs().trash_entry(UNPACKED)?.is_some())
    }
}

impl UnpackDir<'_> {
    /// The opened directory `.unpacked`, for callers that empty it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Creates the directories of a layer in `.unpacked`, which has to be empty. Returns
    /// their paths, and the opened `fs`.
    pub fn begin(&self, owner: Owner) -> Result<(SnapshotPaths, OwnedFd)> {
        self.number.set(self.number.get() + 1);
        let layer = self.layer();
        let top = format!("{}/{UNPACKED}/{layer}", self.image.snapshots_path());
        let making = || format!("create the directory {top}");
        mkdirat(&self.fd, layer.as_str(), Mode::from_raw_mode(0o700)).context(making)?;
        let prefix = format!("{layer}/");
        fill(&self.fd, &prefix, Shape::UpperAndWork, owner).context(making)?;
        let paths = SnapshotPaths {
            upper: upper_in(&top),
            work: format!("{top}/{WORK}"),
        };
        Ok((paths, self.open()?))
    }

    /// Opens `fs` of the unpacked layer.
    pub fn open(&self) -> Result<OwnedFd> {
        open_to_list(&self.fd, self.layer())
            .and_then(|layer| open_to_list(layer, UPPER))
            .context(|| "open the directory of an unpacked layer")
    }

    fn layer(&self) -> String {
        format!("{LAYER}{}", self.number.get())
    }

    /// Renames the unpacked layer within `snapshots/`, and returns its new name.
    pub fn hand_over(&self) -> Result<String> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let snapshots = self.image.dirs().snapshots_fd();
        loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let name = format!("{HANDED_OVER}{}-{number}", std::process::id());
            match move_aside(&self.fd, &self.layer(), snapshots, &name) {
                // A killed process with the same process id has left this name.
                Err(Errno::EXIST | Errno::NOTEMPTY) => {}
                moved => {
                    let path = self.image.snapshots_path();
                    moved.context(|| format!("move the unpacked layer to {path}/{name}"))?;
                    return Ok(name);
                }
            }
        }
    }

    /// Removes `.unpacked`.
    pub fn remove(self) {
        // If the directory is not empty, the next check or the next start removes it.
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
    /// [`ErrorKind::InvalidArgument`](crate::error::ErrorKind::InvalidArgument) for a
    /// name that [`UnpackDir::hand_over`] does not return.
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

    /// Whether there is an entry `.replaced-<id>`: a directory that a healed layer has
    /// replaced, or the layer that was about to replace it.
    pub fn has_replaced(&self, id: SnapshotId) -> Result<bool> {
        Ok(self.entry_type(&replaced_name(id))?.is_some())
    }

    /// Replaces a damaged or missing layer by an unpacked one that was handed over and
    /// is durable. The old entry is then called [`REPLACED`]`<id>`; nothing may have
    /// this name before.
    ///
    /// # Errors
    ///
    /// The same as in [`Image::exchange`]. The unpacked layer then has its own name again.
    /// But if only the last flush has failed, the unpacked layer is in place, and the old
    /// entry is kept.
    pub fn put_in_place(&self, handed_over: &str, id: SnapshotId) -> Result<()> {
        let (snapshots, path) = (self.dirs().snapshots_fd(), self.snapshots_path());
        let replaced = replaced_name(id);
        move_aside(snapshots, handed_over, snapshots, &replaced)
            .context(|| format!("rename the unpacked layer {path}/{handed_over} to {replaced}"))?;
        let unpacked = open_to_list(snapshots, replaced.as_str())
            .context(|| format!("open the unpacked layer {path}/{replaced}"))?;
        let put = match self.layer_entry(id)? {
            Some(_) => self.exchange_with(&replaced, id),
            None => move_aside(snapshots, &replaced, snapshots, &id.to_string())
                .and_then(|()| fsync(snapshots))
                .context(|| format!("put the layer {path}/{id} into place")),
        };
        if put.is_err() && is_named(&unpacked, snapshots, &replaced).is_ok_and(|is_it| is_it) {
            move_aside(snapshots, &replaced, snapshots, handed_over)
                .context(|| format!("rename {path}/{replaced} back to {handed_over}"))?;
        }
        put
    }
}

impl Dirs {
    /// Moves the entry `.replaced-<id>` to the trash, and returns its name there; `None` if
    /// there was no such entry.
    pub fn trash_replaced(&self, id: SnapshotId) -> Result<Option<String>> {
        self.trash_entry(&replaced_name(id))
    }
}

pub(super) fn replaced_name(id: SnapshotId) -> String {
    format!("{REPLACED}{id}")
}

/// Locks a directory. Returns `false` if another process has the lock.
fn lock(directory: &OwnedFd) -> std::result::Result<bool, Errno> {
    match flock(directory, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(false),
        locked => locked.map(|()| true),
    }
}

fn is_named(
    directory: &OwnedFd,
    parent: BorrowedFd<'_>,
    name: &str,
) -> std::result::Result<bool, Errno> {
    let opened = fstat(directory)?;
    match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => Ok(false),
        named => named.map(|named| (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)),
    }
}
