//! Looks at the directories of both volumes, which need not exist yet: their file systems, and
//! whether overlayfs can use these.

use std::fs;
use std::io::ErrorKind as IoKind;
use std::path::{Path, PathBuf};

use rustix::fd::AsFd;
use rustix::fs::{Mode, OFlags, getxattr, open, statvfs};

use super::{Finding, Verdict};
use crate::commands::output::bytes;
use crate::config::{Config, require_short_address};
use crate::error::{Error, ErrorKind, Result};
use crate::mount::mountinfo::{self, Mounted};
use crate::mount::{MERGED, probe_idmapped_mounts, probe_layers, probe_upper, unmount_stale};
use crate::quota::{self, Quotas, Support};
use crate::root::open::{answers, require_mounts};
use crate::snapshotter::QuotaMode;
use crate::store::{DATABASE, require_short};
use crate::types::Limits;
use crate::volume::{Lifetime, keeps_times};

/// A directory, or its nearest parent that exists.
struct Nearest {
    there: PathBuf,
    is_whole: bool,
    mounted: Mounted,
}

pub(super) fn look(config: &Config) -> Vec<Finding> {
    let options = config.options.overlay_options(false);
    let mut findings = Vec::new();
    let mut look_at = |topic, flag, path: &str, trial: &Trial| match find(path) {
        Err(error) => {
            let text = format!("{}: give another {flag}", error.chain());
            findings.push(Finding::bad(topic, text));
            None
        }
        Ok(place) => {
            findings.push(describe(topic, path, &place));
            findings.push(try_overlay(topic, &place, trial, &options));
            Some(place)
        }
    };
    let image = look_at("image", "--root-dir", &config.root, &LAYERS);
    if answers(&config.writable).is_ok_and(|answers| !answers) {
        let path = &config.writable;
        let text = format!("{path} does not answer: check its disk or server");
        findings.push(Finding::bad("writable", text));
        return findings;
    }
    let writable = look_at("writable", "--writable-dir", &config.writable, &WRITES);
    let (Some(image), Some(writable)) = (image, writable) else {
        return findings;
    };
    findings.extend(lost_times(&image));
    findings.extend(selinux([&image, &writable]));
    let is_one = image.mounted.device == writable.mounted.device;
    findings.push(match is_one {
        false => Finding::good("split", "two file systems"),
        true => Finding::note(
            "split",
            format!(
                "both volumes are on one file system ({}), so nothing is split: mount the small, \
                 fast disk on the writable directory, or name another directory with \
                 --writable-dir",
                image.mounted.source
            ),
        ),
    });
    findings.extend(lasting(config, &writable));
    findings.extend(limits(config, &writable));
    if let Err(error) = require_mounts(config) {
        findings.push(Finding::bad("mounts", error.chain()));
    }
    let database = Path::new(&config.state_dir).join(DATABASE);
    for fits in [
        require_short_address(&config.address),
        require_short(&database),
    ] {
        findings.extend(fits.err().map(|error| Finding::bad("paths", error.chain())));
    }
    findings.push(match probe_idmapped_mounts(&image.there) {
        Ok(()) => Finding::good("mapped ids", "layers can be id-mapped"),
        Err(error) => Finding::note(
            "mapped ids",
            format!(
                "{}: leave \"remap-ids\" out of the capabilities of the proxy plugin",
                error.chain()
            ),
        ),
    });
    findings
}

/// Whether the sizes of containers can be limited.
fn limits(config: &Config, writable: &Nearest) -> Option<Finding> {
    let options = &config.options.quota;
    if options.mode == QuotaMode::Off {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = open(&writable.there, flags, Mode::empty()).ok()?;
    let path = writable.there.display().to_string();
    let lack = |support| quota::lack(directory.as_fd(), &path, support).chain();
    let is_needed = options.mode == QuotaMode::Require || options.default != Limits::NONE;
    let missing = match is_needed {
        true => Verdict::Bad,
        false => Verdict::Note,
    };
    let (verdict, text) = match Quotas::probe(directory.as_fd()) {
        Ok(Some(quotas)) if quotas.support() == Support::Limits => (
            Verdict::Good,
            "project quotas: containers can have limits".to_owned(),
        ),
        Ok(quotas) => (missing, lack(quotas.map(|quotas| quotas.support()))),
        Err(error) => (missing, error.chain()),
    };
    Some(Finding::new("limits", verdict, text))
}

/// Warns of a file system on which layers that move there lose a part of their
/// files' times, without any error.
fn lost_times(image: &Nearest) -> Option<Finding> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = open(&image.there, flags, Mode::empty()).ok()?;
    keeps_times(directory)
        .is_ok_and(|are_kept| !are_kept)
        .then(|| {
            Finding::note(
                "image",
                "this file system stores times only to the second and only up to 2038, so files \
                 of layers that move there get less exact times: use ext4 with inodes of 256 \
                 bytes (mkfs.ext4 -I 256), XFS or btrfs",
            )
        })
}

/// Shows the labels of both volumes if SELinux's rules are enforced. Then programs in
/// containers may only use files with the label that the policy gives to containerd's own
/// layers.
fn selinux(places: [&Nearest; 2]) -> Option<Finding> {
    let enforced = fs::read_to_string("/sys/fs/selinux/enforce").ok()?;
    if enforced.trim() != "1" {
        return None;
    }
    let label = |place: &Nearest| {
        let mut label = [0; 256];
        let length = getxattr(&place.there, "security.selinux", &mut label).unwrap_or(0);
        let label = String::from_utf8_lossy(&label[..length]);
        let label = label.trim_end_matches('\0');
        format!("{} has the label {label:?}", place.there.display())
    };
    let [image, writable] = places.map(label);
    Some(Finding::note(
        "SELinux",
        format!(
            "SELinux's rules are enforced, {image} and {writable}: containers need the \
             label of containerd's own snapshots: docs/containerd.md, \"SELinux\""
        ),
    ))
}

/// Warns of a writable directory in memory, which a reboot empties: the daemon then
/// treats the volume as missing.
fn lasting(config: &Config, writable: &Nearest) -> Option<Finding> {
    let is_memory = matches!(&*writable.mounted.file_system, "tmpfs" | "ramfs");
    (is_memory && config.writable_lifetime == Lifetime::Lasting).then(|| {
        Finding::note(
            "writable",
            "this file system is in memory, and a reboot empties it, after which no container \
             starts: if that is intended, give --writable-volatile",
        )
    })
}

fn find(path: &str) -> Result<Nearest> {
    let cannot = |error| {
        let what = format!("look at {path}");
        Error::caused(ErrorKind::FailedPrecondition, what, error)
    };
    let mut there = PathBuf::from(path);
    // A link that leads nowhere is not missing, and no directory can be created in its place. A
    // failed disk returns other errors.
    let is_missing = |path: &Path| {
        fs::symlink_metadata(path).is_err_and(|error| error.kind() == IoKind::NotFound)
    };
    while is_missing(&there) && there.pop() {}
    let meta = fs::metadata(&there).map_err(cannot)?;
    if !meta.is_dir() {
        let what = format!("{} is no directory", there.display());
        return Err(Error::refused(what));
    }
    let text = there.to_str().unwrap_or(path);
    let mounted = mountinfo::of_path(text)?.ok_or_else(|| {
        let what = format!("/proc/self/mountinfo does not list the mount that {text} is on");
        Error::refused(what)
    })?;
    Ok(Nearest {
        is_whole: there == Path::new(path),
        there,
        mounted,
    })
}

fn describe(topic: &'static str, path: &str, place: &Nearest) -> Finding {
    let mounted = &place.mounted;
    let room = statvfs(&place.there).map_or(String::new(), |state| {
        let size = state.f_blocks.saturating_mul(state.f_frsize);
        let free = state.f_bavail.saturating_mul(state.f_frsize);
        format!(", {}, {} free", bytes(size), bytes(free))
    });
    let on = format!("{}, {}{room}", mounted.source, mounted.file_system);
    let where_to = match (place.is_whole, mounted.point == place.there) {
        (true, true) => String::new(),
        (true, false) => format!(" in {}", mounted.point.display()),
        (false, _) => format!(
            " does not exist yet and would be created in {}",
            place.there.display()
        ),
    };
    Finding::good(topic, format!("{path}{where_to}: {on}"))
}

/// The directory in which an overlay is tried. No other program uses this name. If a killed
/// `doctor` has left this directory, the next `doctor` removes it. Its mounts have gone with
/// the mount namespace of the killed process.
const SCRATCH: &str = concat!(".", env!("CARGO_PKG_NAME"), "-doctor");

/// How to find out, with a real overlay, whether a directory can be a volume.
struct Trial {
    probe: fn(&Path, &[String]) -> Result<()>,
    good: &'static str,
}

const LAYERS: Trial = Trial {
    probe: probe_layers,
    good: "overlayfs can read layers there, and layers can move there",
};

const WRITES: Trial = Trial {
    probe: probe_upper,
    good: "overlayfs can write there, and directory entries have types",
};

/// Mounts an overlay in a directory, to find out whether the directory can be a volume.
fn try_overlay(topic: &'static str, place: &Nearest, trial: &Trial, options: &[String]) -> Finding {
    let scratch = place.there.join(SCRATCH);
    let remove = || match fs::remove_dir_all(&scratch) {
        Err(error) if error.kind() != IoKind::NotFound => Err(("remove", error)),
        _ => Ok(()),
    };
    let made = remove().and_then(|()| fs::create_dir(&scratch).map_err(|error| ("create", error)));
    if let Err((what, error)) = made {
        let hint = match error.kind() {
            IoKind::ReadOnlyFilesystem => "make it writable",
            IoKind::StorageFull => "make room there",
            _ => "try another directory",
        };
        let text = format!("cannot {what} {}: {error}: {hint}", scratch.display());
        return Finding::bad(topic, text);
    }
    let probed = (trial.probe)(&scratch, options);
    unmount_stale(&scratch.join(MERGED));
    if let Err((what, error)) = remove() {
        let text = format!("cannot {what} {}: {error}", scratch.display());
        return Finding::note(topic, text);
    }
    match probed {
        Ok(()) => Finding::good(topic, trial.good),
        Err(error) => {
            let hint = match options {
                _ if !has_overlay() => "this kernel has no overlayfs: load the module \"overlay\"",
                [] => "use ext4, XFS or btrfs",
                _ => "use ext4, XFS or btrfs, or try other values of --mount-option",
            };
            let path = place.there.display();
            let text = format!("{path} cannot be used: {}: {hint}", error.chain());
            Finding::bad(topic, text)
        }
    }
}

fn has_overlay() -> bool {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    known.split_whitespace().any(|name| name == "overlay")
}
