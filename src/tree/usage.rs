//! Counting what a tree takes.

use std::collections::HashSet;

use rustix::fd::AsFd;
use rustix::fs::{AtFlags, FileType, Stat, fstat, statat};
use rustix::io::Errno;

use super::open_directory;
use super::walk::Walk;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::types::Content;

const COUNTING: &str = "count what a directory tree holds";

/// What the tree below `top` holds, `top` itself included: allocated blocks of
/// 512 bytes × 512, and inodes, a hard-linked one once, which follows
/// containerd's `continuity/fs/du_unix.go`; and the lengths of its files. What
/// vanishes during the walk is left out and no error.
///
/// # Errors
///
/// [`crate::error::ErrorKind::Internal`] if something there cannot be read.
pub fn count(top: impl AsFd) -> Result<Content> {
    count_unless(top, || false)
}

/// The same, unless `is_given_up` says that nobody waits for it any more; asked
/// now and then.
///
/// # Errors
///
/// As of [`count`]; [`ErrorKind::Cancelled`] if it was given up.
pub fn count_unless(top: impl AsFd, is_given_up: impl Fn() -> bool) -> Result<Content> {
    /// Between two questions.
    const ENTRIES: u64 = 256;
    let mut entries: u64 = 0;
    let mut content = Content::default();
    // Only inodes with several names can be met twice.
    let mut linked = HashSet::new();
    let mut add = |stat: &Stat| {
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let is_directory = file_type == FileType::Directory;
        let is_first =
            is_directory || stat.st_nlink < 2 || linked.insert((stat.st_dev, stat.st_ino));
        if is_first {
            content.usage.inodes += 1;
            content.usage.size_bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
            if file_type == FileType::RegularFile {
                content.data_bytes += u64::try_from(stat.st_size).unwrap_or(0);
            }
        }
        is_directory
    };
    add(&fstat(&top).context(|| COUNTING)?);
    let mut walk = Walk::begin(&top, COUNTING)?;
    while let Some(entry) = walk.next()? {
        entries += 1;
        if entries.is_multiple_of(ENTRIES) && is_given_up() {
            return Err(Error::new(
                ErrorKind::Cancelled,
                "nobody waits for the count any more",
            ));
        }
        let (parent, name) = (walk.parent()?, entry.file_name());
        let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            stat => stat.context(|| COUNTING)?,
        };
        if !add(&stat) {
            continue;
        }
        match open_directory(parent, name) {
            // Gone, or another thing by now, or somebody's mount.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {}
            opened => walk.enter(opened.context(|| COUNTING)?)?,
        }
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn counts_blocks_and_each_inode_once() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path();
        fs::create_dir_all(top.join("a/b")).unwrap();
        fs::write(top.join("a/file"), vec![1; 100_000]).unwrap();
        fs::hard_link(top.join("a/file"), top.join("a/b/same")).unwrap();
        // Neither followed nor counted as what it points to.
        symlink("/", top.join("a/root")).unwrap();
        let paths = ["", "a", "a/b", "a/file", "a/root"];
        let blocks: u64 = paths
            .iter()
            .map(|path| fs::symlink_metadata(top.join(path)).unwrap().blocks())
            .sum();
        let content = count(File::open(top).unwrap()).unwrap();
        assert_eq!(content.usage.inodes, 5);
        assert_eq!(content.usage.size_bytes, blocks * 512);
        assert_eq!(content.data_bytes, 100_000);
    }

    #[test]
    fn a_count_that_nobody_waits_for_ends() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..1000 {
            fs::write(dir.path().join(number.to_string()), "").unwrap();
        }
        let asked = std::cell::Cell::new(0);
        let error = count_unless(File::open(dir.path()).unwrap(), || {
            asked.set(asked.get() + 1);
            asked.get() == 2
        })
        .unwrap_err();
        assert_eq!((error.kind(), asked.get()), (ErrorKind::Cancelled, 2));
    }

    #[test]
    fn an_empty_directory_counts_itself() {
        let dir = tempfile::tempdir().unwrap();
        let content = count(File::open(dir.path()).unwrap()).unwrap();
        assert_eq!((content.usage.inodes, content.data_bytes), (1, 0));
    }
}
