//! Host directories that are shown beneath what a container writes.
//!
//! Owns: how host directories are requested, which directories are allowed, finding them
//! so that no link and no rename leads elsewhere, creating missing ones. Never:
//! snapshots, mounts, names on the volumes.
//!
//! This module finds a directory as a descriptor, but returns a path, which the
//! mounting program resolves again. A user who may rename below an allowed
//! directory can replace the directory in between, so each request checks it again.
//! After a crash, an empty directory may be left where a container has asked for one.

mod location;
mod parse;
#[cfg(test)]
mod tests;
mod walk;

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, fstat, unlinkat};
use rustix::io::Errno;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::mount::mountinfo::{self, Mounted};
use crate::types::Quoted;
use location::{Place, Position, open_kept};
pub use parse::{ImageRule, MAX_PATHS, parse_paths, strip_prefix};
use walk::{MAX_DEPTH, Reached, Start, path_of, too_deep};

/// Which host directories containers may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The allowed directories, as absolute and normalised paths. Everything below them is
    /// allowed, too. If the list is empty, host directories are off.
    pub allowed: Vec<String>,
    /// The snapshotter's own directories. A host directory may not be one of
    /// them, be in one of them, or contain one.
    pub kept_apart: Vec<String>,
}

/// Host directories that were found, or created because they were missing. If
/// this value is dropped without [`HostDirs::keep`], the created ones are
/// removed again.
pub struct HostDirs {
    targets: Vec<PathBuf>,
    created: Vec<(OwnedFd, Vec<u8>)>,
}

impl HostDirs {
    /// The directories as absolute paths without links, in the order of the request, without
    /// repetitions.
    pub fn targets(&self) -> &[PathBuf] {
        &self.targets
    }

    /// Keeps the created directories, because the request has succeeded.
    pub fn keep(mut self) {
        self.created.clear();
    }
}

impl Drop for HostDirs {
    fn drop(&mut self) {
        for (parent, name) in self.created.drain(..).rev() {
            match unlinkat(&parent, &*name, AtFlags::REMOVEDIR) {
                // Another program has removed the directory, or uses it by now.
                Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST | Errno::BUSY) => {}
                Err(errno) => log::warn!(
                    "cannot remove the empty host directory {:?}, which was created for a request \
                     that was refused later: {errno}",
                    String::from_utf8_lossy(&name)
                ),
            }
        }
    }
}

impl Policy {
    /// Returns an error if [`Policy::ensure`] would refuse these directories. Creates
    /// nothing.
    pub fn check(&self, paths: &[String]) -> Result<()> {
        if paths.is_empty() {
            return Ok(());
        }
        self.find(paths).map(drop)
    }

    /// Like [`Policy::check`], but also returns an error if a directory does not exist.
    pub fn require_present(&self, paths: &[String]) -> Result<()> {
        if paths.is_empty() {
            return Ok(());
        }
        let reached = self.find(paths)?.reached;
        let mut all = paths.iter().zip(&reached);
        match all.find(|(_, (_, there))| !there.missing.is_empty()) {
            None => Ok(()),
            Some((path, _)) => Err(Error::refused(format!(
                "the host directory {} does not exist, and is not created, because a pod's \
                 label names it: create it first",
                Quoted(path)
            ))),
        }
    }

    /// Opens these host directories, given as normalised paths from [`parse_paths`],
    /// and creates the missing ones (0755, with their parents).
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] for a path that is not below an allowed directory
    /// (also after links have been followed), is not a directory, or overlaps another host
    /// directory or one of the snapshotter's own directories;
    /// [`ErrorKind::FailedPrecondition`] if the allowed directory itself does not exist;
    /// [`ErrorKind::Unavailable`] if a directory was moved or removed meanwhile. On failure,
    /// the created directories are removed again.
    pub fn ensure(&self, paths: &[String]) -> Result<HostDirs> {
        let mut found = HostDirs {
            targets: Vec::new(),
            created: Vec::new(),
        };
        if paths.is_empty() {
            return Ok(found);
        }
        let Found {
            starts,
            reached,
            surroundings,
        } = self.find(paths)?;
        let mut taken = Taken::default();
        for (path, (start, reached)) in paths.iter().zip(reached) {
            let using = || format!("use the host directory {}", Quoted(path));
            let directory = create_missing(reached, &mut found.created).context(using)?;
            // The directory is checked again, because it may have been moved since the
            // walk.
            if !starts.holds(start, &directory)? || is_removed(&directory)? {
                return Err(Error::new(
                    ErrorKind::Unavailable,
                    "the directory was moved or removed meanwhile: try again",
                )
                .while_doing(using()));
            }
            let position = Position::of(&directory, &surroundings.mounts).context(using)?;
            surroundings
                .require_apart(&position, Position::overlaps)
                .context(using)?;
            if taken.take(position.place(&[]), path).context(using)? {
                let target = OsString::from_vec(path_of(&directory)?);
                found.targets.push(PathBuf::from(target));
            }
        }
        Ok(found)
    }

    fn find(&self, paths: &[String]) -> Result<Found<'_>> {
        if self.allowed.is_empty() {
            return Err(Error::invalid(format!(
                "the snapshot asks for host directories ({}), but none are allowed: start the \
                 daemon with --allow-lower",
                Quoted(&paths.join(":"))
            )));
        }
        if paths.len() > MAX_PATHS {
            return Err(Error::invalid(format!(
                "the snapshot asks for {} host directories, but at most {MAX_PATHS} are possible: \
                 name fewer",
                paths.len()
            )));
        }
        let surroundings = Surroundings::look(&self.kept_apart)?;
        let mut starts = Starts::new(&self.allowed);
        let mut taken = Taken::default();
        let mut missing = 0;
        let mut found = Vec::new();
        for path in paths {
            let using = || format!("use the host directory {}", Quoted(path));
            let (number, mut there) = starts.reach(path).context(using)?;
            // Each missing directory will be held open until the request is done.
            missing += there.missing.len();
            if missing > MAX_DEPTH {
                return Err(too_deep().while_doing(using()));
            }
            // The parent of a directory that will be created may contain one of the
            // snapshotter's own directories.
            let clashes = match there.missing.is_empty() {
                true => Position::overlaps,
                false => Position::is_within,
            };
            let position = Position::of(&there.fd, &surroundings.mounts).context(using)?;
            surroundings
                .require_apart(&position, clashes)
                .and_then(|()| taken.take(position.place(there.missing.make_contiguous()), path))
                .context(using)?;
            found.push((number, there));
        }
        Ok(Found {
            starts,
            reached: found,
            surroundings,
        })
    }
}

/// The result of walking to all paths of a request, before anything is created.
struct Found<'a> {
    starts: Starts<'a>,
    /// For each path, the number of the allowed directory that contains it, and the point
    /// where the walk from there ended.
    reached: Vec<(usize, Reached)>,
    surroundings: Surroundings,
}

/// The allowed directories. Each is opened only when a path needs it: a directory on a
/// server that does not answer must not delay requests that use other directories.
struct Starts<'a> {
    allowed: &'a [String],
    opened: Vec<Option<Result<Start>>>,
}

impl<'a> Starts<'a> {
    fn new(allowed: &'a [String]) -> Starts<'a> {
        Starts {
            allowed,
            opened: allowed.iter().map(|_| None).collect(),
        }
    }

    /// Walks to `path` from the first allowed directory from which it can be reached, and
    /// returns the number of that directory. Allowed directories with which the path does
    /// not begin are tried last: a link in the path may lead to one of them.
    fn reach(&mut self, path: &str) -> Result<(usize, Reached)> {
        let is_named = |prefix: &String| strip_prefix(path, prefix).is_some();
        let (named, others): (Vec<_>, Vec<_>) =
            (0..self.allowed.len()).partition(|number| is_named(&self.allowed[*number]));
        let mut refusal = None;
        for (number, is_named) in named
            .into_iter()
            .map(|number| (number, true))
            .chain(others.into_iter().map(|number| (number, false)))
        {
            let prefix = &self.allowed[number];
            match self.opened[number].get_or_insert_with(|| Start::open(prefix)) {
                Ok(start) => match start.strip(path).map(|rest| start.walk(rest)) {
                    None => {}
                    Some(Ok(there)) => return Ok((number, there)),
                    Some(Err(error)) => refusal = Some(error),
                },
                // The path begins with this allowed directory, so the error concerns the path.
                Err(error) if is_named => {
                    refusal.get_or_insert(Error::new(error.kind(), error.chain()));
                }
                Err(_) => {}
            }
        }
        Err(refusal.unwrap_or_else(|| {
            Error::invalid(format!(
                "the directory is not below one that --allow-lower names: {}",
                self.allowed.join(", ")
            ))
        }))
    }

    /// Whether an opened directory is, at this moment, the allowed directory `number` or
    /// below it.
    fn holds(&self, number: usize, fd: impl AsFd) -> Result<bool> {
        match &self.opened[number] {
            Some(Ok(start)) => start.holds(fd),
            _ => Ok(false),
        }
    }
}

/// The host directories that the request uses so far.
#[derive(Default)]
struct Taken<'a>(Vec<(Place, &'a String)>);

impl<'a> Taken<'a> {
    /// Adds a directory. Returns `false` if the request uses it already. Returns an error if
    /// it overlaps another one, because overlayfs refuses to mount a directory together with
    /// a directory below it.
    fn take(&mut self, place: Place, path: &'a String) -> Result<bool> {
        if self.0.iter().any(|(other, _)| *other == place) {
            return Ok(false);
        }
        let clashes = |other: &Place| other.is_within(&place) || place.is_within(other);
        if let Some((_, other)) = self.0.iter().find(|(other, _)| clashes(other)) {
            return Err(Error::invalid(format!(
                "one of this directory and {} holds the other, and overlayfs cannot mount both: \
                 name only one of them",
                Quoted(other)
            )));
        }
        self.0.push((place, path));
        Ok(true)
    }
}

/// The present mounts, and the snapshotter's own directories.
struct Surroundings {
    mounts: Vec<Mounted>,
    kept: Vec<(Position, String)>,
}

impl Surroundings {
    fn look(kept_apart: &[String]) -> Result<Surroundings> {
        let mounts = mountinfo::read()?;
        let mut kept = Vec::new();
        for path in kept_apart {
            if let Some(fd) = open_kept(path)? {
                kept.push((Position::of(fd, &mounts)?, path.clone()));
            }
        }
        Ok(Surroundings { mounts, kept })
    }

    fn require_apart(
        &self,
        position: &Position,
        clashes: fn(&Position, &Position) -> bool,
    ) -> Result<()> {
        match self.kept.iter().find(|(kept, _)| clashes(position, kept)) {
            None => Ok(()),
            Some((_, path)) => Err(Error::invalid(format!(
                "the snapshotter keeps its own data in {path}, and the directory is {path}, is in \
                 it or contains it: name a directory outside of {path} that does not contain {path}"
            ))),
        }
    }
}

fn create_missing(mut reached: Reached, created: &mut Vec<(OwnedFd, Vec<u8>)>) -> Result<OwnedFd> {
    while let Some(name) = reached.missing.pop_front() {
        let parent = reached.fd.try_clone();
        let parent = parent.context(|| "keep a directory open")?;
        if reached.create_next(&name)? {
            created.push((parent, name));
        }
    }
    Ok(reached.fd)
}

fn is_removed(directory: impl AsFd) -> Result<bool> {
    let stat = fstat(directory).context(|| "read the metadata of an opened directory")?;
    Ok(stat.st_nlink == 0)
}
