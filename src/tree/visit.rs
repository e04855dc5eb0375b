//! Visiting what a tree holds, opened one by one.

use std::ffi::CStr;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, fstat, openat, statat};
use rustix::io::Errno;

use super::open_directory;
use super::walk::Walk;
use crate::error::{Context, Result};

const VISITING: &str = "look through a directory tree";

/// Shows `each` directory and each regular file below `top`, and `top` itself
/// first, as an open one, a directory before what is in it. What vanishes
/// meanwhile is left out; so are links and nodes, which cannot be opened as what
/// they are.
///
/// # Errors
///
/// As of the disk, and the first one of `each`.
pub fn visit_open(
    top: impl AsFd,
    mut each: impl FnMut(BorrowedFd<'_>, FileType) -> Result<()>,
) -> Result<()> {
    let mut walk = Walk::begin(&top, VISITING)?;
    each(walk.parent()?, FileType::Directory)?;
    while let Some(entry) = walk.next()? {
        match open_known(walk.parent()?, entry.file_name()).context(|| VISITING)? {
            Some((fd, FileType::Directory)) => {
                each(fd.as_fd(), FileType::Directory)?;
                walk.enter(fd)?;
            }
            Some((fd, file_type)) => each(fd.as_fd(), file_type)?,
            None => {}
        }
    }
    Ok(())
}

/// Opens a directory or a regular file; `None` for anything else, which may block
/// or do things when it is opened.
fn open_known(
    parent: BorrowedFd<'_>,
    name: &CStr,
) -> std::result::Result<Option<(OwnedFd, FileType)>, Errno> {
    let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(None),
        stat => stat?,
    };
    let opened = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => open_directory(parent, name),
        FileType::RegularFile => {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            openat(parent, name, flags, Mode::empty())
        }
        _ => return Ok(None),
    };
    match opened {
        // Gone, or another thing by now, or somebody's mount.
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::NXIO) => Ok(None),
        Err(errno) => Err(errno),
        Ok(fd) => {
            let file_type = FileType::from_raw_mode(fstat(&fd)?.st_mode);
            let is_known = matches!(file_type, FileType::Directory | FileType::RegularFile);
            Ok(is_known.then_some((fd, file_type)))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn files_and_directories_are_visited_and_nothing_outside() {
        let dir = tempfile::tempdir().unwrap();
        let (top, outside) = (dir.path().join("top"), dir.path().join("outside"));
        fs::create_dir_all(top.join("a/b")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "x").unwrap();
        fs::write(top.join("a/file"), "x").unwrap();
        symlink(&outside, top.join("a/link")).unwrap();
        symlink(outside.join("file"), top.join("a/b/link")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            top.join("a/pipe"),
            FileType::Fifo,
            Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let mut seen = Vec::new();
        visit_open(File::open(&top).unwrap(), |fd, file_type| {
            seen.push((fstat(fd).unwrap().st_ino, file_type));
            Ok(())
        })
        .unwrap();
        let inode = |path: &str| fstat(File::open(top.join(path)).unwrap()).unwrap().st_ino;
        assert_eq!(
            seen[..2],
            [
                (inode("."), FileType::Directory),
                (inode("a"), FileType::Directory)
            ]
        );
        assert_eq!(seen.len(), 4, "{seen:?}");
        assert!(seen.contains(&(inode("a/b"), FileType::Directory)));
        assert!(seen.contains(&(inode("a/file"), FileType::RegularFile)));
    }
}
