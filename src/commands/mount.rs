//! The commands `mount` and `umount`, with which a person looks at a snapshot's files when
//! containerd is down or a container does not start.
//!
//! Owns: where a snapshot may be mounted. The commands work with or without a running daemon.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use crate::commands::output::print;
use crate::config::{Config, MountOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::mount::mountinfo;
use crate::mount::{ByHand, Stack};
use crate::root::open::{Purpose, Visit, visit};
use crate::snapshotter::Snapshotter;
use crate::types::{Kind, Quoted, Volume};
use crate::util::entries::is_empty;

const PROGRAM: &str = env!("CARGO_PKG_NAME");

/// Mounts a snapshot for a person, and prints the directory.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if the directory is not empty, or is within a volume.
pub fn mount(config: &Config, options: &MountOptions) -> Result<()> {
    let (target, path) = empty_directory(&options.target)?;
    for volume in [&config.root, &config.writable] {
        refuse_within(&path, volume)?;
    }
    let Visit {
        // The lock is held until the snapshot is mounted, so that no daemon starts and moves
        // layers before.
        lock,
        store,
        volumes,
        ..
    } = visit(config, Purpose::Look)?;
    if lock.is_none() && UnixStream::connect(&config.address).is_err() {
        return Err(Error::refused(format!(
            "another process of this program has locked {}, and no daemon answers on {}: wait \
             until the check, the import or the start of the daemon is done",
            config.root, config.address
        )));
    }
    let base = volumes.snapshots_path(Volume::Image);
    let snapshotter = Snapshotter::new(store, volumes, config.options.for_this_kernel());
    let mut rescue = snapshotter.rescue(&options.key, options.is_read_only)?;
    let stack = Stack {
        source: &snapshotter.source_by_hand(rescue.id)?,
        base: Some(&base),
        lowers: &rescue.lowers,
        own: rescue.own.as_ref(),
        options: &rescue.options,
    };
    stack.mount(&target, &path)?;
    drop((lock, rescue.mark.take()));
    if rescue.own.is_some()
        && let Err(error) = snapshotter.require_mounted_once(&rescue, &path)
    {
        unmount(&path, UnmountFlags::NOFOLLOW)
            .map_err(|errno| cannot("unmount", &options.target, errno.into()))?;
        return Err(error);
    }
    let kind = match rescue.kind {
        Kind::Committed => "layer",
        Kind::Active => "snapshot",
        Kind::View => "view",
    };
    let (access, duty) = match rescue.own {
        Some(_) => (
            "and changes there are kept",
            "Its container cannot start before the snapshot is unmounted",
        ),
        None => ("read-only", "To unmount"),
    };
    let left_out = match rescue.has_host_directories {
        true => "The host directories that its container sees are left out.\n",
        false => "",
    };
    print(&format!(
        "{kind} {}\nis mounted on {}, {access}.\n{left_out}{duty}: {PROGRAM} umount DIR\n",
        Quoted(&rescue.key),
        path.display()
    ));
    Ok(())
}

/// Unmounts a snapshot that [`mount`] has mounted on a directory.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if no snapshot is mounted there, or if the mount is in
/// use.
pub fn umount(target: &str) -> Result<()> {
    let path = fs::canonicalize(target).map_err(|error| cannot("find", target, error))?;
    // If several mounts are on the directory, only the last one is visible.
    let mounts = mountinfo::read()?;
    let topmost = mounts.iter().rev().find(|mounted| mounted.point == path);
    let is_by_hand = topmost.is_some_and(|mounted| ByHand::parse(mounted).is_some());
    if !is_by_hand {
        return Err(Error::refused(format!(
            "unmount {target}: no snapshot was mounted there by \"mount\""
        )));
    }
    match unmount(&path, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::BUSY) => Err(Error::refused(format!(
            "unmount {target}: the directory is in use: leave it with all shells, and close its \
             files"
        ))),
        Err(errno) => Err(cannot("unmount", target, errno.into())),
    }
}

/// Opens the directory to mount on, and returns its path without links.
fn empty_directory(target: &str) -> Result<(OwnedFd, PathBuf)> {
    let opening = |errno: Errno| cannot("open", target, errno.into());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = open(target, flags, Mode::empty()).map_err(opening)?;
    if !is_empty(&directory).map_err(opening)? {
        return Err(Error::refused(format!(
            "{target} is not empty, and a mount would hide its entries: give an empty directory"
        )));
    }
    let link = format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd());
    let path = fs::read_link(link).map_err(|error| cannot("find", target, error))?;
    Ok((directory, path))
}

fn cannot(what: &str, target: &str, error: std::io::Error) -> Error {
    let what = format!("{what} the directory {target}");
    Error::caused(ErrorKind::FailedPrecondition, what, error)
}

/// Returns an error if the directory is within a volume, where the mount would look like a
/// snapshot's files.
fn refuse_within(target: &Path, volume: &str) -> Result<()> {
    match fs::canonicalize(volume) {
        Ok(volume) if target.starts_with(&volume) => Err(Error::refused(format!(
            "{} is in {}, where snapshots are kept: give a directory elsewhere",
            target.display(),
            volume.display()
        ))),
        // A volume that does not exist contains no directory. A later step reports that it is
        // missing.
        _ => Ok(()),
    }
}
