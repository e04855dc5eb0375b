//! Project ids of directories (ioctl_fsgetxattr, `linux/fs.h`) and project
//! quotas (quotactl(2)), as the kernel has them.

use std::ffi::{CStr, c_void};

use rustix::fd::{AsFd, AsRawFd, BorrowedFd};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, Setter, ioctl, opcode};

/// `struct fsxattr`: attributes of an inode that stat(2) does not return.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct FileAttributes {
    /// A set of `FS_XFLAG_…`.
    pub flags: u32,
    extent_size: u32,
    extents: u32,
    /// The project that the inode is charged to.
    pub project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

/// `FS_XFLAG_PROJINHERIT`: a directory gives its project to everything created
/// in it.
pub const INHERIT: u32 = 0x200;

const GET_ATTRIBUTES: Opcode = opcode::read::<FileAttributes>(b'X', 31);
const SET_ATTRIBUTES: Opcode = opcode::write::<FileAttributes>(b'X', 32);

/// Reads an open file's attributes. The file must not be opened with O_PATH.
///
/// # Errors
///
/// `ENOTTY` or `EOPNOTSUPP` if the file system does not have these attributes.
pub fn file_attributes(file: impl AsFd) -> Result<FileAttributes, Errno> {
    // SAFETY: the kernel writes one `struct fsxattr`, whose layout is that of
    // `FileAttributes` (`linux/fs.h`).
    unsafe { ioctl(file, Getter::<GET_ATTRIBUTES, FileAttributes>::new()) }
}

/// Sets an open file's attributes.
pub fn set_file_attributes(file: impl AsFd, attributes: FileAttributes) -> Result<(), Errno> {
    // SAFETY: the kernel reads one `struct fsxattr`.
    unsafe {
        ioctl(
            file,
            Setter::<SET_ATTRIBUTES, FileAttributes>::new(attributes),
        )
    }
}

/// `struct if_nextdqblk` (`linux/quota.h`). It begins with the fields of
/// `struct if_dqblk`, and has the same size.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Quota {
    /// The limit of space in KiB; 0 is no limit.
    pub hard_limit_kib: u64,
    soft_limit_kib: u64,
    /// The used space in bytes.
    pub used_bytes: u64,
    /// The limit of inodes; 0 is no limit.
    pub inode_hard_limit: u64,
    inode_soft_limit: u64,
    /// Inodes in use.
    pub used_inodes: u64,
    block_time: u64,
    inode_time: u64,
    valid: u32,
    /// The project; set only in a result of [`next_quota`].
    pub id: u32,
}

/// `QIF_LIMITS`: the four limits are to be set.
const LIMITS_ARE_VALID: u32 = 1 | 4;

/// `struct fs_quota_stat` (`linux/dqblk_xfs.h`).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct QuotaState {
    version: i8,
    flags: u16,
    padding: i8,
    files: [[u64; 3]; 2],
    loaded: u32,
    times: [i32; 3],
    warnings: [u16; 2],
}

/// In [`quota_flags`]: usage of projects is counted (`FS_QUOTA_PDQ_ACCT`).
pub const COUNTS_PROJECTS: u16 = 1 << 4;
/// In [`quota_flags`]: limits of projects are kept (`FS_QUOTA_PDQ_ENFD`).
pub const LIMITS_PROJECTS: u16 = 1 << 5;

/// The file system whose quotas are read or set.
#[derive(Clone, Copy)]
pub enum Target<'a> {
    /// The file system of an open directory (quotactl_fd(2), Linux 5.14).
    Directory(BorrowedFd<'a>),
    /// The file system on a block device (quotactl(2)).
    Device(&'a CStr),
}

/// The requests to the kernel: `Q_…` of `linux/quota.h` and
/// `linux/dqblk_xfs.h`.
#[derive(Clone, Copy)]
enum Command {
    Get = 0x80_0007,
    Set = 0x80_0008,
    #[cfg(feature = "fault-points")]
    GetNext = 0x80_0009,
    GetState = ((b'X' as isize) << 8) + 5,
}

/// Which quotas a file system has switched on, as flags.
///
/// # Errors
///
/// `ENOSYS` if the file system has none switched on, or the kernel lacks the call;
/// `EINVAL` if the file system does not support quotas.
pub fn quota_flags(target: Target<'_>) -> Result<u16, Errno> {
    let mut state = QuotaState::default();
    // SAFETY: `Q_XGETQSTAT` writes one `struct fs_quota_stat`.
    unsafe { quotactl(target, Command::GetState, 0, (&raw mut state).cast()) }?;
    Ok(state.flags)
}

/// The usage and the limits of a project.
///
/// # Errors
///
/// `ENOENT` on XFS if nothing was ever charged to the project.
pub fn quota(target: Target<'_>, project: u32) -> Result<Quota, Errno> {
    let mut quota = Quota::default();
    // SAFETY: `Q_GETQUOTA` writes one `struct if_dqblk`.
    unsafe { quotactl(target, Command::Get, project, (&raw mut quota).cast()) }?;
    Ok(quota)
}

/// For tests: the usage and limits of the first project that has any and whose number is at
/// least `from` (Linux 4.6).
#[cfg(feature = "fault-points")]
pub fn next_quota(target: Target<'_>, from: u32) -> Result<Quota, Errno> {
    let mut quota = Quota::default();
    // SAFETY: `Q_GETNEXTQUOTA` writes one `struct if_nextdqblk`.
    unsafe { quotactl(target, Command::GetNext, from, (&raw mut quota).cast()) }?;
    Ok(quota)
}

/// Sets the limits of a project; 0 removes a limit.
pub fn set_quota(
    target: Target<'_>,
    project: u32,
    hard_limit_kib: u64,
    inode_hard_limit: u64,
) -> Result<(), Errno> {
    let mut quota = Quota {
        hard_limit_kib,
        inode_hard_limit,
        valid: LIMITS_ARE_VALID,
        ..Quota::default()
    };
    // SAFETY: `Q_SETQUOTA` reads one `struct if_dqblk`.
    unsafe { quotactl(target, Command::Set, project, (&raw mut quota).cast()) }
}

/// Whether the kernel has quotactl_fd(2).
pub fn has_quotactl_fd() -> bool {
    const NO_DESCRIPTOR: libc::c_int = -1;
    // SAFETY: the call writes nothing, because -1 is not a descriptor (EBADF).
    let result = unsafe {
        let nowhere = std::ptr::null_mut::<c_void>();
        libc::syscall(libc::SYS_quotactl_fd, NO_DESCRIPTOR, 0, 0, nowhere)
    };
    result == 0 || super::last_errno() != Errno::NOSYS
}

/// # Safety
///
/// `address` has to point to the structure that the command reads or writes.
unsafe fn quotactl(
    target: Target<'_>,
    command: Command,
    id: u32,
    address: *mut c_void,
) -> Result<(), Errno> {
    const PROJECTS: u32 = 2;
    // QCMD(command, type).
    let command = ((command as u32) << 8) | PROJECTS;
    let result = match target {
        // SAFETY: the descriptor is borrowed for the whole call; the caller guarantees the
        // rest.
        Target::Directory(fd) => unsafe {
            libc::syscall(libc::SYS_quotactl_fd, fd.as_raw_fd(), command, id, address)
        },
        // SAFETY: the path is a C string; the caller guarantees the rest.
        Target::Device(path) => unsafe {
            libc::syscall(libc::SYS_quotactl, command, path.as_ptr(), id, address)
        },
    };
    super::ended(result)
}
