//! The mounts of all mount namespaces that belong to the administrator.
//!
//! Every user may create a user namespace, mount namespaces in it, and any number of mounts
//! there with any text as their options. Therefore, mount namespaces of other users prove
//! nothing, and are not read. No mount is missed: a container engine's mounts for a container
//! with a user namespace are in the engine's own mount namespace as well.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, Dev, Mode, OFlags, ResolveFlags, StatxFlags, fstat, makedev, openat, stat, statx,
};
use rustix::io::Errno;

use super::mountinfo::{self, Mounted};
use crate::error::{Context, Result};
use crate::sys::namespaces::owner;
use crate::util::cached_lookup::open_cached;

/// A mount namespace and its mounts.
pub struct Namespace {
    /// The root directory of a process in it, opened with O_PATH.
    root: OwnedFd,
    is_own: bool,
    /// The mounts, in the kernel's order.
    pub mounts: Vec<Mounted>,
}

/// The device and the inode number of a file, which identify it on this host.
pub type Inode = (Dev, u64);

/// Reads the mounts of this process's mount namespace, and of every other mount namespace
/// that has a process and is owned by this process's user namespace. A container engine may
/// have made mounts that only its own processes see.
///
/// # Errors
///
/// [`ErrorKind::Unavailable`](crate::error::ErrorKind::Unavailable) if the mounts of a
/// namespace change each time they are read.
pub fn read_everywhere() -> Result<Vec<Namespace>> {
    let own_user =
        identity(&File::open("/proc/self/ns/user").context(|| "open /proc/self/ns/user")?)?;
    let mut namespaces = vec![Namespace {
        root: open_root("/").context(|| "open /")?,
        is_own: true,
        mounts: mountinfo::read()?,
    }];
    let name = |process: &str| fs::read_link(format!("/proc/{process}/ns/mnt"));
    let mut seen = HashSet::from([name("self").context(|| "look at /proc/self/ns/mnt")?]);
    for process in fs::read_dir("/proc").context(|| "list /proc")? {
        let process = process.context(|| "list /proc")?.file_name();
        let Some(process) = process.to_str().filter(|name| name.parse::<u32>().is_ok()) else {
            continue;
        };
        // The process has ended. If its namespace still exists, another process leads to it.
        let Ok(name) = name(process) else {
            continue;
        };
        if seen.contains(&name) {
            continue;
        }
        let opened = File::open(format!("/proc/{process}/ns/mnt"));
        let Some(namespace) = unless_ended(opened, process)? else {
            continue;
        };
        let user = unless_ended(owner(&namespace).map_err(io::Error::from), process)?;
        let is_ours = user.is_some_and(|user| identity(&user).ok() == Some(own_user));
        if !is_ours {
            seen.insert(name);
            continue;
        }
        let opened = open_root(&format!("/proc/{process}/root")).map_err(io::Error::from);
        let Some(root) = unless_ended(opened, process)? else {
            continue;
        };
        if let Some(mounts) = mountinfo::read_of(process)? {
            seen.insert(name);
            namespaces.push(Namespace {
                root,
                is_own: false,
                mounts,
            });
        }
    }
    Ok(namespaces)
}

/// What was opened of a process; `None` if the process has ended, or does not let itself be
/// looked at. A lack of descriptors or memory is no such answer.
fn unless_ended<T>(opened: io::Result<T>, process: &str) -> Result<Option<T>> {
    let opening = || format!("look at the mounts of process {process}");
    match opened {
        Ok(opened) => Ok(Some(opened)),
        Err(error) => match Errno::from_io_error(&error) {
            Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM) => Err(error).context(opening),
            _ => Ok(None),
        },
    }
}

impl Namespace {
    /// The file to which an absolute path leads in this namespace; `None` if the kernel would
    /// have to access a disk, because the path may lead to a server that does not answer.
    /// The directories of a mounted overlay are always in the kernel's memory.
    pub fn inode_at(&self, path: &Path) -> Option<Inode> {
        match open_cached(&self.root, path, OFlags::empty(), ResolveFlags::IN_ROOT) {
            Ok(file) => inode(&file),
            // Linux before 5.12 has no lookup without a disk. The plain lookup may wait
            // for the disk.
            Err(Errno::INVAL | Errno::NOSYS) if self.is_own => {
                stat(path).ok().map(|found| (found.st_dev, found.st_ino))
            }
            Err(_) => None,
        }
    }
}

fn open_root(path: &str) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty())
}

fn inode(file: &OwnedFd) -> Option<Inode> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = statx(file, "", flags, StatxFlags::INO).ok()?;
    let device = makedev(found.stx_dev_major, found.stx_dev_minor);
    Some((device, found.stx_ino))
}

fn identity(namespace: impl AsFd) -> Result<Inode> {
    let found = fstat(namespace).context(|| "look at a user namespace")?;
    Ok((found.st_dev, found.st_ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_of_descriptors_is_not_the_end_of_a_process() {
        let opened = |errno: Errno| unless_ended::<()>(Err(errno.into()), "1");
        assert!(opened(Errno::MFILE).is_err() && opened(Errno::NFILE).is_err());
        assert!(opened(Errno::NOENT).unwrap().is_none());
        assert!(opened(Errno::SRCH).unwrap().is_none());
    }
}
