//! A snapshot's directories as open ones, for what is asked of and set on the
//! directory itself and has no call that takes a path.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, statat, unlinkat};
use rustix::io::Errno;

use super::Dirs;
use super::dirs::{ensure_directory, list, open_to_list};
use super::paths::{SCRATCH, SNAPSHOTS, UPPER, WORK};
use crate::error::{Context, Error, Result};
use crate::types::SnapshotId;

/// A snapshot's directories.
pub struct SnapshotDirs {
    /// `<id>`.
    pub top: OwnedFd,
    /// `<id>/fs`.
    pub upper: OwnedFd,
    /// `<id>/work`, which a view of nothing lacks.
    pub work: Option<OwnedFd>,
}

impl SnapshotDirs {
    /// All of them, the one above the others first.
    pub fn all(&self) -> impl Iterator<Item = &OwnedFd> {
        [&self.top, &self.upper].into_iter().chain(&self.work)
    }

    /// Creates a directory beside them, from which entries are renamed into them; one that
    /// a crash has left is used.
    pub fn ensure_scratch(&self) -> Result<OwnedFd> {
        ensure_directory(&self.top, "<id>", SCRATCH)
    }

    /// Removes the scratch directory, which has to be empty.
    pub fn remove_scratch(&self) -> Result<()> {
        unlinkat(&self.top, SCRATCH, AtFlags::REMOVEDIR)
            .context(|| "remove a snapshot's scratch directory")
    }
}

/// Distinguishes the `work/work` that one mount of an overlay has created from that of
/// the next mount, which creates it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkMark {
    inode: u64,
    /// When it was last changed: the new one may get the old one's inode.
    changed: (i64, u64),
}

impl Dirs {
    /// The mark of a snapshot's last mount; `None` if it was never mounted, or is not there.
    pub fn work_mark(&self, id: SnapshotId) -> Option<WorkMark> {
        let work = self.open_parts(id).ok()?.work?;
        let found = statat(work, "work", AtFlags::SYMLINK_NOFOLLOW).ok()?;
        Some(WorkMark {
            inode: found.st_ino,
            changed: (found.st_ctime, found.st_ctime_nsec),
        })
    }

    /// Opens a snapshot's directories; no link is followed.
    ///
    /// # Errors
    ///
    /// `ErrorKind::DataLoss` if `<id>` or `fs` is not there.
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

    /// Whether a snapshot's directory is as [`Dirs::create`] makes it, or on the way
    /// there: nobody has written into it, and it is no link, as a layer's is. One that a
    /// daemon has removed meanwhile holds nothing either.
    pub fn is_unfilled(&self, id: SnapshotId) -> Result<bool> {
        let looking = || format!("look into {}/{SNAPSHOTS}/{id}", self.path());
        let entries = |parent: BorrowedFd<'_>, name: &str| match open_to_list(parent, name) {
            Err(Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(Errno::NOENT) => Ok(Some((None, Vec::new()))),
            opened => {
                let opened = opened.context(looking)?;
                let entries = list(&opened, self.path(), name)?;
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

    /// Shows `each` directory in the trash, as an open one. What is not one, or is
    /// gone by then, is left out.
    pub fn each_trashed(&self, mut each: impl FnMut(OwnedFd) -> Result<()>) -> Result<()> {
        let trash = self.trash_fd()?;
        for entry in self.trashed()? {
            // The type may be unknown to the file system.
            if matches!(entry.file_type, FileType::Directory | FileType::Unknown)
                && let Ok(directory) = open_to_list(trash, entry.name.as_c_str())
            {
                each(directory)?;
            }
        }
        Ok(())
    }
}
