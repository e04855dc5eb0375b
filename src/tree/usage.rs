//! Counting the bytes and inodes of a tree.

use std::collections::HashSet;
use std::ffi::CStr;

use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{AtFlags, FileType, Stat, fstat, readlinkat, statat};
use rustix::io::Errno;

use super::open_directory;
use super::walk::Walk;
use super::xattrs::{XattrBuffers, entry_path};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::types::{Content, Marks};

const COUNTING: &str = "count the bytes and inodes of a directory tree";

/// Counts the tree `top`, including the directory itself: allocated blocks of 512
/// bytes × 512, inodes (as in containerd's `continuity/fs/du_unix.go`, a hard-linked
/// inode counts once), and the lengths of files. Entries that vanish during the walk
/// are left out. The memory that the count takes does not depend on the tree.
pub fn count(top: impl AsFd) -> Result<Content> {
    count_unless(top, || false)
}

/// Like [`count`], but calls `is_given_up` from time to time, and ends early if it
/// returns `true`.
///
/// # Errors
///
/// [`ErrorKind::Cancelled`] if the count was given up.
pub fn count_unless(top: impl AsFd, is_given_up: impl Fn() -> bool) -> Result<Content> {
    count_with(top, is_given_up, |_, _, _| Ok(()))
}

/// Like [`count`], and also collects the [`Marks`] of a layer.
pub fn count_layer(top: impl AsFd) -> Result<Content> {
    let mut xattrs = XattrBuffers::new();
    let mut marks = Marks {
        attributes: 0,
        is_hollow: true,
    };
    let content = count_with(
        &top,
        || false,
        |parent, name, stat| {
            let found = match xattrs.count(&entry_path(parent, name)) {
                // The entry is gone.
                Err(_) if is_gone(parent, name) => {
                    return Ok(());
                }
                found => found.context(|| COUNTING)?,
            };
            marks.attributes = marks.attributes.saturating_add(found.count);
            marks.is_hollow &= !found.has_mark && is_hollow(parent, name, stat);
            Ok(())
        },
    )?;
    Ok(Content {
        marks: Some(marks),
        ..content
    })
}

fn is_gone(parent: BorrowedFd<'_>, name: &CStr) -> bool {
    matches!(
        statat(parent, name, AtFlags::SYMLINK_NOFOLLOW),
        Err(Errno::NOENT)
    )
}

/// Whether an entry is one of those that Docker makes in the layer between an image and
/// its container: an empty file or directory to be mounted upon, or a link to a file in
/// /proc.
fn is_hollow(parent: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> bool {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => true,
        FileType::RegularFile => stat.st_size == 0,
        FileType::Symlink => readlinkat(parent, name, Vec::new())
            .is_ok_and(|target| target.to_bytes().starts_with(b"/proc/")),
        _ => false,
    }
}

fn count_with(
    top: impl AsFd,
    is_given_up: impl Fn() -> bool,
    mut examine: impl FnMut(BorrowedFd<'_>, &CStr, &Stat) -> Result<()>,
) -> Result<Content> {
    /// How many entries are counted between two calls of `is_given_up`.
    const ENTRIES: u64 = 256;
    let mut entries: u64 = 0;
    let mut tally = Count::new(MOST_REMEMBERED);
    let own = fstat(&top).context(|| COUNTING)?;
    tally.add(&own);
    examine(top.as_fd(), c".", &own)?;
    let mut walk = Walk::begin(&top, COUNTING)?;
    while let Some(entry) = walk.next()? {
        entries += 1;
        if entries.is_multiple_of(ENTRIES) && is_given_up() {
            return Err(Error::new(
                ErrorKind::Cancelled,
                "the count was given up, because no request waits for it any more",
            ));
        }
        let (parent, name) = (walk.parent()?, entry.file_name());
        let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            stat => stat.context(|| COUNTING)?,
        };
        if tally.add(&stat) {
            examine(parent, name, &stat)?;
        }
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            continue;
        }
        match open_directory(parent, name) {
            // The directory is gone, was replaced, or is a mount point.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {}
            opened => walk.enter(opened.context(|| COUNTING)?, name)?,
        }
    }
    Ok(tally.total())
}

/// How many inodes with several names are remembered. A container can create any
/// number of them; a set of this size takes less than 8 MiB, even while it grows.
const MOST_REMEMBERED: usize = 200_000;

/// The sums of the entries that were counted so far.
struct Count {
    content: Content,
    /// Inodes with several names that were counted in full.
    remembered: HashSet<(u64, u64)>,
    most_remembered: usize,
    /// The fractions of inodes that are not in `remembered`. Each name of such an inode
    /// counts as a part of it: a third if it has three names. The sum is exact if all names
    /// are in the tree.
    shares: Shares,
}

/// Sums of fractions of inodes, in units of 2^-32.
#[derive(Default)]
struct Shares {
    inodes: u128,
    size_bytes: u128,
    data_bytes: u128,
}

impl Count {
    fn new(most_remembered: usize) -> Count {
        Count {
            content: Content::default(),
            remembered: HashSet::new(),
            most_remembered,
            shares: Shares::default(),
        }
    }

    /// Returns whether the inode, or this name's share of it, has to be counted.
    fn add(&mut self, stat: &Stat) -> bool {
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let size_bytes = u64::try_from(stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512);
        let data_bytes = match file_type {
            FileType::RegularFile => u64::try_from(stat.st_size).unwrap_or(0),
            _ => 0,
        };
        let inode = (stat.st_dev, stat.st_ino);
        if file_type != FileType::Directory && stat.st_nlink > 1 {
            if self.remembered.contains(&inode) {
                return false;
            }
            if self.remembered.len() >= self.most_remembered {
                let share = |whole: u64| (u128::from(whole) << 32) / u128::from(stat.st_nlink);
                self.shares.inodes += share(1);
                self.shares.size_bytes += share(size_bytes);
                self.shares.data_bytes += share(data_bytes);
                return true;
            }
            self.remembered.insert(inode);
        }
        self.add_whole(1, size_bytes, data_bytes);
        true
    }

    /// Adds to the sums, up to the highest number that the database can record, because
    /// sparse files can have any length.
    fn add_whole(&mut self, inodes: u64, size_bytes: u64, data_bytes: u64) {
        let Content {
            usage,
            data_bytes: data,
            marks: _,
        } = &mut self.content;
        for (sum, more) in [
            (&mut usage.inodes, inodes),
            (&mut usage.size_bytes, size_bytes),
            (data, data_bytes),
        ] {
            *sum = sum.saturating_add(more).min(i64::MAX.unsigned_abs());
        }
    }

    fn total(mut self) -> Content {
        let rounded = |sum: u128| u64::try_from((sum + (1 << 31)) >> 32).unwrap_or(u64::MAX);
        let Shares {
            inodes,
            size_bytes,
            data_bytes,
        } = self.shares;
        self.add_whole(rounded(inodes), rounded(size_bytes), rounded(data_bytes));
        self.content
    }
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
        // This link must be neither followed nor counted as its target.
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
    fn more_linked_inodes_than_are_remembered_are_counted_once() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..40 {
            let file = dir.path().join(format!("{number} 0"));
            fs::write(&file, vec![1; 1000 * number]).unwrap();
            for link in 1..1 + number % 7 {
                fs::hard_link(&file, dir.path().join(format!("{number} {link}"))).unwrap();
            }
        }
        let counted = |most_remembered| {
            let mut tally = Count::new(most_remembered);
            for entry in fs::read_dir(dir.path()).unwrap() {
                tally.add(&rustix::fs::stat(entry.unwrap().path()).unwrap());
            }
            tally.total()
        };
        let exact = counted(usize::MAX);
        assert_eq!(exact.usage.inodes, 40);
        for most_remembered in [0, 1, 17] {
            assert_eq!(counted(most_remembered), exact, "{most_remembered}");
        }
    }

    #[test]
    fn lengths_add_up_to_no_more_than_can_be_recorded() {
        let dir = tempfile::tempdir().unwrap();
        let mut stat = rustix::fs::stat(dir.path()).unwrap();
        stat.st_mode = FileType::RegularFile.as_raw_mode();
        stat.st_size = i64::MAX;
        for (most_remembered, st_nlink) in [(0, 1), (1, 2), (0, 2)] {
            stat.st_nlink = st_nlink;
            let mut tally = Count::new(most_remembered);
            for st_ino in 0..5 {
                stat.st_ino = st_ino;
                tally.add(&stat);
            }
            assert_eq!(tally.total().data_bytes, i64::MAX.unsigned_abs());
        }
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
