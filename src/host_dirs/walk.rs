//! Walking from an allowed directory down to a host directory, name by name.
//!
//! Each step opens a name in a directory that is held open, and follows no
//! link. This code reads and follows links itself: an absolute link leads back to
//! the allowed directory, and `..` to a directory that the walk has passed.
//! A user who renames directories meanwhile can therefore lead the walk to
//! another place below the allowed directory, but nowhere else. `openat2(2)`
//! with `RESOLVE_BENEATH` guarantees the same, but refuses absolute links, does
//! not report which part is missing, and does not exist before Linux 5.6.

use std::collections::VecDeque;
use std::ffi::{CString, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags, mkdirat, open, openat, readlinkat};
use rustix::io::Errno;

use super::parse::strip_prefix;
use crate::error::{Context, Error, Result};
use crate::types::Quoted;

/// The most links in one path, as in the kernel (path_resolution(7)).
const MAX_LINKS: u32 = 40;

/// How many levels below the allowed directory a host directory may be. Each level on
/// the way is held open.
pub(super) const MAX_DEPTH: usize = 64;

/// An allowed directory, opened.
pub(super) struct Start {
    /// The opened directory, from which all walks begin.
    pub fd: OwnedFd,
    /// The two paths with which an absolute link may begin: the path as configured, and the
    /// same path without links.
    names: [String; 2],
}

/// The point at which a walk has ended.
pub(super) struct Reached {
    /// The last directory that exists.
    pub fd: OwnedFd,
    /// The names that are missing below `fd`, outermost first.
    pub missing: VecDeque<Vec<u8>>,
}

impl Start {
    /// Opens an allowed directory. Links in its path are followed, because the
    /// administrator has configured the path.
    pub fn open(prefix: &str) -> Result<Start> {
        let fd = match open(prefix, DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) => {
                return Err(Error::refused(format!(
                    "{prefix}, which --allow-lower names, is not a directory: create or mount it"
                )));
            }
            fd => fd.context(|| format!("open {prefix}"))?,
        };
        let canonical = path_of(&fd)?;
        Ok(Start {
            fd,
            names: [
                prefix.to_owned(),
                String::from_utf8_lossy(&canonical).into_owned(),
            ],
        })
    }

    /// The part of `path` below this directory; `None` if the path does not begin with this
    /// directory.
    pub fn strip<'a>(&self, path: &'a str) -> Option<&'a str> {
        self.names.iter().find_map(|name| strip_prefix(path, name))
    }

    /// Whether an opened directory is, at this moment, this allowed directory or below it.
    pub fn holds(&self, fd: impl AsFd) -> Result<bool> {
        Ok(Path::new(OsStr::from_bytes(&path_of(fd)?))
            .starts_with(OsStr::from_bytes(&path_of(&self.fd)?)))
    }

    /// Walks to `rest`, a path relative to this directory. Creates nothing.
    pub fn walk(&self, rest: &str) -> Result<Reached> {
        let mut passed: Vec<OwnedFd> = Vec::new();
        let mut pending: VecDeque<Vec<u8>> = names_in(rest.as_bytes()).collect();
        let mut links = 0;
        while let Some(name) = pending.pop_front() {
            if name == b".." {
                if passed.pop().is_none() {
                    return Err(leads_out());
                }
                continue;
            }
            let top = passed.last().unwrap_or(&self.fd);
            match openat(top, &*name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty()) {
                Ok(_) if passed.len() == MAX_DEPTH => return Err(too_deep()),
                Ok(fd) => {
                    passed.push(fd);
                    continue;
                }
                Err(Errno::NOENT) => {
                    pending.push_front(name);
                    break;
                }
                Err(Errno::NOTDIR | Errno::LOOP) => {}
                Err(Errno::NAMETOOLONG) => return Err(invalid("has a name that is too long")),
                Err(errno) => return Err(errno).context(|| "look up the directory"),
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(invalid(
                    "leads through too many links: name the directory that the last one leads to",
                ));
            }
            match readlinkat(top, &*name, Vec::new()) {
                Ok(target) => {
                    let target = target.to_bytes();
                    let beneath = match target.starts_with(b"/") {
                        false => target,
                        true => {
                            passed.clear();
                            std::str::from_utf8(target)
                                .ok()
                                .and_then(|target| self.strip(target))
                                .ok_or_else(leads_out)?
                                .as_bytes()
                        }
                    };
                    for name in names_in(beneath).rev() {
                        pending.push_front(name);
                    }
                }
                Err(Errno::INVAL) => {
                    return Err(invalid("is not a directory, or leads through a file"));
                }
                // The link was replaced after it was opened, so the walk looks up the
                // name again.
                Err(Errno::NOENT) => pending.push_front(name),
                Err(errno) => return Err(errno).context(|| "read a link in the path"),
            }
        }
        if pending.iter().any(|name| name == b"..") {
            return Err(invalid("leads through a link whose target does not exist"));
        }
        let fd = match passed.pop() {
            Some(fd) => fd,
            None => openat(&self.fd, c".", DIRECTORY, Mode::empty())
                .context(|| "open the allowed directory again")?,
        };
        Ok(Reached {
            fd,
            missing: pending,
        })
    }
}

impl Reached {
    /// Creates the next missing directory (0755) and enters it. Returns whether
    /// this call has created it.
    pub fn create_next(&mut self, name: &[u8]) -> Result<bool> {
        let creating = || format!("create {}", Quoted(&String::from_utf8_lossy(name)));
        let made = match mkdirat(&self.fd, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(Errno::NAMETOOLONG) => return Err(invalid("has a name that is too long")),
            Err(errno) => return Err(errno).context(creating),
        };
        self.fd = match openat(&self.fd, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty()) {
            Err(Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => {
                return Err(invalid("leads through a link whose target does not exist"));
            }
            fd => fd.context(creating)?,
        };
        Ok(made)
    }
}

pub(super) const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The path of an opened file as the kernel has it now, without links.
pub(super) fn path_of(fd: impl AsFd) -> Result<Vec<u8>> {
    let number = fd.as_fd().as_raw_fd();
    readlinkat(CWD, format!("/proc/self/fd/{number}"), Vec::new())
        .map(CString::into_bytes)
        .context(|| "find out the path of an opened directory")
}

fn names_in(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .filter(|name| !matches!(*name, b"" | b"."))
        .map(<[u8]>::to_vec)
}

pub(super) fn too_deep() -> Error {
    invalid(&format!(
        "is more than {MAX_DEPTH} levels below the allowed directory, or more than \
         {MAX_DEPTH} directories have to be created: create them first, or name others"
    ))
}

fn leads_out() -> Error {
    invalid(
        "leads out of the allowed directory through a link: allow the link's target with \
         --allow-lower, or name another directory",
    )
}

fn invalid(why: &str) -> Error {
    Error::invalid(format!("the path {why}"))
}
