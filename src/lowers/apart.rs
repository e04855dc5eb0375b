//! Keeping extra directories apart from what the snapshotter itself keeps, and
//! from each other, by what they are and not by how they are called.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{Mode, fstat, open, openat};
use rustix::io::Errno;

use super::walk::{DIRECTORY, path_of};
use crate::error::{Context, Error, ErrorKind, Result};

/// A device and an inode.
type Inode = (u64, u64);

/// Where a directory is, however it may be reached.
pub(super) struct Position {
    /// Itself and each directory above it.
    way_up: Vec<Inode>,
    place: Place,
}

/// A file system's device as the kernel writes it, and a path on it: a bind
/// mount shows a directory beneath others than it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    device: String,
    path: PathBuf,
}

impl Place {
    /// Whether it is that place, or in it.
    pub fn is_within(&self, outer: &Place) -> bool {
        self.device == outer.device && self.path.starts_with(&outer.path)
    }
}

impl Position {
    pub fn of(fd: impl AsFd, mounts: &Mounts) -> Result<Position> {
        let path = path_of(&fd)?;
        Ok(Position {
            way_up: way_up(&fd, &path)?,
            place: mounts.place_of(&fd, &path)?,
        })
    }

    /// Where it is, or where a directory will be that is created beneath it.
    pub fn place(&self, missing: &[Vec<u8>]) -> Place {
        let mut place = self.place.clone();
        place
            .path
            .extend(missing.iter().map(|name| OsStr::from_bytes(name)));
        place
    }

    /// Whether it is that directory, or somewhere in it.
    pub fn is_within(&self, outer: &Position) -> bool {
        self.way_up.contains(&outer.way_up[0]) || self.place.is_within(&outer.place)
    }

    /// Whether one is the other or within it.
    pub fn overlaps(&self, other: &Position) -> bool {
        self.is_within(other) || other.is_within(self)
    }
}

fn inode(fd: impl AsFd) -> Result<Inode> {
    let stat = fstat(fd).context(|| "look at an opened directory")?;
    #[allow(clippy::unnecessary_cast)] // their widths differ among architectures
    Ok((stat.st_dev as u64, stat.st_ino as u64))
}

/// As many steps as the path has names: `..` of the top is the top itself, but
/// so may be `..` of a directory that is mounted in itself.
fn way_up(fd: impl AsFd, path: &[u8]) -> Result<Vec<Inode>> {
    let mut way = vec![inode(&fd)?];
    let mut at: Option<OwnedFd> = None;
    for _ in path
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty())
    {
        let from = at.as_ref().map_or(fd.as_fd(), AsFd::as_fd);
        let above = openat(from, c"..", DIRECTORY, Mode::empty())
            .context(|| "look at the directories above")?;
        way.push(inode(&above)?);
        at = Some(above);
    }
    Ok(way)
}

/// The mounts of this process's namespace (proc_pid_mountinfo(5)).
pub(super) struct Mounts(Vec<Mounted>);

struct Mounted {
    id: Vec<u8>,
    device: String,
    root: PathBuf,
    point: PathBuf,
}

impl Mounts {
    pub fn read() -> Result<Mounts> {
        let text = fs::read("/proc/self/mountinfo").map_err(|error| {
            Error::caused(ErrorKind::Internal, "read /proc/self/mountinfo", error)
        })?;
        Ok(Mounts::parse(&text))
    }

    fn parse(text: &[u8]) -> Mounts {
        let parse = |line: &[u8]| {
            let mut fields = line.split(|byte| *byte == b' ');
            let id = fields.next()?.to_vec();
            let device = String::from_utf8_lossy(fields.nth(1)?).into_owned();
            Some(Mounted {
                id,
                device,
                root: unescape(fields.next()?),
                point: unescape(fields.next()?),
            })
        };
        Mounts(
            text.split(|byte| *byte == b'\n')
                .filter_map(parse)
                .collect(),
        )
    }

    fn place_of(&self, fd: impl AsFd, path: &[u8]) -> Result<Place> {
        let number = fd.as_fd().as_raw_fd();
        let told = fs::read(format!("/proc/self/fdinfo/{number}")).map_err(|error| {
            Error::caused(ErrorKind::Internal, "ask on which mount it is", error)
        })?;
        let id = told
            .split(|byte| *byte == b'\n')
            .find_map(|line| line.strip_prefix(b"mnt_id:"))
            .map(<[u8]>::trim_ascii);
        let path = Path::new(OsStr::from_bytes(path));
        self.0
            .iter()
            .find(|mounted| Some(&*mounted.id) == id)
            .and_then(|mounted| mounted.place(path))
            .ok_or_else(|| {
                Error::new(
                    ErrorKind::Unavailable,
                    "the mount it is on has changed meanwhile: try again",
                )
            })
    }
}

impl Mounted {
    fn place(&self, path: &Path) -> Option<Place> {
        let below = path.strip_prefix(&self.point).ok()?;
        Some(Place {
            device: self.device.clone(),
            path: self.root.join(below),
        })
    }
}

/// The kernel writes blanks and backslashes as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        match after {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', left @ ..] if *first == b'\\' => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = left;
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// Opens a directory that is to be kept apart; `None` if it is not there.
pub(super) fn open_kept(path: &str) -> Result<Option<OwnedFd>> {
    match open(path, DIRECTORY, Mode::empty()) {
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        fd => fd.map(Some).context(|| format!("open {path}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_told_through_bind_mounts() {
        let mounts = Mounts::parse(
            b"22 1 8:1 / / rw - ext4 /dev/a rw\n\
              35 22 8:2 /snap\\040shots/5 /cache\\134x rw shared:1 - ext4 /dev/b rw\n",
        );
        assert_eq!(mounts.0.len(), 2);
        let place = |mount: usize, path: &str| mounts.0[mount].place(Path::new(path));
        let on = |device: &str, path: &str| {
            Some(Place {
                device: device.to_owned(),
                path: PathBuf::from(path),
            })
        };
        assert_eq!(place(1, "/cache\\x/fs"), on("8:2", "/snap shots/5/fs"));
        assert_eq!(place(1, "/other"), None);
        assert_eq!(place(0, "/"), on("8:1", "/"));
    }

    #[test]
    fn directories_overlap_those_above_and_beneath() {
        let dir = tempfile::tempdir().unwrap();
        let mounts = Mounts::read().unwrap();
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
