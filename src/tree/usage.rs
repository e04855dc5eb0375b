//! Counting what a tree takes.

use std::collections::HashSet;

use rustix::fd::AsFd;
use rustix::fs::{AtFlags, Dir, FileType, Stat, fstat, statat};
use rustix::io::Errno;

use super::{MAX_LEVELS, is_dot, open_directory, too_deep};
use crate::error::{Context, Result};
use crate::types::Usage;

/// What the tree below `top` takes, `top` itself included: allocated blocks of
/// 512 bytes × 512, and inodes, a hard-linked one once. What vanishes during
/// the walk is left out and no error. Follows containerd's
/// `continuity/fs/du_unix.go`.
///
/// # Errors
///
/// [`crate::error::ErrorKind::Internal`] if something there cannot be read.
pub fn count_usage(top: impl AsFd) -> Result<Usage> {
    let mut usage = Usage::default();
    // Only inodes with several names can be met twice.
    let mut linked = HashSet::new();
    let mut count = |stat: &Stat| {
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let is_first =
            is_directory || stat.st_nlink < 2 || linked.insert((stat.st_dev, stat.st_ino));
        if is_first {
            usage.inodes += 1;
            usage.size_bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
        }
        is_directory
    };
    let counting = || "count the usage of a directory tree";

    count(&fstat(&top).context(counting)?);
    let first = open_directory(&top, c".").context(counting)?;
    let mut pending = vec![Dir::new(first).context(counting)?];
    while let Some(dir) = pending.last_mut() {
        let Some(entry) = dir.read() else {
            pending.pop();
            continue;
        };
        let entry = match entry {
            Err(Errno::NOENT) => continue,
            entry => entry.context(counting)?,
        };
        let name = entry.file_name();
        if is_dot(name) {
            continue;
        }
        let parent = dir.fd().context(counting)?;
        let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            stat => stat.context(counting)?,
        };
        if !count(&stat) {
            continue;
        }
        match open_directory(parent, name) {
            // Gone, or another thing by now, or somebody's mount.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {}
            Ok(_) if pending.len() >= MAX_LEVELS => return Err(too_deep()),
            opened => {
                let below = Dir::new(opened.context(counting)?).context(counting)?;
                pending.push(below);
            }
        }
    }
    Ok(usage)
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
        let usage = count_usage(File::open(top).unwrap()).unwrap();
        assert_eq!(usage.inodes, 5);
        assert_eq!(usage.size_bytes, blocks * 512);
    }

    #[test]
    fn an_empty_directory_counts_itself() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            count_usage(File::open(dir.path()).unwrap()).unwrap().inodes,
            1
        );
    }
}
