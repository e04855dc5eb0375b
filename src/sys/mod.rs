//! The system calls that need `unsafe`, and nothing else.
//!
//! Owns: each such call behind a safe function whose comment says why it is
//! sound. Never: decides when to call.

#![allow(unsafe_code)]

pub mod namespaces;
pub mod quota;

use rustix::fd::{AsFd, AsRawFd};
use rustix::io::Errno;
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Puts the calling process, which must have one thread only, into a new user
/// namespace (`unshare(2)`).
pub fn unshare_user_namespace() -> Result<(), Errno> {
    // SAFETY: the call is unsafe for flags that split what Rust believes to be
    // shared between threads, such as descriptors. A user namespace is not.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER) }
}

/// Puts the calling process, which must have one thread only, into a new mount
/// namespace (`unshare(2)`).
pub fn unshare_mount_namespace() -> Result<(), Errno> {
    // SAFETY: the flag splits nothing that Rust believes to be shared between threads:
    // only the mounts and the working directory, and the process has one thread.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }
}

/// Id-maps the detached mount `mount` by a user namespace's descriptor
/// (`mount_setattr(2)`, `MOUNT_ATTR_IDMAP`, Linux 5.12).
pub fn idmap_mount(mount: impl AsFd, user_namespace: impl AsFd) -> Result<(), Errno> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(user_namespace.as_fd().as_raw_fd())
            .expect("an open descriptor is not negative"),
    };
    // SAFETY: both descriptors are borrowed for the whole call, the path is a
    // C string, and the kernel only reads `attributes`, of the size given.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    ended(result)
}

/// Gives the calling thread the idle I/O priority (`ioprio_set(2)`): its reads
/// and writes wait for those of other programs, where the disk's scheduler has
/// priorities (BFQ has).
pub fn lower_io_priority() -> Result<(), Errno> {
    const WHO_PROCESS: libc::c_int = 1;
    const CLASS_IDLE: libc::c_int = 3;
    const CLASS_SHIFT: libc::c_int = 13;
    // SAFETY: the call takes three integers and no pointer; 0 is the calling thread.
    let result = unsafe {
        libc::syscall(
            libc::SYS_ioprio_set,
            WHO_PROCESS,
            0,
            CLASS_IDLE << CLASS_SHIFT,
        )
    };
    ended(result)
}

/// Converts the return value of a system call: 0, or -1 with the reason in `errno`.
fn ended(result: libc::c_long) -> Result<(), Errno> {
    match result {
        0 => Ok(()),
        _ => Err(last_errno()),
    }
}

/// The error of the C library's last failed call in this thread.
fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
}
