//! What a volume has to be before it is used: mounted, and with room left.

use std::path::Path;

use rustix::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags, Timespec, Timestamps, fstat, fstatvfs,
    futimens, openat, stat, statfs, statx, unlinkat,
};
use rustix::io::Errno;

use super::Dirs;
use super::dirs::open_to_list;
use super::paths::{NEW_MARK, PROBE, SNAPSHOTS, TRASH};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::util::entries::{entries, is_empty};

/// How long what is on the writable volume is meant to last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// As long as its disk. An empty one is another disk.
    Lasting,
    /// Until a reboot at most (tmpfs, zram). An empty one begins anew.
    UntilReboot,
}

/// What a directory holds that is to become a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    /// Nothing, or what a file system has by itself, or empty directories of ours.
    Nothing,
    /// Something of somebody else's.
    OtherFiles,
    /// Something where snapshots and trash would be.
    OurNames,
}

/// What has to stay free on the writable volume when a snapshot is made there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserve {
    /// That many bytes.
    Bytes(u64),
    /// That part of the volume's size, in percent.
    Percent(u8),
}

impl Reserve {
    /// In bytes, on a volume of that size.
    pub fn bytes(self, size_bytes: u64) -> u64 {
        match self {
            Reserve::Bytes(bytes) => bytes,
            Reserve::Percent(percent) => {
                let part = u128::from(size_bytes) * u128::from(percent) / 100;
                u64::try_from(part).expect("a part is no more than the whole")
            }
        }
    }
}

/// How large a volume is, and how much of it is free to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// The size of its file system.
    pub size_bytes: u64,
    /// What is free of that.
    pub free_bytes: u64,
}

/// What nothing uses on a volume, with what its file system keeps for root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unused {
    /// Bytes.
    pub bytes: u64,
    /// Inodes; the highest number where they are not counted, as on btrfs.
    pub inodes: u64,
}

impl Dirs {
    /// What nothing uses on the volume. Asks no disk.
    pub fn unused(&self) -> Result<Unused> {
        let state = fstatvfs(self.snapshots_fd())
            .context(|| format!("look how full {} is", self.path()))?;
        Ok(Unused {
            bytes: state.f_bfree.saturating_mul(state.f_frsize),
            inodes: match state.f_files {
                0 => u64::MAX,
                _ => state.f_ffree,
            },
        })
    }

    /// Tells how full the volume is. Asks no disk.
    pub fn room(&self) -> Result<Room> {
        let state = fstatvfs(self.snapshots_fd())
            .context(|| format!("look how full {} is", self.path()))?;
        Ok(Room {
            size_bytes: state.f_blocks.saturating_mul(state.f_frsize),
            free_bytes: state.f_bavail.saturating_mul(state.f_frsize),
        })
    }

    /// Refuses a new snapshot where the volume has less room than `reserve`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ResourceExhausted`] saying how much is free and how much should be.
    pub fn require_room(&self, reserve: Reserve) -> Result<()> {
        if reserve == Reserve::Bytes(0) {
            return Ok(());
        }
        let room = self.room()?;
        let (free, wanted) = (room.free_bytes, reserve.bytes(room.size_bytes));
        if free >= wanted {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::ResourceExhausted,
            format!(
                "{} has {} MiB free, less than the reserve of {} MiB (--reserve): remove \
                 containers, or make the volume larger",
                self.path(),
                free >> 20,
                wanted >> 20
            ),
        ))
    }
}

/// Refuses each of these directories, given with the flag that names it, that
/// is not there or no mount point. Creates nothing.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] naming the directory and what to do.
pub fn require_mount_points(directories: &[(&str, &str)]) -> Result<()> {
    for (flag, path) in directories {
        let why = match is_mount_point(path) {
            Ok(true) => continue,
            Ok(false) => "is no mount point",
            Err(Errno::NOENT | Errno::NOTDIR) => "does not exist",
            Err(errno) => return Err(errno).context(|| format!("look at {path}")),
        };
        return Err(Error::refused(format!(
            "{flag} {path} {why}: mount its disk there (--require-mount asks for it before \
                 anything is written)"
        )));
    }
    Ok(())
}

/// Tells what an opened directory holds, beside a mark.
pub(super) fn holding(top: OwnedFd) -> std::result::Result<Holding, Errno> {
    for name in [SNAPSHOTS, TRASH] {
        match open_to_list(&top, name) {
            Ok(fd) => {
                if !is_empty(fd)? {
                    return Ok(Holding::OurNames);
                }
            }
            Err(Errno::NOENT) => {}
            Err(Errno::NOTDIR | Errno::LOOP) => return Ok(Holding::OurNames),
            Err(errno) => return Err(errno),
        }
    }
    let usual = ["lost+found", SNAPSHOTS, TRASH, PROBE, NEW_MARK].map(str::as_bytes);
    for entry in entries(top)? {
        if !usual.contains(&entry?.file_name().to_bytes()) {
            return Ok(Holding::OtherFiles);
        }
    }
    Ok(Holding::Nothing)
}

/// Whether a writable directory that is empty, or not there, can be a volume
/// that a reboot has emptied, and not the bare mount point of one that is not
/// mounted: it is a mount point, or on (to be made on) a file system in memory.
pub(super) fn is_mounted_anew(path: &str) -> std::result::Result<bool, Errno> {
    let mut existing = Path::new(path);
    while !existing.exists() {
        existing = existing.parent().unwrap_or(Path::new("/"));
    }
    if is_in_memory(existing)? {
        return Ok(true);
    }
    Ok(existing == Path::new(path) && is_mount_point(path)?)
}

fn is_in_memory(path: &Path) -> std::result::Result<bool, Errno> {
    // linux/magic.h
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    Ok(matches!(file_system_type(path)?, TMPFS | RAMFS))
}

pub(super) fn file_system_type(path: &Path) -> std::result::Result<u64, Errno> {
    #[allow(clippy::unnecessary_cast)] // its width differs among architectures
    statfs(path).map(|state| state.f_type as u64)
}

pub(super) fn is_mount_point(path: &str) -> std::result::Result<bool, Errno> {
    let told = statx(CWD, path, AtFlags::empty(), StatxFlags::empty());
    if let Ok(told) = told
        && told
            .stx_attributes_mask
            .contains(StatxAttributes::MOUNT_ROOT)
    {
        return Ok(told.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
    }
    // Before Linux 5.8; a bind mount of the same file system goes unnoticed.
    let parent = format!("{path}/..");
    Ok(stat(path)?.st_dev != stat(parent.as_str())?.st_dev)
}

/// Whether a file system keeps times as layers have them: to the nanosecond, and beyond
/// 2038. ext4 with inodes of 128 bytes, ext3 and ext2 do not, and report no error. A file
/// is made for a moment in `directory`.
pub fn keeps_times(directory: impl AsFd) -> Result<bool> {
    const NAME: &str = ".times";
    let asking = || "look which times the file system keeps";
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = openat(&directory, NAME, flags, Mode::from_raw_mode(0o600)).context(asking)?;
    unlinkat(&directory, NAME, AtFlags::empty()).context(asking)?;
    let time = Timespec {
        // In the year 2100.
        tv_sec: 4_102_444_800,
        tv_nsec: 123_456_789,
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    futimens(&file, &times).context(asking)?;
    let stat = fstat(&file).context(asking)?;
    Ok(stat.st_mtime == time.tv_sec && i64::try_from(stat.st_mtime_nsec) == Ok(time.tv_nsec))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_told_from_directories() {
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().to_str().unwrap();
        require_mount_points(&[("--root-dir", "/proc")]).unwrap();
        let text = require_mount_points(&[("--root-dir", "/proc"), ("--writable-dir", plain)])
            .unwrap_err()
            .chain();
        assert!(
            text.contains("--writable-dir") && text.contains(plain),
            "{text}"
        );
        let missing = format!("{plain}/missing");
        let error = require_mount_points(&[("--root-dir", &missing)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        assert!(
            error.chain().contains("does not exist"),
            "{}",
            error.chain()
        );
    }

    #[test]
    fn a_bare_mount_point_is_no_emptied_volume() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let bare = dir.path().to_str().unwrap();
        assert_eq!(is_mounted_anew("/proc"), Ok(true), "a mount point");
        assert_eq!(is_mounted_anew("/dev/shm/a/b"), Ok(true), "in memory");
        assert_eq!(is_mounted_anew(bare), Ok(false));
        assert_eq!(is_mounted_anew(&format!("{bare}/a/b")), Ok(false));
    }

    #[test]
    fn what_a_directory_holds_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path();
        let held = || holding(open_to_list(CWD, top.to_str().unwrap()).unwrap()).unwrap();
        assert_eq!(held(), Holding::Nothing);
        for name in ["lost+found", "snapshots", "trash"] {
            std::fs::create_dir(top.join(name)).unwrap();
        }
        assert_eq!(held(), Holding::Nothing);
        std::fs::write(top.join("photo"), "x").unwrap();
        assert_eq!(held(), Holding::OtherFiles);
        std::fs::create_dir(top.join("trash/7")).unwrap();
        assert_eq!(held(), Holding::OurNames);
        std::fs::remove_dir_all(top.join("trash")).unwrap();
        std::fs::write(top.join("trash"), "x").unwrap();
        assert_eq!(held(), Holding::OurNames);
    }

    #[test]
    fn a_percentage_is_of_the_volume() {
        assert_eq!(Reserve::Percent(5).bytes(4096 * 1000), 4096 * 50);
        assert_eq!(Reserve::Bytes(7).bytes(4096), 7);
    }
}
