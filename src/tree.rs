//! Walking directory trees that strangers have filled.
//!
//! Owns: counting, copying and deleting. Everything goes by directory descriptors and
//! never follows a link, so no content of a layer leads a walk outside of it;
//! nothing recurses, so no depth of a tree exhausts the stack.
//! Never: knows what a tree is for. Holds no state: a walk cut short by a
//! crash is simply begun again.

mod copy;
mod remove;
mod usage;

use std::ffi::CStr;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;

pub use copy::copy_tree;
pub use remove::remove_children;
pub use usage::count_usage;

/// Opens a directory to read it, without following a link in its last part
/// and, where the kernel lets us, without an access time being written: a
/// sleeping disk is not to be woken for that.
fn open_directory(parent: impl AsFd, name: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(&parent, name, flags | OFlags::NOATIME, Mode::empty()) {
        // Only the owner may ask for O_NOATIME; in a user namespace root is
        // not always that.
        Err(Errno::PERM) => openat(&parent, name, flags, Mode::empty()),
        opened => opened,
    }
}

fn is_dot(name: &CStr) -> bool {
    matches!(name.to_bytes(), b"." | b"..")
}
