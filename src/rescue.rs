//! The commands `mount` and `umount`: a snapshot's files for a person, when
//! containerd is down or a container does not start.
//!
//! Owns: where it may be mounted, and how such a mount is known again. Works
//! beside a running daemon and without one, and changes nothing else.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use crate::config::{Access, Config, MountOptions};
use crate::daemon;
use crate::daemon::visit::{Purpose, Visit, visit};
use crate::error::{Error, ErrorKind, Result};
use crate::mount::Stack;
use crate::mountinfo::{self, Mounted};
use crate::snapshotter::Snapshotter;
use crate::types::{Kind, Quoted};

/// What such mounts have for a device, before a colon and the snapshot's id.
const SOURCE: &str = env!("CARGO_PKG_NAME");

/// Mounts a snapshot, and tells so on standard output.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] for a directory that will not do; as of
/// [`Snapshotter::rescue`]; or what the kernel says.
pub fn mount(config: &Config, options: &MountOptions) -> Result<()> {
    let target = empty_directory(&options.target)?;
    for volume in [&config.root, &config.writable] {
        refuse_within(&target, volume)?;
    }
    let Visit {
        // Held until it is mounted: no daemon starts, and moves layers, meanwhile.
        lock,
        store,
        volumes,
        ..
    } = visit(config, Purpose::Look)?;
    let snapshotter = Snapshotter::new(store, volumes, daemon::options(config));
    let rescue = snapshotter.rescue(&options.key, options.access == Access::ReadOnly)?;
    let stack = Stack {
        source: &format!("{SOURCE}:{}", rescue.id),
        base: &format!("{}/snapshots", config.root),
        lowers: &rescue.lowers,
        own: rescue.own.as_deref(),
        options: &daemon::options(config).mount_options,
    };
    stack.mount(&target)?;
    drop(lock);
    let key = Quoted(&rescue.key);
    let access = match rescue.own {
        Some(_) => "what is changed there stays",
        None => "read-only",
    };
    let kind = match rescue.kind {
        Kind::Committed => "layer",
        Kind::Active => "snapshot",
        Kind::View => "view",
    };
    say(&format!(
        "{kind} {key}\nis mounted on {}, {access}.\nUnmount it before its container is started: {SOURCE} umount DIR\n",
        target.display()
    ));
    Ok(())
}

/// Ends such a mount.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if there is none, or if it is in use.
pub fn umount(target: &str) -> Result<()> {
    let refused = |why: &str| {
        let what = format!("unmount {target}: {why}");
        Err(Error::new(ErrorKind::FailedPrecondition, what))
    };
    let path = canonical(target)?;
    let mounts = mountinfo::read()?;
    // The last one hides the others.
    let mounted = mounts.iter().rev().find(|mounted| mounted.point == path);
    if !mounted.is_some_and(is_ours) {
        return refused("no snapshot was mounted there by \"mount\"");
    }
    match unmount(&path, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::BUSY) => refused("it is in use: a shell is in it, or a file is open"),
        Err(errno) => Err(Error::caused(
            ErrorKind::FailedPrecondition,
            format!("unmount {target}"),
            std::io::Error::from(errno),
        )),
    }
}

fn is_ours(mounted: &Mounted) -> bool {
    let id = mounted.source.strip_prefix(SOURCE);
    mounted.file_system == "overlay" && id.is_some_and(|id| id.starts_with(':'))
}

fn empty_directory(target: &str) -> Result<PathBuf> {
    let path = canonical(target)?;
    let mut entries = fs::read_dir(&path).map_err(|error| cannot("look into", target, error))?;
    match entries.next() {
        None => Ok(path),
        Some(_) => Err(Error::new(
            ErrorKind::FailedPrecondition,
            format!("{target} is not empty, and what is in it would be hidden: give an empty one"),
        )),
    }
}

fn canonical(target: &str) -> Result<PathBuf> {
    fs::canonicalize(target).map_err(|error| cannot("find", target, error))
}

fn cannot(what: &str, target: &str, error: std::io::Error) -> Error {
    let what = format!("{what} the directory {target}");
    Error::caused(ErrorKind::FailedPrecondition, what, error)
}

/// A mount in there would be taken for a snapshot's files.
fn refuse_within(target: &Path, volume: &str) -> Result<()> {
    match fs::canonicalize(volume) {
        Ok(volume) if target.starts_with(&volume) => Err(Error::new(
            ErrorKind::FailedPrecondition,
            format!(
                "{} is in {}, where snapshots are kept: give a directory elsewhere",
                target.display(),
                volume.display()
            ),
        )),
        // What is not there holds nothing; the visit says more about it.
        _ => Ok(()),
    }
}

fn say(text: &str) {
    // A closed pipe is no failure: it is mounted.
    let _ = std::io::stdout().write_all(text.as_bytes());
}
