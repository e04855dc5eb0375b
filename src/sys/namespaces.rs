//! The user namespace that owns a mount namespace (ioctl_nsfs(2)).

use std::ffi::c_void;

use rustix::fd::{AsFd, FromRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

/// Opens the user namespace that owns the namespace of the descriptor, as of
/// `/proc/<pid>/ns/mnt`.
///
/// # Errors
///
/// `EPERM` if that user namespace is neither the caller's nor below it.
pub fn owner(namespace: impl AsFd) -> Result<OwnedFd, Errno> {
    // SAFETY: `NS_GET_USERNS` takes no argument and returns a new descriptor.
    unsafe { ioctl(namespace, GetUserNamespace) }
}

struct GetUserNamespace;

// SAFETY: the kernel accesses no memory for this call, and returns a new descriptor, which
// nothing else owns.
unsafe impl Ioctl for GetUserNamespace {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(0xb7, 0x1)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(descriptor: IoctlOutput, _: *mut c_void) -> Result<OwnedFd, Errno> {
        // SAFETY: the kernel has returned this descriptor, and nothing else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    }
}
