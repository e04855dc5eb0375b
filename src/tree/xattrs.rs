//! Extended attributes: which of them are content, copying them, and counting
//! them.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};

use rustix::buffer::spare_capacity;
use rustix::fd::{AsRawFd, BorrowedFd};
use rustix::fs::{XattrFlags, lgetxattr, llistxattr, lsetxattr, statvfs};
use rustix::io::Errno;

use crate::error::{Context, Error, ErrorKind, Result};

/// The most bytes that the names, or the value, of attributes can have
/// (xattr(7), `XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
pub(super) const MAX_XATTR_BYTES: usize = 65536;

/// The most names in [`XattrBuffers::left_out`].
const MOST_NAMED: usize = 8;

/// How an extended attribute is treated when a layer is copied.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    /// The attribute is content of the layer, and has to be copied.
    Content,
    /// The attribute is an ACL, or a label that the host's own security module has set.
    /// It is copied where the target supports it, as containerd does in an unpack.
    IfPossible,
    /// The attribute belongs to the file system, and is not copied: a property, or
    /// another form of an attribute that is also listed under another name.
    FileSystem,
}

fn role(name: &[u8]) -> Role {
    let begins = |prefix: &[u8]| name.starts_with(prefix);
    match name {
        b"system.posix_acl_access" | b"system.posix_acl_default" => Role::IfPossible,
        b"security.capability" => Role::Content,
        _ if begins(b"security.") => Role::IfPossible,
        // XFS lists each ACL a second time, with ids that are not mapped.
        _ if begins(b"trusted.SGI_") => Role::FileSystem,
        _ if begins(b"trusted.") || begins(b"user.") => Role::Content,
        _ => Role::FileSystem,
    }
}

/// Whether an attribute changes which files a layer shows. Some of overlayfs's own
/// attributes do not, and overlayfs sets those on every directory that it copies up.
fn is_mark(name: &[u8]) -> bool {
    const COPIED_UP: [&[u8]; 4] = [b"origin", b"impure", b"nlink", b"uuid"];
    let own = [&b"trusted.overlay."[..], &b"user.overlay."[..]];
    let overlay = own.iter().find_map(|prefix| name.strip_prefix(*prefix));
    role(name) == Role::Content && overlay.is_none_or(|name| !COPIED_UP.contains(&name))
}

/// The path of an entry through /proc, for attributes of links and device
/// nodes: there is no call for them that takes a descriptor. The last part of
/// the path is not followed.
pub(super) fn entry_path(parent: BorrowedFd<'_>, name: &CStr) -> CString {
    let mut path = format!("/proc/self/fd/{}/", parent.as_raw_fd()).into_bytes();
    path.extend_from_slice(name.to_bytes());
    CString::new(path).expect("neither part holds a NUL")
}

pub(super) fn fd_path(directory: BorrowedFd<'_>) -> CString {
    entry_path(directory, c".")
}

/// Buffers for the names and for one value, reused during the whole walk.
pub(super) struct XattrBuffers {
    names: Vec<u8>,
    value: Vec<u8>,
    /// The names of some attributes that were not copied.
    pub left_out: BTreeSet<String>,
}

/// The attributes of an entry that are content.
#[derive(Default)]
pub(super) struct Found {
    pub count: u64,
    pub has_mark: bool,
}

impl XattrBuffers {
    pub(super) fn new() -> XattrBuffers {
        XattrBuffers {
            names: Vec::with_capacity(MAX_XATTR_BYTES),
            value: Vec::with_capacity(MAX_XATTR_BYTES),
            left_out: BTreeSet::new(),
        }
    }

    fn list(&mut self, path: &CStr) -> Result<()> {
        self.names.clear();
        match llistxattr(path, spare_capacity(&mut self.names)) {
            Err(Errno::OPNOTSUPP) => Ok(()),
            listed => listed.map(drop).context(|| "list the extended attributes"),
        }
    }

    /// Counts the attributes that are content.
    pub(super) fn count(&mut self, path: &CStr) -> Result<Found> {
        self.list(path)?;
        let mut found = Found::default();
        let names = self.names.split(|byte| *byte == 0);
        for name in names.filter(|name| role(name) == Role::Content && !name.is_empty()) {
            found.count += 1;
            found.has_mark |= is_mark(name);
        }
        Ok(found)
    }

    pub(super) fn copy(&mut self, from: &CStr, to: &CStr) -> Result<()> {
        self.list(from)?;
        for name in self.names.split_inclusive(|byte| *byte == 0) {
            let name = CStr::from_bytes_with_nul(name).map_err(|error| {
                Error::caused(ErrorKind::Internal, "list the extended attributes", error)
            })?;
            let role = role(name.to_bytes());
            if role != Role::FileSystem {
                self.value.clear();
                lgetxattr(from, name, spare_capacity(&mut self.value))
                    .context(|| format!("read the extended attribute {name:?}"))?;
                match lsetxattr(to, name, &self.value, XattrFlags::empty()) {
                    Ok(()) => continue,
                    Err(errno) if role == Role::IfPossible && cannot_have(errno) => {}
                    Err(errno) => return Err(xattr_error(errno, to, name)),
                }
            }
            if self.left_out.len() < MOST_NAMED {
                self.left_out.insert(name.to_string_lossy().into_owned());
            }
        }
        Ok(())
    }
}

/// Whether the error means that the target does not support attributes of that kind,
/// or does not permit this program to set one. A full disk, or an ACL that is too
/// large, is a real failure.
fn cannot_have(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS | Errno::INVAL
    )
}

/// The error of a failed lsetxattr(2). ext4 returns `ENOSPC` also for an attribute that is
/// larger than it can store; if the disk has free space, the error says so.
fn xattr_error(errno: Errno, to: &CStr, name: &CStr) -> Error {
    let what = format!("set the extended attribute {name:?}");
    let has_room = statvfs(to).is_ok_and(|disk| disk.f_bavail * disk.f_frsize > 1 << 20);
    if errno == Errno::NOSPC && has_room {
        return Error::caused(ErrorKind::Internal, what, std::io::Error::from(errno));
    }
    Error::system(errno, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_overlayfs_and_programs_mean_is_content() {
        for name in [
            "security.capability",
            "trusted.overlay.opaque",
            "trusted.overlay.origin",
            "trusted.mine",
            "user.btrfs.compression",
        ] {
            assert!(role(name.as_bytes()) == Role::Content, "{name}");
        }
        for name in [
            "btrfs.compression",
            "trusted.SGI_ACL_FILE",
            "system.nfs4_acl",
            "system.advise",
            "bcachefs.data_replicas",
        ] {
            assert!(role(name.as_bytes()) == Role::FileSystem, "{name}");
        }
        assert!(role(b"security.selinux") == Role::IfPossible);
        assert!(role(b"system.posix_acl_default") == Role::IfPossible);
        assert!(is_mark(b"trusted.overlay.redirect") && is_mark(b"user.x"));
        assert!(!is_mark(b"user.overlay.impure") && !is_mark(b"btrfs.compression"));
    }
}
