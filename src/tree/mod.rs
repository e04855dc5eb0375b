//! Walking directory trees that strangers have filled.
//!
//! Owns: counting, copying and deleting. Everything goes by directory descriptors and
//! never follows a link, so no content of a layer leads a walk outside of it;
//! nothing recurses, so no depth of a tree exhausts the stack.
//! Never: knows what a tree is for. Holds no state: a walk cut short by a
//! crash is simply begun again.

mod copy;
mod remake;
mod remove;
mod usage;
mod visit;
mod walk;
mod whiteouts;

use std::ffi::CStr;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

use crate::error::Error;

pub use copy::copy_tree;
pub use remake::remake;
pub use remove::remove_children;
pub use usage::{count, count_unless};
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

/// How deep a tree may be for a walk that holds descriptors for each level.
/// Paths of 4096 bytes (`PATH_MAX`) end at half of it.
const MAX_LEVELS: usize = 4096;

fn too_deep() -> Error {
    Error::refused(format!(
        "directories are nested more than {MAX_LEVELS} deep"
    ))
}
