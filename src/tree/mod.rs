//! Walking directory trees with untrusted content.
//!
//! Owns: counting, comparing, copying, flushing and deleting. All walks use directory
//! descriptors and never follow a link, so no content of a layer leads a walk outside of it.
//! Nothing recurses, so no depth of a tree exhausts the stack. Never: knows what a tree is for.
//! There is no state: after a crash, a walk begins again.

mod compare;
mod copy;
mod digest;
mod flush;
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
pub use digest::{ReadFrom, digest_tree};
pub use flush::{Flushed, flush_tree};
pub use remake::remake;
pub use remove::{remove_children, remove_entry};
pub use usage::{count, count_layer, count_unless};
pub use visit::{Visited, visit_open};
pub use whiteouts::remove_whiteouts;

/// Opens a directory to read it. No link is followed in the last part of the
/// path, and no mount on the directory is entered. Where the kernel permits,
/// the access time is not updated, so that a sleeping disk is not woken to
/// write it.
fn open_directory(parent: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = |flags| match openat2(&parent, name, flags, Mode::empty(), ResolveFlags::NO_XDEV) {
        // Linux before 5.6 does not have openat2(2).
        Err(Errno::NOSYS) => openat(&parent, name, flags, Mode::empty()),
        opened => opened,
    };
    match open(flags | OFlags::NOATIME) {
        // Only the owner may use O_NOATIME, and in a user namespace root does
        // not count as the owner of every file.
        Err(Errno::PERM) => match open(flags) {
            // A seccomp profile that does not know openat2(2) answers EPERM to
            // every call of it.
            Err(Errno::PERM) => openat(&parent, name, flags, Mode::empty()),
            opened => opened,
        },
        opened => opened,
    }
}

/// Opens a regular file to read it, and returns it with its metadata; `None` for any other
/// type of file. Other types are never opened, even if another program replaces the file
/// meanwhile, because opening a device node has the side effects of its driver.
fn open_file(parent: impl AsFd, name: &CStr) -> Result<Option<(OwnedFd, Stat)>, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let found = openat(parent, name, flags, Mode::empty())?;
    let stat = fstat(&found)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    // The kernel's link to the descriptor leads to this file, even if the name
    // leads elsewhere by now.
    let path = format!("/proc/self/fd/{}", found.as_raw_fd());
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = match open(&path, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => open(&path, flags, Mode::empty()),
        opened => opened,
    };
    Ok(Some((opened?, stat)))
}

/// How deep a tree may be. There is a limit because a walk needs memory for each level; the
/// limit is twice the depth that a path of 4096 bytes (`PATH_MAX`) can reach.
const MAX_LEVELS: usize = 4096;

fn too_deep() -> Error {
    Error::refused(format!(
        "directories are nested more than {MAX_LEVELS} deep"
    ))
}
