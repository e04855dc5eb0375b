//! Checks of a volume before it is used: that it is mounted, and has room left.

use std::path::Path;

use rustix::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags, Timespec, Timestamps, fstat, fstatvfs,
    futimens, openat, stat, statfs, statx, unlinkat,
};
use rustix::io::Errno;

use super::Dirs;
use super::dirs::open_to_list;
use super::paths::{MARK, NEW_MARK, PROBE, SNAPSHOTS, TRASH};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::util::entries::{entries, is_empty};

/// How long the files on the writable volume are meant to last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// As long as the disk. If the volume is empty, it must be another disk.
    Lasting,
    /// Until a reboot at most (tmpfs, zram). An empty volume is normal after a reboot.
    UntilReboot,
}

/// The kind of content of a directory that will become a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holding {
    /// Nothing, or only empty directories of this program and `lost+found`.
    Nothing,
    /// Files of another program.
    OtherFiles,
    /// Something in `snapshots` or `trash`.
    OurNames,
}

/// How much space has to be free on the writable volume, or no snapshot is created there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reserve {
    /// This number of bytes.
    Bytes(u64),
    /// This percentage of the volume's size.
    Percent(u8),
}

impl Reserve {
    /// The reserve in bytes, for a volume of that size.
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

/// The size of a volume, and how much of it is free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// The size of the volume's file system.
    pub size_bytes: u64,
    /// The free space, without the part that is reserved for root.
    pub free_bytes: u64,
}

/// The free space of a volume, including what its file system reserves for
/// root.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unused {
    /// The free bytes.
    pub bytes: u64,
    /// The free inodes; `u64::MAX` if the file system does not count them, as btrfs.
    pub inodes: u64,
}

impl Dirs {
    /// The free space of the volume. No disk is accessed.
    pub fn unused(&self) -> Result<Unused> {
        let state = fstatvfs(self.snapshots_fd())
            .context(|| format!("find out how much space is free on {}", self.path()))?;
        Ok(Unused {
            bytes: state.f_bfree.saturating_mul(state.f_frsize),
            inodes: match state.f_files {
                0 => u64::MAX,
                _ => state.f_ffree,
            },
        })
    }

    /// The size and the free space of the volume. No disk is accessed.
    pub fn room(&self) -> Result<Room> {
        let state = fstatvfs(self.snapshots_fd())
            .context(|| format!("find out how much space is free on {}", self.path()))?;
        Ok(Room {
            size_bytes: state.f_blocks.saturating_mul(state.f_frsize),
            free_bytes: state.f_bavail.saturating_mul(state.f_frsize),
        })
    }

    /// Returns an error if less than `reserve` is free on the volume.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ResourceExhausted`], which names the free space and the reserve.
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

/// Returns an error if `path`, the value of `flag`, does not exist or is not a mount point.
/// Creates nothing.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`], which names the directory and the remedy.
pub fn require_mount(flag: &str, path: &str) -> Result<()> {
    let why = match is_mount_point(path) {
        Ok(true) => return Ok(()),
        Ok(false) => "is not a mount point",
        Err(Errno::NOENT | Errno::NOTDIR) => "does not exist",
        Err(errno) => return Err(errno).context(|| format!("look at {path}")),
    };
    Err(Error::refused(format!(
        "{flag} {path} {why}: mount its disk there (with --require-mount, nothing is written \
         without it)"
    )))
}

/// The kind of content of an opened directory. A mark does not count.
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

/// Whether a writable directory that is empty, or does not exist, can be a
/// volume that a reboot has emptied, rather than a bare mount point: it is a
/// mount point itself, or is, or would be created, on a file system in memory.
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
    let found = statx(CWD, path, AtFlags::empty(), StatxFlags::empty());
    if let Ok(found) = found
        && found
            .stx_attributes_mask
            .contains(StatxAttributes::MOUNT_ROOT)
    {
        return Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
    }
    // Before Linux 5.8, only another device number shows a mount point. A bind mount from the
    // same file system is not recognized.
    let parent = format!("{path}/..");
    Ok(stat(path)?.st_dev != stat(parent.as_str())?.st_dev)
}

/// Whether a file system can store times to the nanosecond and after 2038, as layers need.
/// ext2, ext3, and ext4 with 128-byte inodes cannot store such times, and report no error.
/// The check creates a file in `directory` and deletes it.
pub fn keeps_times(directory: impl AsFd) -> Result<bool> {
    const NAME: &str = ".times";
    let asking = || "find out which times the file system can store";
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

pub(super) fn emptied(path: &str) -> Error {
    Error::refused(format!(
        "the writable volume {path} was emptied: it has its mark, but no directory {SNAPSHOTS}. \
         Put its files back; or, to give up everything that containers have written, stop the \
         daemon, remove {path}/{MARK} and run `check --reset-writable`"
    ))
}

pub(super) fn no_directory(path: &str, name: &str) -> Error {
    Error::refused(format!("{path}/{name} is not a directory: move it away"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_differ_from_directories() {
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().to_str().unwrap();
        require_mount("--root-dir", "/proc").unwrap();
        let error = require_mount("--writable-dir", plain).unwrap_err();
        let text = error.chain();
        assert!(
            text.contains("--writable-dir") && text.contains(plain),
            "{text}"
        );
        let missing = format!("{plain}/missing");
        let error = require_mount("--root-dir", &missing).unwrap_err();
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
    fn the_content_of_a_directory_is_recognised() {
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
