//! The opened directories of one snapshot, for system calls that take a descriptor
//! instead of a path.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, statat, unlinkat};
use rustix::io::Errno;

use super::Dirs;
use super::dirs::{Entry, ensure_directory, open_to_list, read};
use super::paths::{SCRATCH, SNAPSHOTS, TRASH, UPPER, WORK};
use crate::error::{Context, Error, Result};
use crate::types::SnapshotId;

/// The opened directories of one snapshot.
pub struct SnapshotDirs {
    /// `snapshots/<id>`.
    pub top: OwnedFd,
    /// `snapshots/<id>/fs`.
    pub upper: OwnedFd,
    /// `snapshots/<id>/work`; a view without a parent has no such directory.
    pub work: Option<OwnedFd>,
}

impl SnapshotDirs {
    /// All directories, the outer one first.
    pub fn all(&self) -> impl Iterator<Item = &OwnedFd> {
        [&self.top, &self.upper].into_iter().chain(&self.work)
    }

    /// Creates `<id>/scratch`, where links and nodes are created before they are renamed into
    /// `fs`. A scratch directory that a crash has left is used.
    pub fn ensure_scratch(&self) -> Result<OwnedFd> {
        ensure_directory(&self.top, "<id>", SCRATCH)
    }

    /// Removes the scratch directory, which has to be empty.
    pub fn remove_scratch(&self) -> Result<()> {
        unlinkat(&self.top, SCRATCH, AtFlags::REMOVEDIR)
            .context(|| "remove a snapshot's scratch directory")
    }
}

/// Distinguishes two mounts of one overlay: each mount creates the directory `work/work`
/// again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkMark {
    inode: u64,
    /// The time of the last change (ctime). The inode number alone is not enough, because a
    /// new directory may get the number of the old one.
    changed: (i64, u64),
}

impl Dirs {
    /// The mark of a snapshot's last mount; `None` if the snapshot was never mounted, or its
    /// directory is missing.
    pub fn work_mark(&self, id: SnapshotId) -> Option<WorkMark> {
        let work = self.open_parts(id).ok()?.work?;
        let found = statat(work, "work", AtFlags::SYMLINK_NOFOLLOW).ok()?;
        Some(WorkMark {
            inode: found.st_ino,
            changed: (found.st_ctime, found.st_ctime_nsec),
        })
    }

    /// Opens a snapshot's directories without following links.
    ///
    /// # Errors
    ///
    /// `ErrorKind::DataLoss` if `<id>` or `fs` is missing.
    pub fn open_parts(&self, id: SnapshotId) -> Result<SnapshotDirs> {
        let opening = || format!("open the directories of {}/{SNAPSHOTS}/{id}", self.path());
        let missing = |errno| Error::missing(errno, opening());
        let top = open_to_list(self.snapshots_fd(), id.to_string()).map_err(missing)?;
        let upper = open_to_list(&top, UPPER).map_err(missing)?;
        let work = match open_to_list(&top, WORK) {
            Err(Errno::NOENT) => None,
            work => Some(work.context(opening)?),
        };
        Ok(SnapshotDirs { top, upper, work })
    }

    /// Whether nothing was written into a snapshot's directory: it holds at most the empty
    /// directories that [`Dirs::create`] makes. A link, as of an unmoved layer, counts as
    /// filled; a directory that does not exist counts as unfilled.
    pub fn is_unfilled(&self, id: SnapshotId) -> Result<bool> {
        let looking = || format!("look into {}/{SNAPSHOTS}/{id}", self.path());
        let entries = |parent: BorrowedFd<'_>, name: &str| match open_to_list(parent, name) {
            Err(Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(Errno::NOENT) => Ok(Some((None, Vec::new()))),
            opened => {
                let opened = opened.context(looking)?;
                // A container may create any number, and three are more than there may be.
                let entries = read(&opened, self.path(), name)?.take(3);
                let entries = entries.collect::<Result<Vec<_>>>()?;
                Ok::<_, Error>(Some((Some(opened), entries)))
            }
        };
        let (top, parts) = match entries(self.snapshots_fd(), &id.to_string())? {
            Some((Some(top), parts)) => (top, parts),
            Some((None, _)) => return Ok(true),
            None => return Ok(false),
        };
        for part in parts {
            let name = part.name.to_str().unwrap_or_default();
            if !matches!(name, "fs" | "work") {
                return Ok(false);
            }
            match entries(top.as_fd(), name)? {
                Some((_, content)) if content.is_empty() => {}
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// The highest id among the names in `snapshots/` and `trash/`; 0 if there
    /// are none.
    pub fn highest_id(&self) -> Result<u64> {
        let mut highest = 0;
        for entry in self.entries()?.into_iter().map(Ok).chain(self.trashed()?) {
            // The second entry of one name in the trash has a number after a dot.
            let name = entry?.name;
            let name = name.to_bytes().split(|byte| *byte == b'.').next();
            let id = name.and_then(SnapshotId::from_directory_name);
            // No daemon gives out ids this high: another program has made the entry.
            let id = id.map(SnapshotId::number).filter(|id| *id < 1 << 48);
            highest = highest.max(id.unwrap_or(0));
        }
        Ok(highest)
    }

    /// What is in `trash/`, one entry after another: a deletion that was interrupted may
    /// have moved any number of directories there.
    pub(super) fn trashed(&self) -> Result<impl Iterator<Item = Result<Entry>>> {
        read(self.trash_fd()?, self.path(), TRASH)
    }

    /// Calls `each` for every directory in the trash. Entries that are not
    /// directories, or that vanish meanwhile, are left out.
    pub fn each_trashed(&self, mut each: impl FnMut(OwnedFd) -> Result<()>) -> Result<()> {
        let trash = self.trash_fd()?;
        for entry in self.trashed()? {
            let entry = entry?;
            // Some file systems do not report types.
            if matches!(entry.file_type, FileType::Directory | FileType::Unknown)
                && let Ok(directory) = open_to_list(trash, entry.name.as_c_str())
            {
                each(directory)?;
            }
        }
        Ok(())
    }
}
