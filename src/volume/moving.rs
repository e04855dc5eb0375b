//! Moving a layer to the image volume: from `<writable>/snapshots/<id>` to
//! `<root>/snapshots/<id>`, which is a link to the former until then.
//!
//! The copy is made in `<root>/snapshots/.moving-<id>`. Then the copy and the
//! link exchange their names in one step, so that the layer's path always leads
//! to the whole layer. After a crash, a directory `.moving-<id>` is an
//! unfinished copy, and a link `.moving-<id>` shows that the exchange has
//! happened.

use rustix::fd::OwnedFd;
use rustix::fs::{
    AtFlags, FileType, Mode, RenameFlags, fsync, mkdirat, readlinkat, renameat, renameat_with,
    statat, symlinkat, syncfs, unlinkat,
};
use rustix::io::Errno;

use super::Dirs;
use super::dirs::{ensure_directory, open_path, stop_handing_on};
use super::durable::failed_flush;
use super::image::Image;
use super::paths::{SCRATCH, WORK};
use super::unpacked::replaced_name;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::types::SnapshotId;
use crate::util::fault_point::is_left_out;

const PREFIX: &str = ".moving-";
const LINK: &str = "link";

/// The id in the name of an entry `.moving-<id>`; `None` for other names.
pub fn moving_id(name: &[u8]) -> Option<SnapshotId> {
    SnapshotId::from_directory_name(name.strip_prefix(PREFIX.as_bytes())?)
}

/// The directories that a layer is copied to.
pub struct Target {
    /// The directory that will become the layer's.
    pub top: OwnedFd,
    /// An empty directory for hard links during the copy.
    pub scratch: OwnedFd,
}

impl Image {
    /// Creates the directories to copy a layer to. An unfinished copy goes to
    /// the trash first.
    pub fn begin_move(&self, id: SnapshotId) -> Result<Target> {
        let name = moving_name(id);
        self.dirs().trash_entry(&name)?;
        let snapshots = self.dirs().snapshots_fd();
        mkdirat(snapshots, name.as_str(), Mode::from_raw_mode(0o700))
            .and_then(|()| open_path(snapshots, &name))
            .context(|| format!("create {}/{name}", self.snapshots_path()))
            .and_then(|top| {
                let scratch = ensure_directory(&top, &name, SCRATCH)?;
                Ok(Target { top, scratch })
            })
    }

    /// Makes a finished copy durable.
    pub fn finish_copy(&self, target: &Target) -> Result<()> {
        unlinkat(&target.top, SCRATCH, AtFlags::REMOVEDIR)
            .context(|| "remove the copy's scratch directory")?;
        if is_left_out("copy") {
            return Ok(());
        }
        // The kernel reports a failed write once to each file that was open at
        // that time. The scratch directory has been open during the whole copy,
        // and nothing else flushes through it.
        syncfs(&target.scratch).map_err(failed_flush)
    }

    /// Exchanges the copy with the layer's link, durably.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if the file system cannot exchange two names.
    pub fn exchange(&self, id: SnapshotId) -> Result<()> {
        self.exchange_with(&moving_name(id), id)
    }

    /// Exchanges the directory of that name in `snapshots/` with the entry of a layer,
    /// durably.
    ///
    /// # Errors
    ///
    /// The same as in [`Image::exchange`].
    pub(super) fn exchange_with(&self, directory: &str, id: SnapshotId) -> Result<()> {
        let snapshots = self.dirs().snapshots_fd();
        let name = id.to_string();
        let exchange = || {
            let flags = RenameFlags::EXCHANGE;
            renameat_with(snapshots, directory, snapshots, name.as_str(), flags)
        };
        let exchanged = match exchange() {
            Err(Errno::XDEV) => self.renew_link(directory, id).and_then(|()| exchange()),
            exchanged => exchanged,
        };
        match exchanged {
            Err(errno @ (Errno::INVAL | Errno::NOSYS)) => {
                return Err(Error::caused(
                    ErrorKind::FailedPrecondition,
                    format!(
                        "the file system of {} cannot exchange two names (renameat2(2), \
                         RENAME_EXCHANGE), so layers cannot be moved or healed there: use ext4, \
                         XFS or btrfs",
                        self.snapshots_path()
                    ),
                    std::io::Error::from(errno),
                ));
            }
            exchanged => exchanged,
        }
        .and_then(|()| fsync(snapshots))
        .context(|| format!("put the layer {}/{id} into place", self.snapshots_path()))
    }

    /// Creates a layer's link again, inside the directory that will replace it. If
    /// `snapshots/` was put into a project after the link was created, the old link
    /// cannot be renamed into that directory (rename(2), EXDEV), but a new one can.
    fn renew_link(&self, directory: &str, id: SnapshotId) -> std::result::Result<(), Errno> {
        let snapshots = self.dirs().snapshots_fd();
        let name = id.to_string();
        let target = readlinkat(snapshots, name.as_str(), Vec::new())?;
        let copy = open_path(snapshots, directory)?;
        symlinkat(target, &copy, LINK)?;
        renameat(&copy, LINK, snapshots, name.as_str())
    }

    /// Moves `.moving-<id>` to the trash: the link after an exchange, or an
    /// unfinished copy. Returns the name there; `None` if there was nothing.
    pub fn end_move(&self, id: SnapshotId) -> Result<Option<String>> {
        self.dirs().trash_entry(&moving_name(id))
    }

    /// Whether an exchange has given the layer's link another name: `.moving-<id>` if the
    /// layer was copied, `.replaced-<id>` if it was healed.
    pub fn has_exchanged_link(&self, id: SnapshotId) -> Result<bool> {
        Ok(self.leads_to_layer(&moving_name(id), id)?
            || self.leads_to_layer(&replaced_name(id), id)?)
    }

    /// The type of a layer's entry: a link or a directory; `None` if the entry is missing.
    pub fn layer_entry(&self, id: SnapshotId) -> Result<Option<FileType>> {
        self.entry_type(&id.to_string())
    }

    pub(super) fn entry_type(&self, name: &str) -> Result<Option<FileType>> {
        match statat(self.dirs().snapshots_fd(), name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => {
                Err(errno).context(|| format!("look at {}/{name}", self.snapshots_path()))
            }
        }
    }

    /// Moves a layer's directory to `.moving-<id>` by a rename, if both volumes
    /// are on one file system. Returns `false` if they are not.
    pub fn rename_home(&self, id: SnapshotId, writable: &Dirs) -> Result<bool> {
        let moving = moving_name(id);
        let renaming = || format!("move layer {id} to the image volume");
        // If the directory is not there, `.moving-<id>` is the only copy of the
        // layer, and must stay.
        let name = id.to_string();
        let source = writable.snapshots_fd();
        statat(source, name.as_str(), AtFlags::SYMLINK_NOFOLLOW).context(renaming)?;
        self.dirs().trash_entry(&moving)?;
        match renameat(
            source,
            name.as_str(),
            self.dirs().snapshots_fd(),
            moving.as_str(),
        ) {
            Ok(()) => Ok(true),
            Err(Errno::XDEV) => Ok(false),
            Err(errno) => Err(errno).context(renaming),
        }
    }

    /// Undoes [`Image::rename_home`].
    pub fn rename_back(&self, id: SnapshotId, writable: &Dirs) -> Result<()> {
        let (moving, name) = (moving_name(id), id.to_string());
        let (image, writable) = (self.dirs().snapshots_fd(), writable.snapshots_fd());
        let rename = || renameat(image, moving.as_str(), writable, name.as_str());
        match rename() {
            // The inherit flag of `snapshots/` forbids the rename. It may be cleared: the next
            // start would do so, too.
            Err(Errno::XDEV) if stop_handing_on(writable) == Ok(true) => rename(),
            renamed => renamed,
        }
        .context(|| format!("move layer {id} back to the writable volume"))
    }

    /// Whether `.moving-<id>` is a renamed layer and not a copy: only a renamed layer
    /// has overlayfs's `work` beside `fs`.
    pub fn is_renamed_layer(&self, id: SnapshotId) -> Result<bool> {
        let work = self.entry_type(&format!("{}/{WORK}", moving_name(id)))?;
        Ok(work == Some(FileType::Directory))
    }
}

impl Dirs {
    /// The names of the entries in the trash that come from moves of layers.
    pub fn trashed_moves(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in self.trashed()? {
            let name = entry?.name;
            if name.to_bytes().starts_with(PREFIX.as_bytes()) {
                names.push(name.to_string_lossy().into_owned());
            }
        }
        Ok(names)
    }
}

fn moving_name(id: SnapshotId) -> String {
    format!("{PREFIX}{id}")
}
