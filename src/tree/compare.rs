//! Comparing a tree with the tree that it should be equal to.
//!
//! The comparison covers types, modes, owners, modification times (in seconds), lengths,
//! targets of links, device numbers, extended attributes, whiteouts, opaque marks, hard
//! links, and every byte. The memory for it depends on the depth of the tree and, up to a
//! limit, on the number of its hard links.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::fmt::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::buffer::spare_capacity;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{
    Advice, AtFlags, FileType, Stat, fadvise, fstat, lgetxattr, llistxattr, readlinkat, statat,
};
use rustix::io::{Errno, pread};

use super::walk::{Inode, Walk, inode_of, open_as};
use super::xattrs::{MAX_XATTR_BYTES, entry_path};
use super::{open_directory, open_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::types::Quoted;
use crate::util::entries::entries;

const COMPARING: &str = "compare a directory tree";

/// How many differences are described. [`Differences::count`] includes the further ones.
const MOST_DESCRIBED: usize = 20;
/// How many inodes with several names are remembered in each tree. For further inodes,
/// only the numbers of names are compared.
const MOST_REMEMBERED: usize = 200_000;
pub(super) const CHUNK_BYTES: usize = 1 << 20;

/// The differences between a tree and the tree that it should be equal to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// How many entries differ. A directory that is missing, or that should not be there,
    /// counts once; its entries are not counted.
    pub count: u64,
    /// Descriptions of the first differences: the path, and what is wrong
    /// there.
    pub first: Vec<String>,
}

impl Differences {
    /// A difference that concerns the whole tree.
    pub fn whole(what: impl Into<String>) -> Differences {
        Differences {
            count: 1,
            first: vec![what.into()],
        }
    }
}

impl fmt::Display for Differences {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 5;
        let shown = &self.first[..self.first.len().min(SHOWN)];
        out.write_str(&shown.join("; "))?;
        match self.count.saturating_sub(shown.len() as u64) {
            0 => Ok(()),
            more => write!(out, "; and {more} more"),
        }
    }
}

/// Which differences the comparison ignores.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// When the unpack of the expected tree began, in seconds. The time of an entry is
    /// compared only if the expected time is earlier; a later time comes from the unpack.
    pub since: i64,
    /// Whether no layer is below the tree. If so, opaque marks of directories do not
    /// matter.
    pub is_lowest: bool,
}

/// Compares the tree `found` with the tree `expected`, including both top directories.
/// Ends early once `cancel` is set.
///
/// An entry that cannot be read in `found` counts as a difference.
///
/// # Errors
///
/// [`ErrorKind::Cancelled`] if the comparison was cancelled.
pub fn compare_trees(
    expected: impl AsFd,
    found: impl AsFd,
    rules: Rules,
    cancel: &AtomicBool,
) -> Result<Differences> {
    let mut comparison = Comparison {
        rules,
        cancel,
        differences: Differences::default(),
        path: Vec::new(),
        links: Links::default(),
        buffers: [vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]],
    };
    comparison.tree(expected.as_fd(), found.as_fd())?;
    Ok(comparison.differences)
}

struct Comparison<'a> {
    rules: Rules,
    cancel: &'a AtomicBool,
    differences: Differences,
    /// The path from the top to the current directory, as names.
    path: Vec<CString>,
    links: Links,
    buffers: [Vec<u8>; 2],
}

/// Which inode of one tree corresponds to which inode of the other, for inodes with
/// several names.
#[derive(Default)]
struct Links {
    found_of: HashMap<Inode, Inode>,
    expected_of: HashMap<Inode, Inode>,
}

/// An entry: an open directory, and the entry's name in it.
pub(super) type Name<'a> = (BorrowedFd<'a>, &'a CStr);

impl Comparison<'_> {
    fn tree(&mut self, expected: BorrowedFd<'_>, found: BorrowedFd<'_>) -> Result<()> {
        let mut walk = Walk::begin(expected, COMPARING)?;
        let stats = [fstat(expected), fstat(found)];
        let [expected_stat, found_stat] = stats.map(|stat| stat.context(|| COMPARING));
        let wrong = self.attributes(
            (expected, c"."),
            (found, c"."),
            &[expected_stat?, found_stat?],
            &mut String::new(),
        )?;
        if let Some(wrong) = wrong {
            self.note(None, &wrong);
        }
        let mut above: Vec<Inode> = Vec::new();
        let mut at = open_directory(found, c".").context(|| COMPARING)?;
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(cancelled());
            }
            let Some(entry) = walk.next_here()? else {
                self.additions(walk.parent()?, &at)?;
                let Some(inode) = above.pop() else {
                    return Ok(());
                };
                let back = open_as(&at, c"..", inode).context(|| COMPARING)?;
                at = back.ok_or_else(moved_meanwhile)?;
                self.path.pop();
                if !walk.leave()? {
                    return Err(moved_meanwhile());
                }
                continue;
            };
            let name = entry.file_name();
            if let Some((expected, found)) = self.entry((walk.parent()?, name), &at)? {
                above.push(inode_of(&at).context(|| COMPARING)?);
                self.path.push(name.to_owned());
                walk.enter(expected, name)?;
                at = found;
            }
        }
    }

    /// Compares one entry. If it is a directory in both trees, returns both directories, so
    /// that the caller enters them.
    fn entry(&mut self, expected: Name<'_>, found: &OwnedFd) -> Result<Option<(OwnedFd, OwnedFd)>> {
        let name = expected.1;
        let found = (found.as_fd(), name);
        let stat = statat(expected.0, name, AtFlags::SYMLINK_NOFOLLOW).context(|| COMPARING)?;
        let found_stat = match statat(found.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(errno) => return self.unreadable(name, errno).map(|()| None),
            Ok(found_stat) => found_stat,
        };
        let [kind, found_kind] = [&stat, &found_stat].map(kind_of);
        if kind != found_kind {
            let wrong = format!("is {found_kind} in the place of {kind}");
            self.note(Some(name), &wrong);
            return Ok(None);
        }
        let mut wrong = String::new();
        let attributes = self.attributes(expected, found, &[stat, found_stat], &mut wrong)?;
        if let Some(wrong) = attributes {
            self.note(Some(name), &wrong);
        }
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            return Ok(None);
        }
        let below = open_directory(expected.0, name).context(|| COMPARING)?;
        match open_directory(found.0, name) {
            Err(errno) => self.unreadable(name, errno).map(|()| None),
            Ok(found) => Ok(Some((below, found))),
        }
    }

    /// Lists how two entries of one type differ, apart from the entries of directories.
    fn attributes(
        &mut self,
        expected: Name<'_>,
        found: Name<'_>,
        stats: &[Stat; 2],
        wrong: &mut String,
    ) -> Result<Option<String>> {
        let [stat, found_stat] = stats;
        let is_top = expected.1 == c".";
        let mut add = |what: String| {
            let comma = if wrong.is_empty() { "" } else { ", " };
            let _ = write!(wrong, "{comma}{what}");
        };
        let owners = [stat, found_stat].map(|stat| (stat.st_uid, stat.st_gid));
        if owners[0] != owners[1] {
            let [(uid, gid), (found_uid, found_gid)] = owners;
            add(format!(
                "belongs to {found_uid}:{found_gid} in place of {uid}:{gid}"
            ));
        }
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let [mode, found_mode] = [stat, found_stat].map(|stat| stat.st_mode & 0o7777);
        if file_type != FileType::Symlink && mode != found_mode {
            add(format!("has mode {found_mode:o} in place of {mode:o}"));
        }
        // The archive has no entry for the top directory, so its time is that of the
        // unpack.
        if !is_top && stat.st_mtime < self.rules.since && stat.st_mtime != found_stat.st_mtime {
            add("has another modification time".to_owned());
        }
        if stat.st_rdev != found_stat.st_rdev {
            add("has another device number".to_owned());
        }
        if let Some(what) = self.links.compare(stat, found_stat) {
            add(what.to_owned());
        }
        let mut unreadable = |errno| cannot_read(errno).map(&mut add);
        let rules = self.rules;
        let names = rules.xattrs(expected).context(|| COMPARING)?;
        match rules.xattrs(found) {
            Err(errno) => unreadable(errno)?,
            Ok(found_names) if names != found_names => add(xattr_difference(&names, &found_names)),
            Ok(_) => {}
        }
        match file_type {
            FileType::Symlink => {
                let target =
                    readlinkat(expected.0, expected.1, Vec::new()).context(|| COMPARING)?;
                match readlinkat(found.0, found.1, Vec::new()) {
                    Err(errno) => cannot_read(errno).map(&mut add)?,
                    Ok(found) if found != target => add("is a link to another target".to_owned()),
                    Ok(_) => {}
                }
            }
            FileType::RegularFile if stat.st_size != found_stat.st_size => {
                let (found, right) = (found_stat.st_size, stat.st_size);
                add(format!("has {found} bytes in place of {right}"));
            }
            FileType::RegularFile => {
                if let Some(what) = self.bytes(expected, found)? {
                    add(what);
                }
            }
            _ => {}
        }
        Ok((!wrong.is_empty()).then(|| std::mem::take(wrong)))
    }

    /// Describes the first difference in the bytes of two files of the same
    /// length.
    fn bytes(&mut self, expected: Name<'_>, found: Name<'_>) -> Result<Option<String>> {
        let opened = open_file(expected.0, expected.1).context(|| COMPARING)?;
        let (expected, _) = opened.ok_or_else(moved_meanwhile)?;
        let found = match open_file(found.0, found.1) {
            Ok(opened) => opened.ok_or_else(moved_meanwhile)?.0,
            Err(errno) => return cannot_read(errno).map(Some),
        };
        // Drops the cached pages: the copy in memory may be sound when the
        // bytes on the disk are not.
        let _ = fadvise(&found, 0, None, Advice::DontNeed);
        let mut offset = 0;
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(cancelled());
            }
            let [right, other] = &mut self.buffers;
            let length = read_full(&expected, right, offset).context(|| COMPARING)?;
            match read_full(&found, &mut other[..], offset) {
                Err(errno) => return cannot_read(errno).map(Some),
                Ok(found_length) if right[..length] != other[..found_length] => {
                    let differs = |(one, other): (&u8, &u8)| one != other;
                    let at = right[..length].iter().zip(&other[..found_length]);
                    let at = at.into_iter().position(differs).unwrap_or(0) as u64;
                    return Ok(Some(format!("has other bytes, from {} on", offset + at)));
                }
                Ok(_) if length < CHUNK_BYTES => return Ok(None),
                Ok(_) => offset += CHUNK_BYTES as u64,
            }
        }
    }

    /// Notes the entries of the directory `found` that are missing in `expected`.
    fn additions(&mut self, expected: BorrowedFd<'_>, found: &OwnedFd) -> Result<()> {
        let listed = match entries(found) {
            Err(errno) => {
                let what = cannot_read(errno)?;
                self.note(None, &what);
                return Ok(());
            }
            Ok(listed) => listed,
        };
        for entry in listed {
            let entry = match entry {
                Err(errno) => {
                    let what = cannot_read(errno)?;
                    self.note(None, &what);
                    return Ok(());
                }
                Ok(entry) => entry,
            };
            let name = entry.file_name();
            match statat(expected, name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => self.note(Some(name), "should not be there"),
                stat => drop(stat.context(|| COMPARING)?),
            }
        }
        Ok(())
    }

    fn unreadable(&mut self, name: &CStr, errno: Errno) -> Result<()> {
        let what = match errno {
            Errno::NOENT => "is missing".to_owned(),
            errno => cannot_read(errno)?,
        };
        self.note(Some(name), &what);
        Ok(())
    }

    /// Notes what is wrong with an entry of the current directory, or with the
    /// directory itself.
    fn note(&mut self, name: Option<&CStr>, what: &str) {
        self.differences.count += 1;
        if self.differences.first.len() < MOST_DESCRIBED {
            let names = self.path.iter().map(CString::as_c_str).chain(name);
            let names: Vec<_> = names.map(CStr::to_string_lossy).collect();
            let path = format!("/{}", names.join("/"));
            let what = format!("{} {what}", Quoted(&path));
            self.differences.first.push(what);
        }
    }
}

impl Links {
    fn compare(&mut self, stat: &Stat, found: &Stat) -> Option<&'static str> {
        let is_linked = |stat: &Stat| {
            FileType::from_raw_mode(stat.st_mode) != FileType::Directory && stat.st_nlink > 1
        };
        if !is_linked(stat) && !is_linked(found) {
            return None;
        }
        #[allow(clippy::unnecessary_cast)] // their widths differ among architectures
        let [expected, other] = [stat, found].map(|stat| (stat.st_dev as u64, stat.st_ino as u64));
        if self.found_of.len() >= MOST_REMEMBERED && !self.found_of.contains_key(&expected) {
            let is_same = stat.st_nlink == found.st_nlink;
            return (!is_same).then_some("has another number of hard links");
        }
        let known = *self.found_of.entry(expected).or_insert(other);
        if known != other {
            return Some("is a separate file in place of a hard link");
        }
        let known = *self.expected_of.entry(other).or_insert(expected);
        (known != expected).then_some("is a hard link in place of a separate file")
    }
}

/// Describes a read error as a difference; returns an error if the failure has nothing to
/// do with the tree.
fn cannot_read(errno: Errno) -> Result<String> {
    match errno {
        Errno::MFILE | Errno::NFILE | Errno::NOMEM => Err(errno).context(|| COMPARING),
        errno => Ok(format!("cannot be read ({errno})")),
    }
}

pub(super) fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the command was interrupted")
}

fn moved_meanwhile() -> Error {
    let what = "a directory was moved while the tree was compared: try again";
    Error::new(ErrorKind::Internal, what)
}

fn kind_of(stat: &Stat) -> &'static str {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => "a file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a link",
        FileType::CharacterDevice if stat.st_rdev == 0 => "a whiteout",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::Unknown => "something unknown",
    }
}

pub(super) type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

fn xattr_difference(names: &Xattrs, found: &Xattrs) -> String {
    let differs = |name: &&Vec<u8>| names.get(*name) != found.get(*name);
    let name = names.keys().chain(found.keys()).find(differs);
    let text = name.map(|name| String::from_utf8_lossy(name));
    let text = text.unwrap_or_default();
    let what = match name {
        Some(name) if !found.contains_key(name) => "lacks the attribute",
        Some(name) if !names.contains_key(name) => "has the additional attribute",
        _ => "has another value of the attribute",
    };
    format!("{what} {}", Quoted(&text))
}

impl Rules {
    /// Reads the extended attributes of an entry, without those that a file system, a
    /// security module or overlayfs itself sets and that differ between exact copies.
    pub(super) fn xattrs(self, (parent, name): Name<'_>) -> std::result::Result<Xattrs, Errno> {
        let path = entry_path(parent, name);
        let mut names = Vec::with_capacity(MAX_XATTR_BYTES);
        match llistxattr(&path, spare_capacity(&mut names)) {
            Err(Errno::OPNOTSUPP) => return Ok(Xattrs::new()),
            listed => listed?,
        };
        let mut attributes = Xattrs::new();
        for name in names.split_inclusive(|byte| *byte == 0) {
            let name = CStr::from_bytes_with_nul(name).map_err(|_| Errno::INVAL)?;
            if self.leaves_out(name.to_bytes()) {
                continue;
            }
            let mut value = Vec::with_capacity(MAX_XATTR_BYTES);
            lgetxattr(&path, name, spare_capacity(&mut value))?;
            attributes.insert(name.to_bytes().to_vec(), value);
        }
        Ok(attributes)
    }

    fn leaves_out(self, name: &[u8]) -> bool {
        let overlays = name.strip_prefix(b"trusted.overlay.");
        let overlays = overlays.or_else(|| name.strip_prefix(b"user.overlay."));
        match overlays {
            Some(b"origin" | b"impure" | b"nlink" | b"upper" | b"uuid") => true,
            Some(b"opaque") => self.is_lowest,
            _ => matches!(name, b"security.selinux" | b"security.evm"),
        }
    }
}

/// Reads until the buffer is full or the file ends.
pub(super) fn read_full(
    file: &OwnedFd,
    buffer: &mut [u8],
    offset: u64,
) -> std::result::Result<usize, Errno> {
    let mut done = 0;
    while done < buffer.len() {
        match pread(file, &mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(more) => done += more,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}
