//! Copying a tree to another file system, completely or not at all.
//!
//! A copy has the same owner, mode, times to the nanosecond, every extended attribute that
//! is content (overlayfs's own, capabilities, those of users; see `xattrs`), ACLs where
//! the target supports them, whiteouts and other device nodes, FIFOs, sockets, symlinks,
//! hard links within the tree, holes, and names that are not UTF-8. If the target
//! refuses any of this, the copy ends with an error. The memory depends only on the
//! depth of the tree, and the number of open descriptors is constant.

use std::collections::{BTreeSet, HashSet};
use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Stat, Timespec, Timestamps, Uid, chmodat,
    chownat, copy_file_range, fstat, ftruncate, linkat, mkdirat, mknodat, openat, readlinkat,
    renameat, seek, statat, symlinkat, unlinkat, utimensat,
};
use rustix::io::{Errno, pread, pwrite};

use super::walk::{Inode, Walk, inode_of, open_as};
use super::xattrs::{XattrBuffers, entry_path, fd_path};
use super::{open_directory, open_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::util::entries::entries;

/// The result of a copy.
pub struct Copied {
    /// How many bytes of data were copied.
    pub bytes: u64,
    /// The names of some attributes that are not content and were not copied,
    /// because the target does not support them.
    pub left_out: BTreeSet<String>,
}

/// Copies the directory `name` in `from` to the same name in `to`, where this name must
/// be free. `scratch` is an empty directory on the target's file system; it holds a link
/// to each inode with several names during the copy, and is empty again at the end. Stops
/// early, with an error, once `cancel` is set. On failure, the caller has to delete what
/// has been copied.
///
/// # Errors
///
/// [`ErrorKind::ResourceExhausted`] if the target is full;
/// [`ErrorKind::Unavailable`] if the copy was cancelled;
/// [`ErrorKind::Internal`] if something cannot be read, or the target cannot
/// store it.
pub fn copy_tree(
    from: impl AsFd,
    to: impl AsFd,
    name: &CStr,
    scratch: impl AsFd,
    cancel: &AtomicBool,
) -> Result<Copied> {
    let mut copy = Copy {
        scratch: scratch.as_fd(),
        cancel,
        bytes: 0,
        links: 0,
        used_up: HashSet::new(),
        xattrs: XattrBuffers::new(),
    };
    let (source, mut target, level) = copy.enter(from.as_fd(), to.as_fd(), name)?;
    let mut walk = Walk::begin(source, "read a directory of the layer")?;
    let mut levels = vec![level];
    while let Some(level) = levels.last() {
        let Some(entry) = walk.next_here()? else {
            let above = match levels.len() {
                0 | 1 => None,
                below => Some(open_above(&target, levels[below - 2].target)?),
            };
            let at = above.as_ref().map_or(to.as_fd(), AsFd::as_fd);
            // A directory's attributes are set last, because each entry created
            // in it changes its times.
            copy.set_attributes(at, walk.parent()?, target.as_fd(), level)?;
            if !walk.leave()? {
                return Err(moved_meanwhile());
            }
            levels.pop();
            target = above.unwrap_or(target);
            continue;
        };
        copy.require_wanted()?;
        let name = entry.file_name();
        let below = copy
            .entry(walk.parent()?, target.as_fd(), name)
            .context(|| format!("copy {name:?}"))?;
        if let Some((source, below, level)) = below {
            walk.enter(source, name)?;
            target = below;
            levels.push(level);
        }
    }
    copy.forget_links()?;
    Ok(Copied {
        bytes: copy.bytes,
        left_out: copy.xattrs.left_out,
    })
}

fn open_above(target: impl AsFd, inode: Inode) -> Result<OwnedFd> {
    let above =
        open_as(target, c"..", inode).context(|| "return to the directory above in the copy")?;
    above.ok_or_else(moved_meanwhile)
}

fn moved_meanwhile() -> Error {
    let what = "a directory of the layer was moved while it was copied";
    Error::new(ErrorKind::Internal, what)
}

/// A directory being copied. Only the copy entered last is open.
struct Level {
    name: CString,
    stat: Stat,
    target: Inode,
}

/// A source directory, its copy, and the level for both.
type Entered = (OwnedFd, OwnedFd, Level);

struct Copy<'a> {
    scratch: BorrowedFd<'a>,
    cancel: &'a AtomicBool,
    bytes: u64,
    links: u64,
    /// Inodes that have as many names on the target as its file system allows.
    used_up: HashSet<String>,
    xattrs: XattrBuffers,
}

impl Copy<'_> {
    fn require_wanted(&self) -> Result<()> {
        match self.cancel.load(Ordering::Relaxed) {
            false => Ok(()),
            true => Err(Error::new(
                ErrorKind::Unavailable,
                "the copy of the layer was cancelled",
            )),
        }
    }

    fn enter(&self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> Result<Entered> {
        let copying = || format!("copy the directory {name:?}");
        let source = open_directory(from, name).context(copying)?;
        let stat = fstat(&source).context(copying)?;
        mkdirat(to, name, Mode::from_raw_mode(0o700)).context(copying)?;
        let target = open_directory(to, name).context(copying)?;
        let level = Level {
            name: name.to_owned(),
            stat,
            target: inode_of(&target).context(copying)?,
        };
        Ok((source, target, level))
    }

    /// Copies one entry. If it is a directory, returns it, so that the caller fills it.
    fn entry(
        &mut self,
        from: BorrowedFd<'_>,
        to: BorrowedFd<'_>,
        name: &CStr,
    ) -> Result<Option<Entered>> {
        let stat = statat(from, name, AtFlags::SYMLINK_NOFOLLOW).context(|| "read the metadata")?;
        let file_type = FileType::from_raw_mode(stat.st_mode);
        if file_type == FileType::Directory {
            return self.enter(from, to, name).map(Some);
        }
        let is_linked = stat.st_nlink > 1;
        if is_linked && self.link_again(&stat, to, name)? {
            return Ok(None);
        }
        match file_type {
            FileType::RegularFile => self.file(from, to, name)?,
            _ => make_node((from, name), (to, name), &stat)?,
        }
        set_all_attributes(&mut self.xattrs, (from, name), (to, name), &stat)?;
        if is_linked {
            linkat(to, name, self.scratch, link_name(&stat), AtFlags::empty())
                .context(|| "link the copy into the scratch directory, for further hard links")?;
            self.links += 1;
        }
        Ok(None)
    }

    /// Creates a further hard link to an inode that has been copied already. Returns `false` if
    /// the inode has to be copied.
    fn link_again(&mut self, stat: &Stat, to: BorrowedFd<'_>, name: &CStr) -> Result<bool> {
        let linking = || "create the hard link";
        let remembered = link_name(stat);
        if self.used_up.contains(&remembered) {
            return Err(Errno::MLINK).context(linking);
        }
        match linkat(self.scratch, &*remembered, to, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            // The link in the scratch directory uses up one of the possible names.
            Err(Errno::MLINK) => {
                renameat(self.scratch, &*remembered, to, name).context(linking)?;
                self.used_up.insert(remembered);
                Ok(true)
            }
            Err(errno) => Err(errno).context(linking),
        }
    }

    fn forget_links(&self) -> Result<()> {
        if self.links == 0 {
            return Ok(());
        }
        let forgetting = || "remove the hard links in the scratch directory of the copy";
        for entry in entries(self.scratch).context(forgetting)? {
            entry
                .and_then(|entry| unlinkat(self.scratch, entry.file_name(), AtFlags::empty()))
                .context(forgetting)?;
        }
        Ok(())
    }

    fn file(&mut self, from: BorrowedFd<'_>, to: BorrowedFd<'_>, name: &CStr) -> Result<()> {
        let opened = open_file(from, name).context(|| "open the file")?;
        let (source, stat) = opened.ok_or_else(moved_meanwhile)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(0o600);
        let target = openat(to, name, flags, mode).context(|| "create the file")?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        let mut at = 0;
        while let Some((start, end)) = next_data(&source, at, size)? {
            self.range(&source, &target, start, end)?;
            at = end;
        }
        // The truncation also creates a hole at the end of the file.
        ftruncate(&target, size).context(|| "set the size of the file")
    }

    fn range(&mut self, source: &OwnedFd, target: &OwnedFd, start: u64, end: u64) -> Result<()> {
        const CHUNK: usize = 4 << 20;
        let (mut read_at, mut write_at) = (start, start);
        let mut buffer = Vec::new();
        while read_at < end {
            self.require_wanted()?;
            let wanted = usize::try_from(end - read_at).map_or(CHUNK, |left| left.min(CHUNK));
            let before = read_at;
            let copied = if buffer.is_empty() {
                copy_file_range(
                    source,
                    Some(&mut read_at),
                    target,
                    Some(&mut write_at),
                    wanted,
                )
            } else {
                Err(Errno::XDEV)
            };
            match copied {
                // 0 is the end of the file, but some file systems return it in place
                // of an error. A read shows which of the two it is.
                Ok(0) => buffer.resize(1 << 20, 0),
                Ok(_) => {}
                // Kernels before 5.19 do not copy between file systems, and
                // some file systems do not support the call at all.
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::BADF) => {
                    buffer.resize(1 << 20, 0);
                    let wanted = wanted.min(buffer.len());
                    let got = pread(source, &mut buffer[..wanted], read_at)
                        .context(|| "read the data of the file")?;
                    if got == 0 {
                        let what = "the file has become shorter during the copy";
                        return Err(Error::new(ErrorKind::Internal, what));
                    }
                    let mut done = 0;
                    while done < got {
                        let written = pwrite(target, &buffer[done..got], write_at)
                            .context(|| "write the data of the file")?;
                        done += written;
                        write_at += written as u64;
                    }
                    read_at += got as u64;
                }
                Err(errno) => return Err(errno).context(|| "copy the data of the file"),
            }
            self.bytes += read_at - before;
        }
        Ok(())
    }

    fn set_attributes(
        &mut self,
        above: BorrowedFd<'_>,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        level: &Level,
    ) -> Result<()> {
        let name = &level.name;
        let setting = || format!("set the attributes of the directory {name:?}");
        set_owner_and_mode(above, name, &level.stat).context(setting)?;
        self.xattrs
            .copy(&fd_path(source), &fd_path(target))
            .context(setting)?;
        set_times(above, name, &level.stat).context(setting)
    }
}

/// An entry: an open directory, and the entry's name in it.
type Entry<'a> = (BorrowedFd<'a>, &'a CStr);

/// Copies an entry that is neither a directory nor a regular file, with the
/// metadata `stat`.
pub(super) fn copy_node(from: Entry<'_>, to: Entry<'_>, stat: &Stat) -> Result<()> {
    make_node(from, to, stat)?;
    set_all_attributes(&mut XattrBuffers::new(), from, to, stat)
}

fn make_node(from: Entry<'_>, to: Entry<'_>, stat: &Stat) -> Result<()> {
    let file_type = FileType::from_raw_mode(stat.st_mode);
    if file_type == FileType::Symlink {
        let target = readlinkat(from.0, from.1, Vec::new()).context(|| "read the symlink")?;
        return symlinkat(target, to.0, to.1).context(|| "create the symlink");
    }
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    mknodat(to.0, to.1, file_type, mode, stat.st_rdev)
        .context(|| "create the device node, pipe or socket")
}

/// The start and end of the next piece of data in a file, at or after `at`; holes
/// are skipped. If the file system does not report holes, the whole file is data.
fn next_data(file: &OwnedFd, at: u64, size: u64) -> Result<Option<(u64, u64)>> {
    let looking = || "look for holes in the file";
    if at >= size {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL) => return Ok(Some((at, size))),
        start => start.context(looking)?,
    };
    let end = seek(file, SeekFrom::Hole(start)).context(looking)?;
    Ok(Some((start, end.min(size))))
}

/// Sets the owner first, because a change of the owner clears set-id bits and
/// capabilities.
fn set_owner_and_mode(parent: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    chownat(parent, name, Some(uid), Some(gid), flags).context(|| "set the owner")?;
    // A link has no mode of its own. Every other entry was created by this
    // copy, so no link is followed.
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        chmodat(parent, name, mode, AtFlags::empty()).context(|| "set the mode")?;
    }
    Ok(())
}

fn set_times(parent: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> Result<()> {
    utimensat(parent, name, &times_of(stat), AtFlags::SYMLINK_NOFOLLOW).context(|| "set the times")
}

pub(super) fn times_of(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: stat.st_atime,
            tv_nsec: stat.st_atime_nsec.try_into().unwrap_or(0),
        },
        last_modification: Timespec {
            tv_sec: stat.st_mtime,
            tv_nsec: stat.st_mtime_nsec.try_into().unwrap_or(0),
        },
    }
}

/// Sets the owner, mode, extended attributes and times of an entry.
fn set_all_attributes(
    xattrs: &mut XattrBuffers,
    from: Entry<'_>,
    to: Entry<'_>,
    stat: &Stat,
) -> Result<()> {
    set_owner_and_mode(to.0, to.1, stat)?;
    xattrs.copy(&entry_path(from.0, from.1), &entry_path(to.0, to.1))?;
    set_times(to.0, to.1, stat)
}

fn link_name(stat: &Stat) -> String {
    format!("{}.{}", stat.st_dev, stat.st_ino)
}
