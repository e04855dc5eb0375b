//! Reading the entries of a tree, one directory after another.

use std::collections::VecDeque;
use std::ffi::{CStr, CString};

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Dir, DirEntry, SeekFrom, fstat, seek};
use rustix::io::Errno;

use super::{MAX_LEVELS, open_directory, too_deep};
use crate::error::{Context, Result};
use crate::util::entries::is_own;

/// How many directories a walk holds open. With this limit, several walks at the same
/// time and everything else in the daemon need less than 256 descriptors.
const MAX_OPEN: usize = 24;

/// A device and an inode.
pub(super) type Inode = (u64, u64);

/// The open directories of a walk, each one an entry of the one before. The walk
/// enters only the directories that are passed to [`Walk::enter`].
pub(super) struct Walk {
    doing: &'static str,
    top: OwnedFd,
    /// The outer directories, which were closed to save descriptors, the top first. They
    /// are opened again on the way back.
    closed: Vec<Closed>,
    open: VecDeque<Level>,
}

struct Level {
    dir: Dir,
    /// The directory's name in its parent.
    name: CString,
    /// The position after the last entry that was read (getdents(2), `d_off`).
    offset: i64,
}

struct Closed {
    inode: Inode,
    name: CString,
    offset: i64,
}

impl Walk {
    /// Begins with the entries of `top`, which is opened again. `doing` describes the
    /// walk in errors.
    pub(super) fn begin(top: impl AsFd, doing: &'static str) -> Result<Walk> {
        let open = || open_directory(&top, c".").context(|| doing);
        let mut walk = Walk {
            doing,
            top: open()?,
            closed: Vec::new(),
            open: VecDeque::new(),
        };
        walk.enter(open()?, c".")?;
        Ok(walk)
    }

    /// The next entry of the walk: of the directory entered last, or of one above it.
    /// Directories that were moved meanwhile, and cannot be found again, are left out.
    pub(super) fn next(&mut self) -> Result<Option<DirEntry>> {
        while !self.open.is_empty() {
            if let Some(entry) = self.next_here()? {
                return Ok(Some(entry));
            }
            if !self.leave()? {
                self.descend_again()?;
            }
        }
        Ok(None)
    }

    /// The next entry of the directory entered last; `None` at its end.
    pub(super) fn next_here(&mut self) -> Result<Option<DirEntry>> {
        let Some(level) = self.open.back_mut() else {
            return Ok(None);
        };
        loop {
            match level.dir.find(is_own) {
                None => return Ok(None),
                // The directory was removed while it was read.
                Some(Err(Errno::NOENT)) => {}
                Some(entry) => {
                    let entry = entry.context(|| self.doing)?;
                    level.offset = entry.offset();
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// The directory that contains the last entry: the one that was entered last.
    pub(super) fn parent(&self) -> Result<BorrowedFd<'_>> {
        let dir = self.open.back().ok_or(Errno::BADF);
        dir.and_then(|level| level.dir.fd()).context(|| self.doing)
    }

    /// Enters a directory, which is the entry `name` of the directory entered last.
    pub(super) fn enter(&mut self, directory: OwnedFd, name: &CStr) -> Result<()> {
        if self.closed.len() + self.open.len() >= MAX_LEVELS {
            return Err(too_deep());
        }
        if self.open.len() == MAX_OPEN
            && let Some(Level { dir, name, offset }) = self.open.pop_front()
        {
            let inode = dir.fd().and_then(inode_of).context(|| self.doing)?;
            self.closed.push(Closed {
                inode,
                name,
                offset,
            });
        }
        self.open.push_back(Level {
            dir: Dir::new(directory).context(|| self.doing)?,
            name: name.to_owned(),
            offset: 0,
        });
        Ok(())
    }

    /// Returns to the position in the directory above. Returns `false` if that directory
    /// was closed and cannot be reached any more, because the directory entered last was
    /// moved.
    pub(super) fn leave(&mut self) -> Result<bool> {
        let left = self.open.pop_back();
        let (Some(left), true, Some(above)) = (left, self.open.is_empty(), self.closed.last())
        else {
            return Ok(true);
        };
        let found = left.dir.fd().and_then(|fd| open_as(fd, c"..", above.inode));
        match found.context(|| self.doing)? {
            None => Ok(false),
            Some(fd) => self.resume(fd).map(|()| true),
        }
    }

    /// Goes down from the top to the last of the closed directories, or as far as they
    /// still are in their places.
    fn descend_again(&mut self) -> Result<()> {
        let mut fd = open_directory(&self.top, c".").context(|| self.doing)?;
        let mut reached = 1;
        for level in self.closed.iter().skip(1) {
            match open_as(&fd, &level.name, level.inode).context(|| self.doing)? {
                None => break,
                Some(below) => fd = below,
            }
            reached += 1;
        }
        self.closed.truncate(reached);
        self.resume(fd)
    }

    /// Continues in the last of the closed directories, opened again as `fd`.
    fn resume(&mut self, fd: OwnedFd) -> Result<()> {
        let Some(Closed { name, offset, .. }) = self.closed.pop() else {
            return Ok(());
        };
        seek(&fd, SeekFrom::Start(offset.cast_unsigned())).context(|| self.doing)?;
        let dir = Dir::new(fd).context(|| self.doing)?;
        self.open.push_back(Level { dir, name, offset });
        Ok(())
    }
}

/// Opens the directory `name` if it is this inode. Returns `None` if the name is
/// missing, or is another inode.
pub(super) fn open_as(
    parent: impl AsFd,
    name: &CStr,
    inode: Inode,
) -> std::result::Result<Option<OwnedFd>, Errno> {
    match open_directory(parent, name) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => Ok(None),
        opened => {
            let opened = opened?;
            let is_it = inode_of(&opened)? == inode;
            Ok(is_it.then_some(opened))
        }
    }
}

pub(super) fn inode_of(fd: impl AsFd) -> std::result::Result<Inode, Errno> {
    let stat = fstat(fd)?;
    #[allow(clippy::unnecessary_cast)] // their widths differ among architectures
    Ok((stat.st_dev as u64, stat.st_ino as u64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs::{self, File};

    use rustix::fs::{CWD, Mode, OFlags, mkdirat, open, renameat};

    use super::*;

    /// Creates nested directories `d`, and in each of them this many files.
    fn chain(top: &std::path::Path, levels: usize, files: usize) {
        let mut at = OwnedFd::from(File::open(top).unwrap());
        for level in 0..levels {
            for number in 0..files {
                let flags = OFlags::CREATE | OFlags::WRONLY;
                let name = format!("{level}.{number}");
                rustix::fs::openat(&at, name, flags, Mode::RUSR).unwrap();
            }
            mkdirat(&at, c"d", Mode::RWXU).unwrap();
            at = open_directory(&at, c"d").unwrap();
        }
    }

    #[test]
    fn each_entry_is_met_once_however_deep_with_few_descriptors() {
        const LEVELS: usize = MAX_LEVELS - 1;
        let dir = tempfile::tempdir().unwrap();
        chain(dir.path(), LEVELS, 3);
        let mut walk = Walk::begin(File::open(dir.path()).unwrap(), "test").unwrap();
        let (mut met, mut most_open) = (BTreeMap::<CString, u32>::new(), 0);
        while let Some(entry) = walk.next().unwrap() {
            *met.entry(entry.file_name().to_owned()).or_default() += 1;
            if entry.file_name() == c"d" {
                let below = open_directory(walk.parent().unwrap(), c"d").unwrap();
                walk.enter(below, c"d").unwrap();
            }
            most_open = most_open.max(walk.open.len());
        }
        assert_eq!(met.remove(c"d"), Some(LEVELS as u32));
        assert_eq!(met.len(), 3 * LEVELS);
        assert!(met.values().all(|times| *times == 1));
        assert_eq!(most_open, MAX_OPEN);
        // The tree is deeper than the standard library can delete.
        super::super::remove_children(File::open(dir.path()).unwrap()).unwrap();
    }

    #[test]
    fn what_is_moved_away_meanwhile_leads_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let (top, outside) = (dir.path().join("top"), dir.path().join("outside"));
        fs::create_dir(&top).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), "").unwrap();
        chain(&top, 2 * MAX_OPEN, 1);
        let mut walk = Walk::begin(File::open(&top).unwrap(), "test").unwrap();
        let mut met = Vec::new();
        while let Some(entry) = walk.next().unwrap() {
            met.push(entry.file_name().to_string_lossy().into_owned());
            if entry.file_name() != c"d" {
                continue;
            }
            let below = open_directory(walk.parent().unwrap(), c"d").unwrap();
            walk.enter(below, c"d").unwrap();
            if walk.closed.len() == MAX_OPEN {
                // The walk holds a directory below the moved one open, and returns from there.
                let at = |depth| top.join(vec!["d"; depth].join("/"));
                let parent = open(at(MAX_OPEN / 2), OFlags::DIRECTORY, Mode::empty()).unwrap();
                renameat(&parent, c"d", CWD, outside.join("moved")).unwrap();
            }
        }
        met.sort();
        assert!(!met.contains(&"secret".to_owned()), "{met:?}");
        // The directories that were not moved were read to their end, and once.
        for level in 0..=MAX_OPEN / 2 {
            let name = format!("{level}.0");
            assert_eq!(
                met.iter().filter(|other| **other == name).count(),
                1,
                "{name}"
            );
        }
    }
}
