//! Checking that host directories do not overlap each other or the snapshotter's own
//! directories. Directories are compared by inode and device, because one directory
//! can have several paths.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, fstat, open, openat};
use rustix::io::Errno;

use super::walk::{DIRECTORY, path_of};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::mount::mountinfo::{Mounted, mount_of};

/// A device and an inode.
type Inode = (u64, u64);

/// Where a directory is, independent of the path that leads to it.
pub(super) struct Position {
    /// The directory itself and each directory above it.
    way_up: Vec<Inode>,
    place: Place,
}

/// The device of a file system (`major:minor`), and a path within that file system. A
/// bind mount can show one directory at several paths; this pair is the same for all of
/// them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    device: String,
    path: PathBuf,
}

impl Place {
    /// Whether this place is `outer` or below it.
    pub fn is_within(&self, outer: &Place) -> bool {
        self.device == outer.device && self.path.starts_with(&outer.path)
    }
}

impl Position {
    pub fn of(fd: impl AsFd, mounts: &[Mounted]) -> Result<Position> {
        let path = path_of(&fd)?;
        Ok(Position {
            way_up: way_up(&fd, &path)?,
            place: place_of(&fd, &path, mounts)?,
        })
    }

    /// The place of the directory, or the place of the names `missing` below it once they
    /// are created.
    pub fn place(&self, missing: &[Vec<u8>]) -> Place {
        let mut place = self.place.clone();
        place
            .path
            .extend(missing.iter().map(|name| OsStr::from_bytes(name)));
        place
    }

    /// Whether this directory is `outer` or below it.
    pub fn is_within(&self, outer: &Position) -> bool {
        self.way_up.contains(&outer.way_up[0]) || self.place.is_within(&outer.place)
    }

    /// Whether one directory is the other or contains it.
    pub fn overlaps(&self, other: &Position) -> bool {
        self.is_within(other) || other.is_within(self)
    }
}

fn inode(fd: impl AsFd) -> Result<Inode> {
    let stat = fstat(fd).context(|| "read the metadata of an opened directory")?;
    #[allow(clippy::unnecessary_cast)] // their widths differ among architectures
    Ok((stat.st_dev as u64, stat.st_ino as u64))
}

/// Lists a directory and all directories above it. `path` gives the number of steps: the
/// code cannot walk until `..` is the directory itself, because that is true at the top,
/// but may also be true where a directory is mounted in itself.
fn way_up(fd: impl AsFd, path: &[u8]) -> Result<Vec<Inode>> {
    let mut way = vec![inode(&fd)?];
    let mut at: Option<OwnedFd> = None;
    for _ in path
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty())
    {
        let from = at.as_ref().map_or(fd.as_fd(), AsFd::as_fd);
        let above = openat(from, c"..", DIRECTORY, Mode::empty())
            .context(|| "read the metadata of the directories above")?;
        way.push(inode(&above)?);
        at = Some(above);
    }
    Ok(way)
}

/// The place of an opened directory on its file system.
fn place_of(fd: impl AsFd, path: &[u8], mounts: &[Mounted]) -> Result<Place> {
    let path = Path::new(OsStr::from_bytes(path));
    mount_of(fd, mounts)?
        .and_then(|mounted| place_on(mounted, path))
        .ok_or_else(|| {
            Error::new(
                ErrorKind::Unavailable,
                "the mount of the directory has changed meanwhile: try again",
            )
        })
}

fn place_on(mounted: &Mounted, path: &Path) -> Option<Place> {
    let below = path.strip_prefix(&mounted.point).ok()?;
    Some(Place {
        device: mounted.device.clone(),
        path: mounted.root.join(below),
    })
}

/// Opens one of the snapshotter's own directories, which host directories must not
/// overlap; `None` if the directory does not exist.
pub(super) fn open_kept(path: &str) -> Result<Option<OwnedFd>> {
    match open(path, DIRECTORY, Mode::empty()) {
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        fd => fd.map(Some).context(|| format!("open {path}")),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::mount::mountinfo;

    #[test]
    fn a_place_is_the_same_through_bind_mounts() {
        let mounted = |device: &str, root: &str, point: &str| Mounted {
            device: device.to_owned(),
            root: root.into(),
            point: point.into(),
            ..Mounted::default()
        };
        let mounts = [
            mounted("8:1", "/", "/"),
            mounted("8:2", "/snapshots/5", "/cache"),
        ];
        let place = |mount: usize, path: &str| place_on(&mounts[mount], Path::new(path));
        let on = |device: &str, path: &str| {
            Some(Place {
                device: device.to_owned(),
                path: PathBuf::from(path),
            })
        };
        assert_eq!(place(1, "/cache/fs"), on("8:2", "/snapshots/5/fs"));
        assert_eq!(place(1, "/other"), None);
        assert_eq!(place(0, "/"), on("8:1", "/"));
    }

    #[test]
    fn directories_overlap_those_above_and_beneath() {
        let dir = tempfile::tempdir().unwrap();
        let mounts = mountinfo::read().unwrap();
        let position = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(&path).unwrap();
            let fd = open(&path, DIRECTORY, Mode::empty()).unwrap();
            Position::of(fd, &mounts).unwrap()
        };
        let (a, above, beside) = (position("a/b"), position("a"), position("a/bb"));
        assert!(a.overlaps(&a) && a.overlaps(&above) && above.overlaps(&a));
        assert!(!a.overlaps(&beside));
        let top = open("/", DIRECTORY, Mode::empty()).unwrap();
        assert!(Position::of(top, &mounts).unwrap().overlaps(&a));
    }
}
