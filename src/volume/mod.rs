//! The two places where bytes are kept.
//!
//! ```text
//! <root>/snapshots/<id>/fs            a layer, or one being unpacked (then with work/)
//! <root>/snapshots/<id>               or: a link to <writable>/snapshots/<id>
//! <root>/snapshots/.moving-<id>       a layer on its way to the image volume, see `moving`
//! <root>/lowers/<id>.<n>              a link to a host directory, see `host_dirs`
//! <root>/mounted/<id>                 says that a person may have mounted it
//! <root>/empty/                       an empty directory, lower of a layer without parent
//! <root>/trash/                       removed, waiting to be deleted
//! <root>/left-out/<id>               what an import could not take over
//! <writable>/.volume                  which volume this is
//! <writable>/snapshots/<id>/{fs,work} what containers write
//! <writable>/snapshots/<id>/scratch   while its links and nodes are created again
//! <writable>/trash/
//! <writable>/left-out/<id>
//! ```
//!
//! Owns: these names, creating, trashing and linking below them, the writable
//! volume's identity and presence. Knows ids only; never keys or labels.
//! No descriptor of the writable volume outlives a request: the administrator
//! must be able to unmount it. Nothing is created on it before its identity is
//! confirmed, so an unmounted disk's bare mount point stays bare.
//! After a crash there may be a directory that no row knows: the next request that gets
//! its id, or the next start, moves it to the trash; it is never used.

mod adopt;
mod cached_lookup;
mod dirs;
mod durable;
mod host_dirs;
mod identity;
mod image;
mod moving;
mod paths;
mod preconditions;
mod snapshot_dirs;

pub use adopt::Filled;
pub use dirs::{Dirs, Owner, Shape};
pub use durable::{Flush, replace_file};
use identity::Seen;
pub use identity::{Claim, Identity};
pub use image::{Image, Root};
pub use moving::moving_id;
use paths::SNAPSHOTS;
pub use paths::{PROBE, ROOT_NAMES, UPPER, WRITABLE_NAMES};
pub use preconditions::{Holding, Lifetime, Reserve, Unused, require_mount_points};
pub use snapshot_dirs::{SnapshotDirs, WorkMark};

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::fstat;
use rustix::io::Errno;

use crate::error::{Context, Error, Result};
use crate::types::{MountPath, SnapshotId, Volume};
use crate::util::lock::lock;

/// Both volumes.
pub struct Volumes {
    image: Image,
    writable_path: MountPath,
    /// Set once the writable volume has been claimed or recognised.
    writable_identity: OnceLock<Identity>,
    /// The mark that was last found to be the right one.
    writable_mark: Mutex<Option<Seen>>,
}

impl Volumes {
    /// The volumes below an opened root and a writable directory. Touches no disk.
    pub fn new(image: Image, writable_path: MountPath) -> Volumes {
        Volumes {
            image,
            writable_path,
            writable_identity: OnceLock::new(),
            writable_mark: Mutex::new(None),
        }
    }

    /// The image volume's own functions: links and ownership.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Which writable volume the database belongs to; a later one is ignored.
    pub fn expect_writable(&self, identity: Identity) {
        let _ = self.writable_identity.set(identity);
    }

    /// The directories of a volume. The writable one is looked at again at each call: it
    /// may have been unmounted, or mounted late.
    ///
    /// # Errors
    ///
    /// `ErrorKind::FailedPrecondition` if the writable volume is not there or
    /// is another one, `ErrorKind::Internal` if it cannot be read.
    pub fn open(&self, volume: Volume) -> Result<Arc<Dirs>> {
        match volume {
            Volume::Image => Ok(Arc::clone(self.image.dirs())),
            Volume::Writable => {
                let identity = self.expected_writable()?;
                let path = &self.writable_path;
                let top = identity::open_expected(path, identity)?;
                // Before it is read: what changes meanwhile is read next time.
                let seen = Seen::in_directory(&top);
                if !self.is_confirmed(seen) {
                    identity::confirm(&top, path, identity)?;
                    self.require_apart(&top)?;
                    *lock(&self.writable_mark) = seen;
                }
                Ok(Arc::new(Dirs::open(Volume::Writable, path, top)?))
            }
        }
    }

    /// As [`Volumes::open`] of the writable volume, where nothing on it is needed.
    pub fn require_writable(&self) -> Result<()> {
        if self.is_confirmed(Seen::in_path(&self.writable_path)) {
            return Ok(());
        }
        self.open(Volume::Writable).map(drop)
    }

    /// Whether the writable volume is there. Asks no disk: `false` also where a disk would
    /// have to be asked.
    pub fn is_writable_there_for_sure(&self) -> bool {
        self.is_confirmed(Seen::at_a_glance(&self.writable_path))
    }

    fn is_confirmed(&self, seen: Option<Seen>) -> bool {
        seen.is_some() && seen == *lock(&self.writable_mark)
    }

    /// Returns whose mark the writable directory has, before any database knows it;
    /// creates the directory if it is missing, and changes nothing in it.
    ///
    /// # Errors
    ///
    /// `ErrorKind::FailedPrecondition` if it is no directory, or if its mark is no mark
    /// of ours.
    pub fn look_at_writable(&self, identity: &Identity) -> Result<Claim> {
        let path = &self.writable_path;
        image::create_directory(path, "writable directory", "--writable-dir")?;
        identity.look(self.open_writable_top()?, path)
    }

    /// Makes the writable directory the volume of that identity, unless it has
    /// a mark already: marks it durably, makes the directories it lacks.
    pub fn claim_writable(&self, identity: &Identity) -> Result<()> {
        let path = &self.writable_path;
        let dirs = Dirs::open(Volume::Writable, path, self.open_writable_top()?)?;
        dirs.trash_fd()?;
        identity.claim(dirs.top_fd(), path).map(drop)
    }

    /// Marks the writable directory as the expected volume.
    ///
    /// # Errors
    ///
    /// `ErrorKind::FailedPrecondition` if it carries the mark of another one, or none
    /// is expected.
    pub fn mark_writable(&self) -> Result<()> {
        let identity = self.expected_writable()?;
        match self.look_at_writable(identity)? {
            Claim::Foreign(_) => self.open(Volume::Writable).map(drop),
            Claim::Free | Claim::Ours => self.claim_writable(identity),
        }
    }

    /// The numbers of the directories in a writable directory that is there but
    /// carries no mark; `None` if it is not there or marked. Changes nothing.
    pub fn unmarked_snapshots(&self) -> Result<Option<Vec<SnapshotId>>> {
        let path = &self.writable_path;
        let looking = || format!("look into the writable directory {path}");
        let top = match identity::open_top(path) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            top => top.context(looking)?,
        };
        // Any identity will do: none is there if this one finds none.
        if self.expected_writable()?.look(&top, path)? != Claim::Free {
            return Ok(None);
        }
        let snapshots = match dirs::open_to_list(&top, SNAPSHOTS) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            snapshots => snapshots.context(looking)?,
        };
        let ids = dirs::list(&snapshots, path, SNAPSHOTS)?
            .iter()
            .filter_map(|entry| SnapshotId::from_directory_name(entry.name.to_bytes()))
            .collect();
        Ok(Some(ids))
    }

    /// What there is in the writable directory, beside a mark.
    pub fn writable_holding(&self) -> Result<Holding> {
        let path = &self.writable_path;
        identity::open_top(path)
            .and_then(preconditions::holding)
            .context(|| format!("look into the writable directory {path}"))
    }

    fn expected_writable(&self) -> Result<&Identity> {
        self.writable_identity.get().ok_or_else(|| {
            Error::refused(format!(
                "the writable volume {} has not been set up",
                self.writable_path
            ))
        })
    }

    /// Whether the writable directory can be a volume that a reboot has emptied:
    /// on a file system in memory, or a mount point itself.
    pub fn is_writable_mounted_anew(&self) -> Result<bool> {
        let path = &self.writable_path;
        preconditions::is_mounted_anew(path).context(|| format!("look what is mounted at {path}"))
    }

    /// The number of the writable directory's type of file system (statfs(2)).
    pub fn writable_file_system(&self) -> Result<u64> {
        let path = &self.writable_path;
        preconditions::file_system_type(Path::new(path))
            .context(|| format!("look what is at {path}"))
    }

    fn open_writable_top(&self) -> Result<OwnedFd> {
        let path = &self.writable_path;
        let top =
            identity::open_top(path).context(|| format!("open the writable directory {path}"))?;
        self.require_apart(&top)?;
        Ok(top)
    }

    /// Two paths may lead to one directory, by a link or a bind mount; the ids
    /// of both volumes would be mixed up there.
    fn require_apart(&self, top: impl AsFd) -> Result<()> {
        let path = &self.writable_path;
        let looking = || format!("look at {path}");
        let (root, top) = (
            fstat(self.image.top()).context(looking)?,
            fstat(top).context(looking)?,
        );
        if (root.st_dev, root.st_ino) != (top.st_dev, top.st_ino) {
            return Ok(());
        }
        Err(Error::refused(format!(
            "{path} is the root directory by another name: give another --writable-dir"
        )))
    }

    /// Links `<root>/snapshots/<id>` to the snapshot's directory on the
    /// writable volume, durably.
    pub fn link_home(&self, id: SnapshotId) -> Result<()> {
        self.image.link(id, &self.link_target(id))
    }
}
