//! Checks paths and mount options from the command line. Paths have to be apart from each
//! other, and free of characters with a meaning in mount options.

use crate::error::{Error, Result};
use crate::snapshotter::Relocation;
use crate::store::is_database_file;
use crate::types::MountPath;
use crate::volume::{ROOT_NAMES, WRITABLE_NAMES};

/// Names in `<root>` that this program uses, besides the names of the database's files and of
/// the volume's directories.
const OTHER_ROOT_NAMES: [&str; 4] = ["state", "state.new", "lock", "grpc.socks"];

/// Makes a path absolute. Returns an error if the path cannot be part of a mount option.
pub(super) fn check_path(flag: &str, path: &str) -> Result<MountPath> {
    let refuse = |why: &str| Error::invalid(format!("{flag} is {path:?}: {why}"));
    if path.is_empty() {
        return Err(refuse("a path is needed"));
    }
    let absolute = std::path::absolute(path)
        .map_err(|_| refuse("the working directory is unknown: give an absolute path"))?;
    let text = absolute.to_str().ok_or_else(|| {
        refuse("the path of the working directory is not UTF-8: give an absolute path")
    })?;
    MountPath::parse(text).map_err(refuse)
}

/// Returns an error if a path is the same as another one, or is in a place where this
/// program keeps the files of the other one.
pub(super) fn check_all_apart(
    root: &str,
    writable: &str,
    state_dir: &str,
    address: &str,
    metrics_file: Option<&str>,
) -> Result<()> {
    let in_root = ("--root-dir", root, is_root_name as IsOurs);
    let in_writable = ("--writable-dir", writable, is_writable_name as IsOurs);
    check_apart(in_root, ("--writable-dir", writable))?;
    check_apart(in_writable, ("--root-dir", root))?;
    if state_dir != root {
        check_apart(in_root, ("--state-dir", state_dir))?;
    }
    if state_dir != writable {
        check_apart(in_writable, ("--state-dir", state_dir))?;
    }
    if let Some(path) = metrics_file {
        let in_state = ("--state-dir", state_dir, is_root_name as IsOurs);
        let socket = ("--address", address, (|_| false) as IsOurs);
        for taken in [in_root, in_writable, in_state, socket] {
            check_apart(taken, ("--metrics-file", path))?;
        }
    }
    Ok(())
}

/// Whether this program uses a name in its directory. Another configured directory may
/// be in the same directory, but not below such a name.
type IsOurs = fn(&str) -> bool;

fn is_root_name(name: &str) -> bool {
    is_database_file(name) || ROOT_NAMES.contains(&name) || OTHER_ROOT_NAMES.contains(&name)
}

fn is_writable_name(name: &str) -> bool {
    WRITABLE_NAMES.contains(&name)
}

/// Returns an error if `other` is `base` itself, or is in `base` at or below a name that this
/// program uses.
fn check_apart(base: (&str, &str, IsOurs), other: (&str, &str)) -> Result<()> {
    let (base_flag, base, is_ours) = base;
    let Some(below) = other.1.strip_prefix(base) else {
        return Ok(());
    };
    let is_taken = match below.strip_prefix('/') {
        None => below.is_empty(),
        Some(below) => is_ours(below.split('/').next().unwrap_or(below)),
    };
    if !is_taken {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{} {} is used for {base_flag} already: choose another directory",
        other.0, other.1
    )))
}

/// Options that the daemon sets for each mount (overlayfs.rst).
const OWN_OPTIONS: &[&str] = &[
    "lowerdir",
    "lowerdir+",
    "datadir+",
    "upperdir",
    "workdir",
    "uidmap",
    "gidmap",
];

pub(super) fn check_mount_options(options: &[String], relocation: Relocation) -> Result<()> {
    for option in options {
        check_mount_option(option)?;
        // With these options, overlayfs stores a handle of the topmost layer in the upper
        // directory. Once that layer has moved, overlayfs refuses to mount the upper directory
        // (ESTALE).
        if relocation != Relocation::Never
            && matches!(option.as_str(), "index=on" | "nfs_export=on")
        {
            return Err(Error::invalid(format!(
                "--mount-option {option} makes containers depend on the place of their layers: \
                 give --relocate never with it, or remove it"
            )));
        }
    }
    Ok(())
}

fn check_mount_option(option: &str) -> Result<()> {
    let refuse = |why: &str| {
        Err(Error::invalid(format!(
            "--mount-option is {option:?}: {why}"
        )))
    };
    let name = option.split('=').next().unwrap_or(option);
    if name.is_empty() {
        return refuse("an option of overlayfs is needed");
    }
    if OWN_OPTIONS.contains(&name) {
        return refuse("the snapshotter sets this option itself for each mount");
    }
    if name == "volatile" || option == "fsync=volatile" {
        return refuse(
            "with this option, overlayfs mounts a container's directory only once, even after a \
             clean stop. To write less to a disk, put the writable directory in memory \
             (--writable-volatile)",
        );
    }
    if option.contains(|c: char| c == ',' || c.is_control() || c.is_whitespace()) {
        return refuse("give one option at a time, without commas and blanks");
    }
    Ok(())
}
