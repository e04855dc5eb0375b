//! Mounting, and asking the kernel what it can mount.
//!
//! Owns: the mount system calls and the probes around them. Never: policy; the
//! caller decides what a missing feature means. A mount that a probe makes ends
//! when the value that represents it is dropped.

pub mod mountinfo;
pub mod namespaces;
mod options;
pub mod overlay;
mod probe;
mod stack;

pub use options::{Wanted, overlay_options};
pub use probe::probe_layers;
pub use stack::Stack;

use mountinfo::{Mounted, Part};

use std::ffi::{CStr, OsStr};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fd::AsFd;
use rustix::fs::{FileType, fgetxattr, fstat, stat};
use rustix::io::Errno;
use rustix::mount::{
    MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount_change, open_tree, unmount,
};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::sys;
use crate::types::{SnapshotId, SnapshotPaths};
use crate::util::entries::lacks_types;
use crate::util::fault_point::fault_point;

/// A mounted overlay; unmounted when dropped.
struct Overlay {
    target: PathBuf,
}

impl Drop for Overlay {
    fn drop(&mut self) {
        if let Err(errno) = unmount(&self.target, UnmountFlags::DETACH) {
            let target = self.target.display();
            log::warn!("cannot unmount the trial overlay {target}; the next trial does: {errno}");
        }
    }
}

/// Unmounts the overlay that an interrupted probe may have left on `target`.
pub fn unmount_stale(target: &Path) {
    // Usually nothing is mounted there, and the call fails.
    let _ = unmount(target, UnmountFlags::DETACH);
}

/// The name of a directory that a probe creates in its empty scratch directory.
const LOWER: &str = "lower";
const UPPER: &str = "upper";
const WORK: &str = "work";
/// The directory that a probe mounts on.
pub const MERGED: &str = "merged";

/// Checks that `scratch`, an empty directory, is on a file system that can hold
/// overlayfs's upper directory. The probe mounts an overlay, and does in it what
/// containers do: deleting (a whiteout), replacing a directory (an opaque directory),
/// and renaming (a whiteout that the rename makes).
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`], which names the step that did not work.
pub fn probe_upper(scratch: &Path, options: &[String]) -> Result<()> {
    let lower = scratch.join(LOWER);
    for name in [UPPER, WORK, MERGED] {
        make_directory(&scratch.join(name))?;
    }
    for name in ["", "replaced", "renamed"] {
        make_directory(&lower.join(name))?;
    }
    for name in ["deleted", "moved"] {
        let path = lower.join(name);
        fs::write(&path, name).context(|| format!("write {}", path.display()))?;
    }

    require_entry_types(scratch)?;
    let path = |name: &str| scratch.join(name).display().to_string();
    let own = SnapshotPaths {
        upper: path(UPPER),
        work: path(WORK),
    };
    let stack = Stack {
        source: "overlay",
        base: None,
        lowers: &[path(LOWER)],
        own: Some(&own),
        options,
    };
    let merged = scratch.join(MERGED);
    let target = fs::File::open(&merged).context(|| format!("open {}", merged.display()))?;
    stack.mount(target, &merged)?;
    let mounted = Overlay {
        target: merged.clone(),
    };
    fault_point("probe-mounted");
    exercise(&merged, &scratch.join(UPPER), options)?;
    drop(mounted);
    Ok(())
}

/// Returns an error if the file system does not report the types of directory entries,
/// which overlayfs needs to find whiteouts.
fn require_entry_types(scratch: &Path) -> Result<()> {
    let listing = || format!("list {}", scratch.display());
    let top = fs::File::open(scratch).context(listing)?;
    if lacks_types(top).context(listing)? {
        return Err(Error::refused(
            "its file system does not report the types of directory entries (d_type)",
        ));
    }
    Ok(())
}

fn exercise(merged: &Path, upper: &Path, options: &[String]) -> Result<()> {
    let io = |what: &str, result: std::io::Result<()>| {
        result.map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            unsuitable(format!("{what} on an overlay"), errno)
        })
    };
    io("delete a file", fs::remove_file(merged.join("deleted")))?;
    io(
        "rename a file",
        fs::rename(merged.join("moved"), merged.join("there")),
    )?;
    io(
        "delete a directory",
        fs::remove_dir(merged.join("replaced")),
    )?;
    io(
        "replace a directory",
        fs::create_dir(merged.join("replaced")),
    )?;
    for name in ["deleted", "moved"] {
        let left = stat(upper.join(name))
            .map(|stat| (FileType::from_raw_mode(stat.st_mode), stat.st_rdev));
        if left != Ok((FileType::CharacterDevice, 0)) {
            return Err(unsuitable(
                format!("find the whiteout of a {name} file"),
                left.err().unwrap_or(Errno::NODEV),
            ));
        }
    }
    let namespace = if options.iter().any(|option| option == "userxattr") {
        "user"
    } else {
        "trusted"
    };
    let opaque = fs::File::open(upper.join("replaced"))
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
        .and_then(|dir| {
            let mut value = [0_u8; 8];
            fgetxattr(dir, format!("{namespace}.overlay.opaque"), &mut value)
        });
    opaque
        .map(drop)
        .map_err(|errno| unsuitable("find the mark of an opaque directory".to_owned(), errno))
}

fn make_directory(path: &Path) -> Result<()> {
    fs::create_dir_all(path).context(|| format!("create the directory {}", path.display()))
}

fn unsuitable(what: String, errno: Errno) -> Error {
    Error::caused(
        ErrorKind::FailedPrecondition,
        format!("cannot {what}"),
        std::io::Error::from(errno),
    )
}

/// Lists the mounts of an upper directory in this mount namespace: overlays that write
/// into the directory, and bind mounts of it. Directories are compared by inode, because a
/// disk may have several paths. Of the bind mounts, only those of a directory called `name`
/// are examined, because any other directory may be on a disk that does not answer.
pub fn mounts_of_upper(upper: impl AsFd, name: &CStr) -> Result<Vec<Mounted>> {
    let looking = || "find out where an upper directory is mounted";
    let stat = fstat(upper).context(looking)?;
    let is_it = |path: &Path| {
        rustix::fs::stat(path)
            .is_ok_and(|found| (found.st_dev, found.st_ino) == (stat.st_dev, stat.st_ino))
    };
    let mut mounts = mountinfo::read()?;
    let upper = |mounted: &Mounted| {
        let mut parts = mounted.overlay.clone().into_iter();
        parts.find_map(|(part, path)| (part == Part::Upper).then_some(path))
    };
    mounts.retain(|mounted| match upper(mounted) {
        Some(path) => is_it(&path),
        None => {
            let bound = mounted.root.file_name().map(OsStr::as_bytes);
            bound == Some(name.to_bytes()) && is_it(&mounted.point)
        }
    });
    Ok(mounts)
}

/// The first word of the device name of an overlay that was mounted by hand.
const BY_HAND: &str = env!("CARGO_PKG_NAME");

/// A snapshot that a person has mounted with the command `mount`.
#[derive(Debug, PartialEq, Eq)]
pub struct ByHand {
    /// The identity of the snapshot's root; `None` if the mount is by an early version of
    /// this program, which did not record the identity.
    root: Option<String>,
    /// The snapshot's id. A snapshot of another root may have the same id.
    pub id: SnapshotId,
    /// The mount point.
    pub point: PathBuf,
}

impl ByHand {
    /// The device name to mount the overlay of a snapshot with. It says that a person has
    /// mounted the overlay, and names the snapshot.
    pub fn source(root: &str, id: SnapshotId) -> String {
        format!("{BY_HAND}:{root}:{id}")
    }

    /// All snapshots of any root that are mounted by hand in this mount namespace.
    pub fn all() -> Result<Vec<ByHand>> {
        Ok(mountinfo::read()?
            .iter()
            .filter_map(ByHand::parse)
            .collect())
    }

    /// The snapshots mounted by hand that may belong to the root with this identity.
    pub fn of_root(identity: Option<&str>) -> Result<Vec<ByHand>> {
        let mut mounts = ByHand::all()?;
        mounts.retain(|mounted| mounted.root.is_none() || mounted.root.as_deref() == identity);
        Ok(mounts)
    }

    /// Reads a mount; `None` if it was not made by the command `mount`.
    pub fn parse(mounted: &Mounted) -> Option<ByHand> {
        if mounted.file_system != "overlay" {
            return None;
        }
        let words = mounted.source.strip_prefix(BY_HAND)?.strip_prefix(':')?;
        let (root, id) = match words.split_once(':') {
            Some((root, id)) => (Some(root.to_owned()), id),
            None => (None, words),
        };
        Some(ByHand {
            root,
            id: SnapshotId::from_directory_name(id.as_bytes())?,
            point: mounted.point.clone(),
        })
    }
}

/// Whether this process is in a user namespace of its own, where overlayfs can
/// only use `user.*` attributes (mount option `userxattr`, Linux 5.11).
pub fn probe_user_namespace() -> bool {
    fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !maps_everything(&map))
}

fn maps_everything(uid_map: &str) -> bool {
    uid_map
        .split_ascii_whitespace()
        .eq(["0", "0", "4294967295"])
}

/// The hidden argument with which [`probe_idmapped_mounts`] starts this program as a child
/// process.
pub const USER_NAMESPACE_CHILD: &str = "--hold-user-namespace";

/// The work of the child process of [`probe_idmapped_mounts`]: it enters a new user
/// namespace, reports this to its parent, and waits until the parent has opened the
/// namespace.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if the kernel does not permit user namespaces.
pub fn hold_user_namespace() -> Result<()> {
    sys::unshare_user_namespace()
        .map_err(|errno| unsuitable("enter a new user namespace".to_owned(), errno))?;
    let reported = std::io::stdout().write_all(b"\n");
    let waited = reported
        .and_then(|()| std::io::stdout().flush())
        .and_then(|()| std::io::stdin().read(&mut [0]));
    waited.map(drop).context(|| "wait for the parent process")
}

/// Moves this process, which must have only one thread, into a mount namespace of
/// its own. From then on, this process and other processes do not see each other's new
/// mounts.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`], which contains the kernel's error.
pub fn enter_mount_namespace() -> Result<()> {
    sys::unshare_mount_namespace()
        .and_then(|()| {
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private)
        })
        .map_err(|errno| unsuitable("enter a new mount namespace".to_owned(), errno))
}

/// Checks that layers in `directory` can be id-mapped. The kernel has to support
/// id-mapped layers of an overlay (Linux 5.19), and the file system has to support
/// id-mapped mounts. The probe tries the latter with a mount that no other process sees.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`], which names the missing feature.
pub fn probe_idmapped_mounts(directory: &Path) -> Result<()> {
    let release = kernel_release();
    if kernel_version(&release) < Some((5, 19)) {
        return Err(Error::refused(format!(
            "Linux {release} cannot id-map the layers of an overlay: use Linux 5.19 or later"
        )));
    }
    let namespace = mapped_user_namespace().context(|| "create a user namespace")?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(rustix::fs::CWD, directory, flags)
        .and_then(|tree| sys::idmap_mount(tree.as_fd(), &namespace))
        .map_err(|errno| unsuitable(format!("id-map a mount of {}", directory.display()), errno))
}

/// The release of the running kernel, for example "6.1.0-18-amd64".
pub fn kernel_release() -> String {
    let name = rustix::system::uname();
    name.release().to_string_lossy().into_owned()
}

fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// Creates a user namespace with an id mapping, and returns a descriptor of it. The kernel
/// creates a namespace only for a process, so a child process is needed for a moment.
fn mapped_user_namespace() -> Result<fs::File> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |error: std::io::Error| Error::caused(ErrorKind::FailedPrecondition, what, error)
    };
    let child = Command::new("/proc/self/exe")
        .arg(USER_NAMESPACE_CHILD)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed("start a child process"))?;
    let mut child = Reaped(child);
    let id = child.0.id();
    let mut ready = [0];
    let stdout = child.0.stdout.as_mut();
    let said = stdout.map_or(Ok(0), |stdout| stdout.read(&mut ready));
    if said.map_err(failed("read from the child process"))? == 0 {
        return Err(Error::refused(
            "the child process could not enter a user namespace",
        ));
    }
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{id}/{map}"), "0 65536 1")
            .map_err(failed("write the id mapping of the user namespace"))?;
    }
    fs::File::open(format!("/proc/{id}/ns/user")).map_err(failed("open the user namespace"))
}

/// A child process that is ended, and waited for, when this value is dropped.
struct Reaped(Child);

impl Drop for Reaped {
    fn drop(&mut self) {
        // The child waits for the end of its input; the kill is for a child that
        // hangs.
        drop(self.0.stdin.take());
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_are_compared_as_numbers() {
        assert_eq!(kernel_version("6.1.0-28-amd64"), Some((6, 1)));
        assert_eq!(kernel_version("5.19"), Some((5, 19)));
        assert_eq!(kernel_version("4.4.302+"), Some((4, 4)));
        assert!(kernel_version("5.4.0") < Some((5, 19)));
        assert!(kernel_version("nonsense") < Some((5, 19)));
    }

    #[test]
    fn only_a_partial_map_is_a_user_namespace() {
        assert!(maps_everything("         0          0 4294967295\n"));
        assert!(!maps_everything("         0       1000          1\n"));
        assert!(!maps_everything("0 0 65536\n65536 65536 4294901759\n"));
    }
}
