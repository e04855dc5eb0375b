//! A digest of everything in a tree that [`super::compare_trees`] compares: two trees
//! without differences have the same digest. For hard links, only the number of names
//! counts.
//!
//! The digests of the entries are added up, so their order on the disk does not matter,
//! and nothing has to be sorted or kept in memory.

use std::ffi::CString;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fd::AsFd;
use rustix::fs::{Advice, AtFlags, FileType, Stat, fadvise, readlinkat, statat};

use super::compare::{CHUNK_BYTES, Name, Rules, cancelled, read_full};
use super::walk::Walk;
use super::{open_directory, open_file};
use crate::error::{Context, Error, Result};
use crate::util::sha256::Sha256;

const READING: &str = "read a layer";

/// Where a digest takes the bytes of files from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadFrom {
    /// The bytes come from the disk, because the kernel's copy of a file in memory may be
    /// sound when the bytes on the disk are not.
    Disk,
    /// The bytes come from the kernel's memory if they are there, otherwise from the disk.
    CacheFirst,
}

/// Computes the digest of the tree `top`, including the directory `top` itself, as
/// hexadecimal digits. Ends early once `cancel` is set.
///
/// # Errors
///
/// [`ErrorKind::Cancelled`](crate::error::ErrorKind::Cancelled) if `cancel` was set.
pub fn digest_tree(
    top: impl AsFd,
    is_lowest: bool,
    from: ReadFrom,
    cancel: &AtomicBool,
) -> Result<String> {
    let mut digest = Digest {
        rules: Rules {
            since: i64::MAX,
            is_lowest,
        },
        from,
        cancel,
        sum: [0; 8],
        buffer: vec![0; CHUNK_BYTES],
    };
    let mut walk = Walk::begin(&top, READING)?;
    let mut path: Vec<CString> = Vec::new();
    digest.entry(&path, (top.as_fd(), c"."))?;
    loop {
        let Some(entry) = walk.next_here()? else {
            if path.pop().is_none() {
                let words = digest.sum.map(|word| format!("{word:08x}"));
                return Ok(words.concat());
            }
            if !walk.leave()? {
                let what = "a directory of a layer was moved while the layer was read";
                return Err(Error::data_loss(what));
            }
            continue;
        };
        let name = entry.file_name();
        path.push(name.to_owned());
        if digest.entry(&path, (walk.parent()?, name))? {
            let below = open_directory(walk.parent()?, name).context(|| READING)?;
            walk.enter(below, name)?;
        } else {
            path.pop();
        }
    }
}

struct Digest<'a> {
    rules: Rules,
    from: ReadFrom,
    cancel: &'a AtomicBool,
    /// The sum of the entries' digests, word by word.
    sum: [u32; 8],
    buffer: Vec<u8>,
}

impl Digest<'_> {
    /// Adds one entry, and returns whether it is a directory.
    fn entry(&mut self, path: &[CString], name: Name<'_>) -> Result<bool> {
        let reading = || format!("read {:?} in a layer", name.1);
        let stat = statat(name.0, name.1, AtFlags::SYMLINK_NOFOLLOW).context(reading)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let mut entry = Sha256::new();
        for part in path {
            entry.add(part.as_bytes_with_nul());
        }
        add_numbers(&mut entry, &stat, path.is_empty());
        for (name, value) in self.rules.xattrs(name).context(reading)? {
            add_counted(&mut entry, &name);
            add_counted(&mut entry, &value);
        }
        match kind {
            FileType::Symlink => {
                let target = readlinkat(name.0, name.1, Vec::new()).context(reading)?;
                add_counted(&mut entry, target.as_bytes());
            }
            FileType::RegularFile => self.bytes(&mut entry, name)?,
            _ => {}
        }
        for (sum, word) in self.sum.iter_mut().zip(entry.finish()) {
            *sum = sum.wrapping_add(word);
        }
        Ok(kind == FileType::Directory)
    }

    fn bytes(&mut self, entry: &mut Sha256, name: Name<'_>) -> Result<()> {
        let reading = || format!("read {:?} in a layer", name.1);
        let opened = open_file(name.0, name.1).context(reading)?;
        let replaced = || Error::data_loss("a file of a layer was replaced while it was read");
        let (file, _) = opened.ok_or_else(replaced)?;
        if self.from == ReadFrom::Disk {
            // The kernel drops its copy in memory, so the bytes are read from the disk.
            let _ = fadvise(&file, 0, None, Advice::DontNeed);
        }
        let mut offset = 0;
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(cancelled());
            }
            let length = read_full(&file, &mut self.buffer, offset).context(reading)?;
            entry.add(&self.buffer[..length]);
            if length < CHUNK_BYTES {
                return Ok(());
            }
            offset += CHUNK_BYTES as u64;
        }
    }
}

/// Adds the values of stat(2) that are the same for all exact copies of an
/// entry.
#[allow(clippy::unnecessary_cast)] // their widths differ among architectures
fn add_numbers(entry: &mut Sha256, stat: &Stat, is_top: bool) {
    let kind = FileType::from_raw_mode(stat.st_mode);
    let is_directory = kind == FileType::Directory;
    let numbers = [
        stat.st_mode as u64,
        stat.st_uid as u64,
        stat.st_gid as u64,
        stat.st_rdev as u64,
        if is_top { 0 } else { stat.st_mtime as u64 },
        if is_directory {
            0
        } else {
            stat.st_nlink as u64
        },
        if kind == FileType::RegularFile {
            stat.st_size as u64
        } else {
            0
        },
    ];
    for number in numbers {
        entry.add(&number.to_be_bytes());
    }
}

fn add_counted(entry: &mut Sha256, bytes: &[u8]) {
    entry.add(&(bytes.len() as u64).to_be_bytes());
    entry.add(bytes);
}
