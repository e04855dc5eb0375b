//! The directories `snapshots/` and `trash/` of one volume.

use std::ffi::{CStr, CString};
use std::sync::OnceLock;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, DirEntry, FileType, Gid, Mode, OFlags, RenameFlags, StatVfsMountFlags, Uid, chmodat,
    chownat, fstatvfs, fsync, mkdirat, openat, renameat_with, statat, syncfs, unlinkat,
};
use rustix::io::Errno;
use rustix::path::Arg;

use super::paths::{LEFT_OUT, SNAPSHOTS, TRASH, UPPER, WORK, upper_of};
use super::preconditions::{emptied, no_directory};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys::quota;
use crate::types::{SnapshotId, Volume};
use crate::util::entries::entries;
use crate::util::undo::Undo;

/// A directory in the trash that [`require_alive`] creates and removes.
const PROBE: &str = "probe";

/// What a snapshot's directory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `fs` and `work`: something will write there through an overlay.
    UpperAndWork,
    /// `fs` alone: a view without a parent.
    UpperOnly,
}

/// The owner of a snapshot's `fs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// User id on the host.
    pub uid: u32,
    /// Group id on the host.
    pub gid: u32,
}

/// Something found in `snapshots/`.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    /// The entry's name.
    pub name: CString,
    /// The entry's type. In a result of [`list`], it is the type that the
    /// directory reports.
    pub file_type: FileType,
}

/// The opened directories of one volume.
pub struct Dirs {
    volume: Volume,
    path: String,
    top: OwnedFd,
    snapshots: OwnedFd,
    /// The trash, opened at its first use, because most requests do not need it.
    trash: OnceLock<OwnedFd>,
}

impl Dirs {
    /// Opens `snapshots` in `top`, and creates it if it is missing. `trash` is
    /// opened at its first use.
    pub(super) fn open(volume: Volume, path: &str, top: OwnedFd) -> Result<Dirs> {
        Ok(Dirs {
            volume,
            path: path.to_owned(),
            snapshots: ensure_directory(&top, path, SNAPSHOTS)?,
            trash: OnceLock::new(),
            top,
        })
    }

    /// Opens the directories of a writable volume that has its mark. A volume gets `snapshots`
    /// before its mark, so a volume with a mark and without `snapshots` was emptied.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if the volume was emptied. Nothing is created there.
    pub(super) fn open_marked(path: &str, top: OwnedFd) -> Result<Dirs> {
        let snapshots = match open_to_list(&top, SNAPSHOTS) {
            Err(Errno::NOENT) => return Err(emptied(path)),
            Err(Errno::NOTDIR | Errno::LOOP) => return Err(no_directory(path, SNAPSHOTS)),
            opened => opened.context(|| format!("open the directory {path}/{SNAPSHOTS}"))?,
        };
        Ok(Dirs {
            volume: Volume::Writable,
            path: path.to_owned(),
            snapshots,
            trash: OnceLock::new(),
            top,
        })
    }

    /// Creates the directories of a new snapshot; `fs` is 0755 and belongs to
    /// `owner`, `work` is 0711. Leaves nothing behind on failure.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if `snapshots/<id>` exists and holds files. An
    /// empty directory, as an unfinished request leaves it, goes to the trash.
    pub fn create(
        &self,
        id: SnapshotId,
        shape: Shape,
        owner: Owner,
    ) -> Result<Undo<impl FnOnce() -> Result<()>>> {
        let creating = || format!("create the directory {}", self.snapshot_path(id));
        let name = id.to_string();
        let mode = Mode::from_raw_mode(0o700);
        match mkdirat(&self.snapshots, name.as_str(), mode) {
            Err(Errno::EXIST) => {
                if self.is_taken(id)? {
                    let path = self.snapshot_path(id);
                    let what = format!("{path} holds files that no snapshot owns: move them away");
                    return Err(Error::refused(what));
                }
                self.trash(id).context(creating)?;
                mkdirat(&self.snapshots, name.as_str(), mode)
            }
            made => made,
        }
        .context(creating)?;
        let new = Undo::new("the creation of a snapshot's directories", move || {
            self.trash(id).map(drop)
        });
        // The directory was just created, so no link in it can be followed.
        fill(&self.snapshots, &format!("{name}/"), shape, owner).context(creating)?;
        Ok(new)
    }

    /// Whether `snapshots/<id>` exists and is not an empty directory as
    /// [`Dirs::create`] makes it.
    pub fn is_taken(&self, id: SnapshotId) -> Result<bool> {
        match statat(&self.snapshots, id.to_string(), AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(false),
            found => {
                found.context(|| format!("look at {}", self.snapshot_path(id)))?;
                Ok(!self.is_unfilled(id)?)
            }
        }
    }

    /// Whether a snapshot's directory has all the parts that [`Dirs::create`]
    /// makes.
    pub fn is_whole(&self, id: SnapshotId, shape: Shape) -> bool {
        is_directory(&self.snapshots, &upper_of(id))
            && (shape == Shape::UpperOnly || is_directory(&self.snapshots, &format!("{id}/{WORK}")))
    }

    /// Creates the missing parts of a snapshot's directory, as after a power
    /// cut between the steps of [`Dirs::create`]. Existing parts stay as they
    /// are.
    pub fn complete(&self, id: SnapshotId, shape: Shape, owner: Owner) -> Result<()> {
        open_path(&self.snapshots, &id.to_string())
            .and_then(|top| fill(top, "", shape, owner))
            .context(|| format!("complete the directory {}", self.snapshot_path(id)))
    }

    /// Moves a snapshot's directory, or anything else with its name, to the trash.
    /// Returns the name there; `None` if there was nothing.
    pub fn trash(&self, id: SnapshotId) -> Result<Option<String>> {
        self.trash_entry(&id.to_string())
    }

    /// Moves the entry `name` of `snapshots/` to the trash. Returns the name there;
    /// `None` if there was nothing.
    pub fn trash_entry(&self, name: &str) -> Result<Option<String>> {
        let trash = self.trash_fd()?;
        self.move_to(name, trash)
            .context(|| format!("move {}/{SNAPSHOTS}/{name} to the trash", self.path))
    }

    /// Moves an entry of `snapshots/` into a directory in which nothing is created. If
    /// its name is taken there, a number is appended. Returns the name there; `None` if
    /// there was nothing.
    fn move_to(&self, name: &str, to: impl AsFd) -> std::result::Result<Option<String>, Errno> {
        let mut target = name.to_owned();
        for attempt in 1_u64.. {
            match move_aside(&self.snapshots, name, &to, &target) {
                Ok(()) => return Ok(Some(target)),
                Err(Errno::NOENT) => return Ok(None),
                // Nothing is created in that directory, so clearing its inherit
                // flag loses no quota accounting.
                Err(Errno::XDEV) if stop_handing_on(&to)? => {}
                Err(Errno::EXIST | Errno::NOTEMPTY) => target = format!("{name}.{attempt}"),
                Err(errno) => return Err(errno),
            }
        }
        unreachable!("2^64 names are never all taken")
    }

    /// Moves `snapshots/<id>`, which no snapshot owns, to the trash if it holds no more than
    /// the empty directories of [`Dirs::create`], otherwise to `left-out/`, which only a
    /// person empties. Returns the new path if the entry went to `left-out/`.
    pub fn clear_away(&self, id: SnapshotId) -> Result<Option<String>> {
        if self.is_unfilled(id)? {
            return self.trash(id).map(|_| None);
        }
        let left_out = ensure_directory(&self.top, &self.path, LEFT_OUT)?;
        let moving = || format!("set {} aside in {LEFT_OUT}/", self.snapshot_path(id));
        match self.move_to(&id.to_string(), &left_out).context(moving)? {
            None => Ok(None),
            Some(name) => {
                fsync(&left_out)
                    .and_then(|()| fsync(&self.snapshots))
                    .context(moving)?;
                Ok(Some(self.left_out_path(&name)))
            }
        }
    }

    /// Makes all renames in `snapshots/` durable.
    pub fn settle_names(&self) -> Result<()> {
        fsync(&self.snapshots).context(|| format!("flush {}/{SNAPSHOTS}", self.path))
    }

    /// The path of a name in `left-out/`.
    pub fn left_out_path(&self, name: &str) -> String {
        format!("{}/{LEFT_OUT}/{name}", self.path)
    }

    /// The names in `left-out/`.
    pub fn left_out(&self) -> Result<Vec<String>> {
        let entries = match open_to_list(&self.top, LEFT_OUT) {
            Err(Errno::NOENT) => return Ok(Vec::new()),
            opened => {
                let opened = opened.context(|| format!("open {}/{LEFT_OUT}", self.path))?;
                list(opened, &self.path, LEFT_OUT)?
            }
        };
        let names = entries.iter().map(|entry| entry.name.to_string_lossy());
        let mut names: Vec<_> = names.map(String::from).collect();
        names.sort();
        Ok(names)
    }

    /// Opens a snapshot's directory, which contains `fs`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if the directory is missing.
    pub fn open_snapshot(&self, id: SnapshotId) -> Result<OwnedFd> {
        let opening = || format!("open {}", self.snapshot_path(id));
        open_path(&self.snapshots, &id.to_string())
            .map_err(|errno| Error::missing(errno, opening()))
    }

    /// Opens a snapshot's `fs`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if the directory is missing.
    pub fn open_upper(&self, id: SnapshotId) -> Result<OwnedFd> {
        open_upper(&self.snapshots, &self.path, id)
    }

    /// Everything in `snapshots/`, in the order of the directory.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let mut entries = list(&self.snapshots, &self.path, SNAPSHOTS)?;
        for entry in &mut entries {
            // Some file systems do not report types.
            if entry.file_type == FileType::Unknown {
                entry.file_type = self.type_of(&entry.name)?;
            }
        }
        Ok(entries)
    }

    fn type_of(&self, name: &CStr) -> Result<FileType> {
        match statat(&self.snapshots, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(FileType::Unknown),
            stat => stat
                .map(|stat| FileType::from_raw_mode(stat.st_mode))
                .context(|| format!("look at {}/{SNAPSHOTS}/{name:?}", self.path)),
        }
    }

    /// Makes everything written on the volume so far durable (`syncfs(2)`).
    ///
    /// # Errors
    /// [`ErrorKind::FailedPrecondition`] if an administrator has made the volume
    /// read-only (the kernel flushes the volume then); [`ErrorKind::DataLoss`] if the
    /// disk failed to write some of the data, or if the file system has stopped
    /// writing.
    pub fn sync(&self) -> Result<()> {
        let flushing = || format!("flush the {} volume {}", self.volume, self.path);
        let failed =
            |errno| Error::caused(ErrorKind::DataLoss, flushing(), std::io::Error::from(errno));
        let state = fstatvfs(&self.snapshots).context(flushing)?;
        if state.f_flag.contains(StatVfsMountFlags::RDONLY) {
            return Err(Errno::ROFS).context(flushing);
        }
        // The trash is opened before the flush, because a file system that fails during the
        // flush opens nothing any more.
        let trash = self.trash_fd()?;
        syncfs(&self.snapshots).map_err(failed)?;
        require_alive(trash).map_err(failed)
    }

    /// The opened trash. It is created if it is missing.
    pub fn trash_fd(&self) -> Result<BorrowedFd<'_>> {
        if let Some(trash) = self.trash.get() {
            return Ok(trash.as_fd());
        }
        let opened = ensure_directory(&self.top, &self.path, TRASH)?;
        Ok(self.trash.get_or_init(|| opened).as_fd())
    }

    /// Whether this is the image volume or the writable one.
    pub fn volume(&self) -> Volume {
        self.volume
    }

    pub(super) fn top_fd(&self) -> BorrowedFd<'_> {
        self.top.as_fd()
    }

    /// The path of the volume, as configured.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The opened `snapshots/`. Callers also use it for calls about the volume's file system.
    pub fn snapshots_fd(&self) -> BorrowedFd<'_> {
        self.snapshots.as_fd()
    }

    fn snapshot_path(&self, id: SnapshotId) -> String {
        format!("{}/{SNAPSHOTS}/{id}", self.path)
    }
}

/// Creates the missing parts of a snapshot's directory. `prefix` precedes their
/// names.
pub(super) fn fill(
    at: impl AsFd,
    prefix: &str,
    shape: Shape,
    owner: Owner,
) -> std::result::Result<(), Errno> {
    let make = |name: &str, mode| match mkdirat(&at, name, Mode::from_raw_mode(mode)) {
        Err(Errno::EXIST) => Ok(false),
        made => made.map(|()| true),
    };
    if shape == Shape::UpperAndWork {
        make(&format!("{prefix}{WORK}"), 0o711)?;
    }
    let upper = format!("{prefix}fs");
    if !make(&upper, 0o755)? || owner == (Owner { uid: 0, gid: 0 }) {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    chownat(&at, upper.as_str(), Some(uid), Some(gid), flags)?;
    // Sets the mode again, because some file systems clear bits of it when the
    // owner changes.
    chmodat(
        &at,
        upper.as_str(),
        Mode::from_raw_mode(0o755),
        AtFlags::empty(),
    )
}

/// Checks that a file system still writes. A file system that has made itself read-only (as
/// ext4 does after an error) flushes nothing, but `syncfs` reports success, and `statvfs`
/// does not show the state. Only a change fails, such as a new directory.
fn require_alive(trash: BorrowedFd<'_>) -> std::result::Result<(), Errno> {
    match mkdirat(trash, PROBE, Mode::from_raw_mode(0o700)) {
        // A full file system still writes.
        Ok(()) | Err(Errno::EXIST | Errno::NOSPC | Errno::DQUOT) => {}
        Err(errno) => return Err(errno),
    }
    match unlinkat(trash, PROBE, AtFlags::REMOVEDIR) {
        // A Cleanup may have deleted the directory already.
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Renames without replacing anything. Where the file system does not support
/// `RENAME_NOREPLACE`, the target is looked for first.
pub(super) fn move_aside(
    from: impl AsFd,
    name: &str,
    to: impl AsFd,
    target: &str,
) -> std::result::Result<(), Errno> {
    match renameat_with(&from, name, &to, target, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL) => match statat(&to, target, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Err(Errno::EXIST),
            Err(Errno::NOENT) => renameat_with(&from, name, &to, target, RenameFlags::empty()),
            Err(errno) => Err(errno),
        },
        renamed => renamed,
    }
}

/// Clears a directory's inherit flag, because an entry of another project cannot be moved
/// into a directory that gives its project to new entries (rename(2), EXDEV). Returns
/// `false` if the flag was not set, so that the move has failed for another reason.
pub(super) fn stop_handing_on(directory: impl AsFd) -> std::result::Result<bool, Errno> {
    let mut attributes = match quota::file_attributes(&directory) {
        // The file system does not know projects.
        Err(Errno::NOTTY | Errno::OPNOTSUPP) => return Ok(false),
        attributes => attributes?,
    };
    if attributes.flags & quota::INHERIT == 0 {
        return Ok(false);
    }
    attributes.flags &= !quota::INHERIT;
    quota::set_file_attributes(directory, attributes)?;
    Ok(true)
}

/// Whether there is a directory at a path below `parent`. No link is followed at
/// its end.
fn is_directory(parent: impl AsFd, path: &str) -> bool {
    statat(parent, path, AtFlags::SYMLINK_NOFOLLOW)
        .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

/// Opens a snapshot's `fs` below the directory `snapshots` of the volume at
/// `volume`.
pub(super) fn open_upper(snapshots: impl AsFd, volume: &str, id: SnapshotId) -> Result<OwnedFd> {
    let opening = || format!("open {volume}/{SNAPSHOTS}/{}", upper_of(id));
    open_path(snapshots, &id.to_string())
        .and_then(|top| open_to_list(top, UPPER))
        .map_err(|errno| Error::missing(errno, opening()))
}

/// The entries of the opened `directory` of the volume at `volume`.
pub(super) fn list(fd: impl AsFd, volume: &str, directory: &str) -> Result<Vec<Entry>> {
    read(fd, volume, directory)?.collect()
}

/// Like [`list`], one after another.
pub(super) fn read(
    fd: impl AsFd,
    volume: &str,
    directory: &str,
) -> Result<impl Iterator<Item = Result<Entry>>> {
    let listing = move || format!("list {volume}/{directory}");
    let entry = |entry: DirEntry| Entry {
        name: entry.file_name().to_owned(),
        file_type: entry.file_type(),
    };
    let all = entries(fd).context(listing)?;
    Ok(all.map(move |found| found.map(entry).context(listing)))
}

pub(super) fn open_path(parent: impl AsFd, name: &str) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

/// Opens the directory `name` in `parent` to list it; no link is followed.
pub(super) fn open_to_list(
    parent: impl AsFd,
    name: impl Arg,
) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

/// Opens the directory `name` in `parent`, creating it 0700 if it is missing.
/// A link or a file of that name is refused.
pub(super) fn ensure_directory(parent: impl AsFd, path: &str, name: &str) -> Result<OwnedFd> {
    let opening = || format!("open the directory {path}/{name}");
    let opened = match open_to_list(&parent, name) {
        Err(Errno::NOENT) => match mkdirat(&parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => open_to_list(&parent, name),
            Err(errno) => Err(errno),
        },
        opened => opened,
    };
    match opened {
        Err(Errno::NOTDIR | Errno::LOOP) => Err(no_directory(path, name)),
        opened => opened.context(opening),
    }
}
