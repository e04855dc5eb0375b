//! Paths and mount options from the command line: absolute, apart from each
//! other, and free of what would mean something in a mount option.

use std::path::{Component, Path};

use crate::error::{Error, Result};

/// Names in `<root>` that are ours; the writable directory may be in the root,
/// but in none of them.
pub(super) const ROOT_NAMES: &[&str] = &[
    "metadata.db",
    "metadata.db-wal",
    "metadata.db-shm",
    "metadata.db.ballast-1",
    "metadata.db.ballast-2",
    "metadata.db.bbolt",
    "metadata.db.import",
    "metadata.db.copy",
    "metadata.db.copy.new",
    "metadata.db.copy.new-journal",
    "state",
    "state.new",
    "lock",
    "grpc.socks",
    "snapshots",
    "lowers",
    "mounted",
    "empty",
    "trash",
    "left-out",
];
/// The same for `<writable>`.
pub(super) const WRITABLE_NAMES: &[&str] = &[
    ".volume",
    ".volume.new",
    ".probe",
    "snapshots",
    "trash",
    "left-out",
];

/// Makes a path absolute and refuses what could not be written into a mount
/// option: a comma ends an option, a colon a lower directory, a backslash
/// escapes.
pub(super) fn check_path(flag: &str, path: &str) -> Result<String> {
    let refuse = |why: &str| Err(Error::invalid(format!("{flag} is {path:?}: {why}")));
    if path.is_empty() {
        return refuse("a path is needed");
    }
    let forbidden = |c: char| matches!(c, ',' | ':' | '\\') || c.is_control();
    let Ok(absolute) = std::path::absolute(path) else {
        return refuse("the working directory cannot be told, give an absolute path");
    };
    let Some(text) = absolute.to_str() else {
        return refuse("the working directory is not UTF-8, give an absolute path");
    };
    if text.contains(forbidden) {
        return refuse(
            "commas, colons, backslashes and control characters mean something to mount(8), \
             choose a path without them",
        );
    }
    let mut normal = String::new();
    for component in Path::new(text).components() {
        match component {
            Component::Normal(name) => {
                normal.push('/');
                normal.push_str(name.to_str().expect("a part of a UTF-8 path is UTF-8"));
            }
            Component::ParentDir => return refuse("write it without \"..\""),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    if normal.is_empty() {
        return refuse("the root of all file systems cannot be used");
    }
    Ok(normal)
}

/// Refuses paths of which one lies where the other keeps files of its own.
pub(super) fn check_all_apart(
    root: &str,
    writable: &str,
    state_dir: &str,
    address: &str,
    metrics_file: Option<&str>,
) -> Result<()> {
    let in_root = ("--root-dir", root, ROOT_NAMES);
    let in_writable = ("--writable-dir", writable, WRITABLE_NAMES);
    check_apart(in_root, ("--writable-dir", writable))?;
    check_apart(in_writable, ("--root-dir", root))?;
    if state_dir != root {
        check_apart(in_root, ("--state-dir", state_dir))?;
    }
    if state_dir != writable {
        check_apart(in_writable, ("--state-dir", state_dir))?;
    }
    if let Some(path) = metrics_file {
        let in_state = ("--state-dir", state_dir, ROOT_NAMES);
        for taken in [in_root, in_writable, in_state, ("--address", address, &[])] {
            check_apart(taken, ("--metrics-file", path))?;
        }
    }
    Ok(())
}

/// Refuses `other` where it is `base` itself or below it in one of these names.
fn check_apart(base: (&str, &str, &[&str]), other: (&str, &str)) -> Result<()> {
    let (base_flag, base, names) = base;
    let Some(below) = other.1.strip_prefix(base) else {
        return Ok(());
    };
    let is_taken = match below.strip_prefix('/') {
        None => below.is_empty(),
        Some(below) => names.contains(&below.split('/').next().unwrap_or(below)),
    };
    if !is_taken {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{} {} is used for {base_flag} already: choose another directory",
        other.0, other.1
    )))
}

/// Options that each mount gets from its snapshot (overlayfs.rst).
const OWN_OPTIONS: &[&str] = &[
    "lowerdir",
    "lowerdir+",
    "datadir+",
    "upperdir",
    "workdir",
    "uidmap",
    "gidmap",
];

pub(super) fn check_mount_options(options: &[String], relocate: &str) -> Result<()> {
    for option in options {
        check_mount_option(option)?;
        // overlayfs then keeps a handle of the topmost layer in the upper
        // directory, and refuses the upper once that layer has moved (ESTALE).
        if relocate != "never" && matches!(option.as_str(), "index=on" | "nfs_export=on") {
            return Err(Error::invalid(format!(
                "--mount-option {option} ties containers to the place of their layers: \
                 it needs --relocate never"
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
        return refuse("the snapshotter sets that one itself for each mount");
    }
    if option.contains(|c: char| c == ',' || c.is_control() || c.is_whitespace()) {
        return refuse("give one option at a time, without commas and blanks");
    }
    Ok(())
}
