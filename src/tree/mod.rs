//! Walking directory trees that strangers have filled.
//!
//! Owns: counting, comparing, copying and deleting. Everything goes by directory descriptors and
//! never follows a link, so no content of a layer leads a walk outside of it;
//! nothing recurses, so no depth of a tree exhausts the stack.
//! Never: knows what a tree is for. Holds no state: a walk cut short by a
//! crash is simply begun again.

mod compare;
mod copy;
mod remake;
mod remove;
mod usage;
mod visit;
mod walk;
mod whiteouts;
mod xattrs;

use std::ffi::CStr;

use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat, fstat, open, openat, openat2};
use rustix::io::Errno;

use crate::error::Error;

pub use compare::{Differences, Rules, compare_trees};
pub use copy::{Copied, copy_tree};
pub use remake::remake;
pub use remove::{remove_children, remove_entry};
pub use usage::{count, count_layer, count_unless};
pub use visit::{Visited, visit_open};
pub use whiteouts::remove_whiteouts;

/// Opens a directory to read it: without following a link in its last part,
/// without entering what somebody has mounted there, and, where the kernel lets
/// us, without an access time being written: a sleeping disk is not to be woken
/// for that.
fn open_directory(parent: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = |flags| match openat2(&parent, name, flags, Mode::empty(), ResolveFlags::NO_XDEV) {
        // Before Linux 5.6.
        Err(Errno::NOSYS) => openat(&parent, name, flags, Mode::empty()),
        opened => opened,
    };
    match open(flags | OFlags::NOATIME) {
        // Only the owner may ask for O_NOATIME; in a user namespace root is
        // not always that.
        Err(Errno::PERM) => match open(flags) {
            // A seccomp profile older than openat2(2) says that to all of them.
            Err(Errno::PERM) => openat(&parent, name, flags, Mode::empty()),
            opened => opened,
        },
        opened => opened,
    }
}

/// Opens a regular file to read it, and returns it with its metadata; `None` if the name
/// is of anything else. Nothing else is opened, whatever has the name meanwhile: opening a
/// device node does what its driver does then.
fn open_file(parent: impl AsFd, name: &CStr) -> Result<Option<(OwnedFd, Stat)>, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = openat(parent, name, flags, Mode::empty())?;
    let stat = fstat(&found)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    // This very file, by a link of the kernel's.
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = match open(&path, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => open(&path, flags, Mode::empty()),
        opened => opened,
    };
    Ok(Some((opened?, stat)))
}

/// How deep a tree may be for a walk, which remembers something of each level. Paths of
/// 4096 bytes (`PATH_MAX`) end at half of it.
const MAX_LEVELS: usize = 4096;

fn too_deep() -> Error {
    Error::refused(format!(
        "directories are nested more than {MAX_LEVELS} deep"
    ))
}
