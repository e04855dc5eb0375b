//! Visiting all entries of a tree. Directories and regular files are opened.

use std::ffi::CStr;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, statat};
use rustix::io::Errno;

use super::walk::Walk;
use super::{open_directory, open_file};
use crate::error::{Context, Result};

const VISITING: &str = "look through a directory tree";

/// An entry of the tree.
pub enum Visited<'a> {
    /// A directory, opened.
    Directory(BorrowedFd<'a>),
    /// A regular file, opened.
    File(BorrowedFd<'a>),
    /// A symlink or a node, which cannot be opened: its directory, and its name there.
    Node(BorrowedFd<'a>, &'a CStr),
}

/// Calls `each` for `top` and for everything below it, a directory before its
/// entries. Entries that vanish meanwhile are left out.
pub fn visit_open(top: impl AsFd, mut each: impl FnMut(Visited<'_>) -> Result<()>) -> Result<()> {
    let mut walk = Walk::begin(&top, VISITING)?;
    each(Visited::Directory(walk.parent()?))?;
    while let Some(entry) = walk.next()? {
        let (parent, name) = (walk.parent()?, entry.file_name());
        let opened = open(parent, name)
            .context(|| format!("look at {name:?}"))
            .context(|| VISITING)?;
        match opened {
            Opened::Directory(fd) => {
                each(Visited::Directory(fd.as_fd()))?;
                walk.enter(fd, name)?;
            }
            Opened::File(fd) => each(Visited::File(fd.as_fd()))?,
            Opened::Node => each(Visited::Node(parent, name))?,
            Opened::Gone => {}
        }
    }
    Ok(())
}

enum Opened {
    Directory(OwnedFd),
    File(OwnedFd),
    Node,
    /// The entry is gone, was replaced, or is a mount point.
    Gone,
}

/// Opens a directory or a regular file. Other types are not opened, because that could
/// block or have side effects.
fn open(parent: BorrowedFd<'_>, name: &CStr) -> std::result::Result<Opened, Errno> {
    let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(Opened::Gone),
        stat => stat?,
    };
    let opened = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => open_directory(parent, name).map(Opened::Directory),
        FileType::RegularFile => open_file(parent, name)
            .map(|found| found.map_or(Opened::Gone, |(fd, _)| Opened::File(fd))),
        _ => return Ok(Opened::Node),
    };
    match opened {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => Ok(Opened::Gone),
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::Duration;

    use rustix::fs::{CWD, Mode, OFlags, RenameFlags, fstat, mknodat, open, renameat_with};

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
        mknodat(CWD, top.join("a/pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        let (mut seen, mut nodes) = (Vec::new(), Vec::new());
        visit_open(File::open(&top).unwrap(), |visited| {
            match visited {
                Visited::Directory(fd) => seen.push((fstat(fd).unwrap().st_ino, true)),
                Visited::File(fd) => seen.push((fstat(fd).unwrap().st_ino, false)),
                Visited::Node(parent, name) => {
                    nodes.push((fstat(parent).unwrap().st_ino, name.to_owned()));
                }
            }
            Ok(())
        })
        .unwrap();
        let inode = |path: &str| fstat(File::open(top.join(path)).unwrap()).unwrap().st_ino;
        assert_eq!(seen[..2], [(inode("."), true), (inode("a"), true)]);
        assert_eq!(seen.len(), 4, "{seen:?}");
        assert!(seen.contains(&(inode("a/b"), true)));
        assert!(seen.contains(&(inode("a/file"), false)));
        nodes.sort();
        let mut expected = [("a", c"link"), ("a", c"pipe"), ("a/b", c"link")]
            .map(|(directory, name)| (inode(directory), name.to_owned()));
        expected.sort();
        assert_eq!(nodes, expected);
    }

    #[test]
    fn what_takes_the_place_of_a_file_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let (file, pipe) = (dir.path().join("a"), dir.path().join("b"));
        fs::write(&file, "").unwrap();
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR, 0).unwrap();
        let kept = dir.path().with_extension("pipe");
        fs::hard_link(&pipe, &kept).unwrap();
        let was_opened = AtomicBool::new(false);
        let is_done = AtomicBool::new(false);
        let mut files = 0;
        thread::scope(|scope| {
            scope.spawn(|| {
                // Waits until the pipe is opened to be read, for however short a time.
                File::create(&kept).unwrap();
                was_opened.store(true, Ordering::Relaxed);
            });
            scope.spawn(|| {
                while !is_done.load(Ordering::Relaxed) {
                    renameat_with(CWD, &file, CWD, &pipe, RenameFlags::EXCHANGE).unwrap();
                }
            });
            for _ in 0..5_000 {
                visit_open(File::open(dir.path()).unwrap(), |visited| {
                    files += u64::from(matches!(visited, Visited::File(_)));
                    Ok(())
                })
                .unwrap();
            }
            is_done.store(true, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(50));
            let opened = was_opened.load(Ordering::Relaxed);
            // Lets the first thread end.
            let flags = OFlags::RDONLY | OFlags::NONBLOCK;
            let _reader = open(&kept, flags, Mode::empty()).unwrap();
            assert!(!opened, "the pipe was opened");
        });
        fs::remove_file(&kept).unwrap();
        assert!(files > 1_000, "{files}");
    }
}
