//! The image volume, the writable volume, and all names on them.
//!
//! ```text
//! <root>/snapshots/<id>/fs            a layer, or one being unpacked (then with work/)
//! <root>/snapshots/<id>               or: a link to <writable>/snapshots/<id>
//! <root>/snapshots/.moving-<id>       a layer on its way to the image volume, see `moving`
//! <root>/lowers/<id>.<n>              a link to a host directory, see `host_dirs`
//! <root>/mounted/<id>                 a mark: a person may have mounted the snapshot
//! <root>/empty/                       an empty directory, lower of a layer without a parent
//! <root>/trash/                       removed, waiting to be deleted
//! <root>/left-out/<id>                set aside: owned by no snapshot, or not imported
//! <root>/.ids                         which ids were used last, see `block_mark`
//! <writable>/.volume                  the mark: the identity of this volume
//! <writable>/snapshots/<id>/{fs,work} what containers write
//! <writable>/snapshots/<id>/scratch   for links and nodes that are created again
//! <writable>/trash/
//! <writable>/left-out/<id>
//! <writable>/.ids
//! ```
//!
//! Owns: these names; creating, trashing and linking below them; the writable volume's
//! identity and presence. This module knows ids only, never keys or labels.
//!
//! No descriptor of the writable volume outlives a request, so that the administrator
//! can unmount it. Nothing is created on it before its identity is confirmed, so a bare
//! mount point stays bare.
//!
//! After a crash there may be a directory that no row knows. It is never used: the next
//! start moves it to the trash if it is empty or has a tombstone, and otherwise sets it
//! aside.

mod adopt;
mod block_mark;
mod dirs;
mod durable;
mod host_dirs;
mod identity;
mod image;
mod moving;
mod paths;
mod planned_mounts;
mod preconditions;
mod presence;
mod snapshot_dirs;
mod unpacked;

pub use adopt::Filled;
pub use dirs::{Dirs, Owner, Shape};
pub use durable::{Flush, replace_file};
use identity::Seen;
pub use identity::{Claim, Identity, ask_for_mark};
pub use image::{Image, Root};
pub use moving::moving_id;
pub use paths::{PROBE, ROOT_NAMES, UPPER, WRITABLE_NAMES};
pub use preconditions::{Holding, Lifetime, Reserve, Unused, keeps_times, require_mount};
use presence::Presence;
pub use snapshot_dirs::{SnapshotDirs, WorkMark};
pub use unpacked::{UnpackDir, is_handed_over, is_unpacked, replaced_id};

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::{self, ThreadId};

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::fstat;
use rustix::io::Errno;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::types::{Block, History, MountPath, SnapshotId, Volume};
use crate::util::lock::lock;
use crate::waits::{self, Awaited};

/// Both volumes.
pub struct Volumes {
    image: Image,
    writable_path: MountPath,
    /// Set once the writable volume has been claimed or recognised.
    writable_identity: OnceLock<Identity>,
    writable_presence: Presence,
    /// Compares the newest block of ids on a volume with the history of the database. Not set
    /// until [`Volumes::refuse_other_histories`] is called.
    judge: OnceLock<Box<Judge>>,
    /// Called each time the writable volume is confirmed, see [`Volumes::on_return`].
    on_return: OnceLock<Box<OnReturn>>,
    /// Whether the volumes were on two file systems when the writable volume was
    /// last recognised.
    are_on_two_file_systems: AtomicBool,
    /// `Some` while the writable volume does not answer. Only the thread inside, or no thread
    /// at all, may access the volume then.
    withheld_for: Mutex<Option<Option<ThreadId>>>,
}

type Judge = dyn Fn(Volume, Option<&Block>) -> Result<History> + Send + Sync;
type OnReturn = dyn Fn(&Dirs) -> Result<()> + Send + Sync;

impl Volumes {
    /// The volumes of an opened root and a writable directory. No disk is
    /// accessed.
    pub fn new(image: Image, writable_path: MountPath) -> Volumes {
        Volumes {
            image,
            writable_path,
            writable_identity: OnceLock::new(),
            writable_presence: Presence::new(),
            judge: OnceLock::new(),
            on_return: OnceLock::new(),
            are_on_two_file_systems: AtomicBool::new(false),
            withheld_for: Mutex::new(None),
        }
    }

    /// Lets only `thread`, or no thread at all, access the writable volume. All other threads
    /// get [`ErrorKind::Unavailable`] until [`Volumes::release_writable`] is called.
    pub fn withhold_writable(&self, thread: Option<ThreadId>) {
        *lock(&self.withheld_for) = Some(thread);
    }

    /// Lets every thread access the writable volume again, because the volume has answered.
    pub fn release_writable(&self) {
        *lock(&self.withheld_for) = None;
    }

    fn require_answering(&self) -> Result<()> {
        let holder = *lock(&self.withheld_for);
        if holder.is_none_or(|holder| holder == Some(thread::current().id())) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unavailable,
            format!(
                "the writable volume {} does not answer: check its disk or server; requests that \
                 need the volume work again once it answers",
                self.writable_path
            ),
        ))
    }

    /// The functions of the image volume alone: links and ownership.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Sets which writable volume the database belongs to. Only the first call
    /// has an effect.
    pub fn expect_writable(&self, identity: Identity) {
        let _ = self.writable_identity.set(identity);
    }

    /// Makes later calls refuse a volume whose history is not the database's. `check`
    /// does not call this.
    pub fn refuse_other_histories(
        &self,
        judge: impl Fn(Volume, Option<&Block>) -> Result<History> + Send + Sync + 'static,
    ) {
        let _ = self.judge.set(Box::new(judge));
    }

    /// Sets the function that is called each time the writable volume is confirmed after it
    /// was unmounted, or may have been. If `mark` fails, the volume is used all the same.
    pub fn on_return(&self, mark: impl Fn(&Dirs) -> Result<()> + Send + Sync + 'static) {
        let _ = self.on_return.set(Box::new(mark));
    }

    /// Records durably that ids of this block are used on a volume.
    pub fn record_block(&self, dirs: &Dirs, block: &Block) -> Result<()> {
        dirs.record_block(block)?;
        if dirs.volume() == Volume::Writable {
            let presence = &self.writable_presence;
            presence.change(|seen| seen.with_ids_of(dirs.top_fd()));
        }
        Ok(())
    }

    /// Returns an error for a volume of another history, once
    /// [`Volumes::refuse_other_histories`] was called. A volume without snapshots
    /// has no history.
    ///
    /// # Errors
    ///
    /// `ErrorKind::DataLoss` for another history.
    pub fn require_same_history(&self, dirs: &Dirs) -> Result<()> {
        let Some(judge) = self.judge.get() else {
            return Ok(());
        };
        let block = dirs.newest_block()?;
        let history = judge(dirs.volume(), block.as_ref())?;
        if history == History::Same || dirs.entries()?.is_empty() {
            return Ok(());
        }
        let (volume, path) = (dirs.volume(), dirs.path());
        let first = block.map_or(0, |block| block.first);
        Err(Error::data_loss(match history {
            History::Earlier => format!(
                "the {volume} volume {path} is in an older state than the database: the volume was \
                 rolled back, or an old copy of it is mounted. Mount the latest state, or run \
                 `check --repair`, which accepts this one"
            ),
            History::Same | History::Other => format!(
                "the {volume} volume {path} holds snapshots with ids from {first} on, which this \
                 database has never given out: the database is an old copy, or belongs to another \
                 volume. Put the latest database back, or run `check --repair`, which sets aside \
                 all directories that this database does not know"
            ),
        }))
    }

    /// Opens the directories of a volume. Each call checks the writable volume again,
    /// because it may have been unmounted, or mounted late.
    ///
    /// # Errors
    ///
    /// `ErrorKind::FailedPrecondition` if the writable volume is missing or another disk
    /// is mounted in its place, `ErrorKind::DataLoss` if it has another history than the
    /// database, `ErrorKind::Internal` if it cannot be read, `ErrorKind::Unavailable` if it
    /// does not answer.
    pub fn open(&self, volume: Volume) -> Result<Arc<Dirs>> {
        waits::note(Awaited::Volume(volume));
        match volume {
            Volume::Image => Ok(Arc::clone(self.image.dirs())),
            Volume::Writable => {
                self.require_answering()?;
                let path = &self.writable_path;
                let top = identity::open_expected(path, self.expected_writable()?)?;
                match self.is_confirmed(Seen::in_directory(&top)) {
                    true => Ok(Arc::new(Dirs::open_marked(path, top)?)),
                    false => self.confirm_writable().map(Arc::new),
                }
            }
        }
    }

    /// Opens the writable volume, and checks that its mark and its history are the expected
    /// ones.
    fn confirm_writable(&self) -> Result<Dirs> {
        let identity = self.expected_writable()?;
        let path = &self.writable_path;
        let look = self.writable_presence.look(path);
        let top = identity::open_expected(path, identity)?;
        // The metadata is read before the mark: if the mark changes in between, the next
        // call reads it again.
        let seen = Seen::in_directory(&top);
        identity::confirm(&top, path, identity)?;
        self.require_apart(&top)?;
        let dirs = Dirs::open_marked(path, top)?;
        self.require_same_history(&dirs)?;
        let Some(mark) = self.on_return.get() else {
            self.writable_presence.confirm(look, seen);
            return Ok(dirs);
        };
        if let Err(error) = mark(&dirs) {
            log::warn!(
                "the daemon cannot record on the writable volume {path} that it was mounted \
                 again, so it will not notice if an older copy of the volume is mounted later; \
                 the volume is used all the same: {}",
                error.chain()
            );
        }
        let seen = seen.map(|seen| seen.with_ids_of(dirs.top_fd()));
        self.writable_presence.confirm(look, seen);
        Ok(dirs)
    }

    /// Checks the writable volume like [`Volumes::open`], with the same errors, but usually
    /// opens no directory.
    pub fn require_writable(&self) -> Result<()> {
        self.require_answering()?;
        if self.is_confirmed(Seen::in_path(&self.writable_path)) {
            return Ok(());
        }
        self.open(Volume::Writable).map(drop)
    }

    /// Whether the writable volume is mounted, as far as the kernel knows without accessing a
    /// disk. `false` means that it may not be mounted.
    pub fn is_writable_there_for_sure(&self) -> bool {
        self.require_answering().is_ok()
            && self.is_confirmed(Seen::at_a_glance(&self.writable_path))
    }

    /// Whether the volumes are on two file systems; `false` also if the writable volume
    /// has not been seen yet.
    pub fn are_on_two_file_systems(&self) -> bool {
        self.are_on_two_file_systems.load(Ordering::Relaxed)
    }

    fn is_confirmed(&self, seen: Option<Seen>) -> bool {
        self.writable_presence.is_confirmed(seen)
    }

    /// Returns `ErrorKind::FailedPrecondition` if the writable directory is on a disk
    /// that the host's configuration names and that is not mounted. This check is for a
    /// volume that is used for the first time; later, its mark shows whether it is mounted.
    pub fn require_writable_mounted(&self) -> Result<()> {
        planned_mounts::require_mounted(&self.writable_path)
    }

    /// Returns whose mark the writable directory has. Creates the directory if it is missing,
    /// and changes nothing in it.
    ///
    /// # Errors
    ///
    /// `ErrorKind::FailedPrecondition` if the path is not a directory, or its file `.volume`
    /// is not a mark of this program.
    pub fn look_at_writable(&self, identity: &Identity) -> Result<Claim> {
        let path = &self.writable_path;
        image::create_directory(path, "writable directory", "--writable-dir")?;
        identity.look(self.open_writable_top()?, path)
    }

    /// Makes the writable directory the volume with this identity, unless the directory has
    /// a mark already: marks it durably, and creates the missing directories in it.
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
    /// `ErrorKind::FailedPrecondition` if the directory has the mark of another volume, or
    /// if no volume is expected.
    pub fn mark_writable(&self) -> Result<()> {
        let identity = self.expected_writable()?;
        match self.look_at_writable(identity)? {
            Claim::Foreign(_) => self.open(Volume::Writable).map(drop),
            Claim::Free | Claim::Ours => self.claim_writable(identity),
        }
    }

    /// The newest block of ids that was used in a writable directory without a mark;
    /// `None` if the directory does not exist, has a mark, or has no such block.
    /// Changes nothing.
    pub fn block_of_unmarked(&self) -> Result<Option<Block>> {
        self.require_answering()?;
        let path = &self.writable_path;
        let top = match identity::open_top(path) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            top => top.context(|| format!("look into the writable directory {path}"))?,
        };
        match self.expected_writable()?.look(&top, path)? {
            Claim::Free => block_mark::read_block(top, path),
            Claim::Ours | Claim::Foreign(_) => Ok(None),
        }
    }

    /// The kind of content of the writable directory. A mark does not count.
    pub fn writable_holding(&self) -> Result<Holding> {
        let path = &self.writable_path;
        identity::open_top(path)
            .and_then(preconditions::holding)
            .context(|| format!("look into the writable directory {path}"))
    }

    fn expected_writable(&self) -> Result<&Identity> {
        self.writable_identity.get().ok_or_else(|| {
            Error::refused(format!(
                "the writable volume {} has not been set up: start the daemon, which does so",
                self.writable_path
            ))
        })
    }

    /// Whether the writable directory can be a volume that a reboot has emptied:
    /// it is on a file system in memory, or is a mount point itself.
    pub fn is_writable_mounted_anew(&self) -> Result<bool> {
        let path = &self.writable_path;
        preconditions::is_mounted_anew(path)
            .context(|| format!("find out what is mounted at {path}"))
    }

    /// The number of the writable directory's type of file system (statfs(2)).
    pub fn writable_file_system(&self) -> Result<u64> {
        let path = &self.writable_path;
        preconditions::file_system_type(Path::new(path))
            .context(|| format!("find out the file system of {path}"))
    }

    fn open_writable_top(&self) -> Result<OwnedFd> {
        let path = &self.writable_path;
        let top =
            identity::open_top(path).context(|| format!("open the writable directory {path}"))?;
        self.require_apart(&top)?;
        Ok(top)
    }

    /// Returns an error if the root and the writable directory are one directory, by a link
    /// or a bind mount, because this would mix the ids of both volumes.
    fn require_apart(&self, top: impl AsFd) -> Result<()> {
        let path = &self.writable_path;
        let looking = || format!("look at {path}");
        let (root, top) = (
            fstat(self.image.top()).context(looking)?,
            fstat(top).context(looking)?,
        );
        let is_two = root.st_dev != top.st_dev;
        self.are_on_two_file_systems
            .store(is_two, Ordering::Relaxed);
        if (root.st_dev, root.st_ino) != (top.st_dev, top.st_ino) {
            return Ok(());
        }
        Err(Error::refused(format!(
            "the writable directory {path} is the root directory by another name: give another \
             --writable-dir"
        )))
    }

    /// Links `<root>/snapshots/<id>` to the snapshot's directory on the writable volume.
    /// After a crash the link may be missing: a start makes it again.
    pub fn link_home(&self, id: SnapshotId) -> Result<()> {
        self.image.link(id, &self.link_target(id))
    }
}
