//! The identity of the writable volume: a random number in `<writable>/.volume`
//! that is also recorded in the database. A bare mount point, or another disk,
//! does not have this number.

use std::fmt;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, Stat, fstat, fsync, open, openat, statat, unlinkat,
};
use rustix::io::{Errno, read};
use rustix::rand::{GetRandomFlags, getrandom};

use super::durable::replace_file;
use super::paths::{IDS, MARK, SNAPSHOTS};
use crate::error::{Context, Error, Result};
use crate::util::cached_lookup::{Glance, glance};

const HEX_DIGITS: usize = 32;

/// A random 128-bit number, written as 32 hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity(String);

impl Identity {
    /// The name of the fact under which a database keeps its own identity.
    pub const FACT: &str = "identity";

    /// A new identity.
    pub fn random() -> Result<Identity> {
        let mut bytes = [0_u8; HEX_DIGITS / 2];
        let length =
            getrandom(&mut bytes, GetRandomFlags::empty()).context(|| "get random bytes")?;
        debug_assert_eq!(length, bytes.len(), "getrandom(2) fills up to 256 bytes");
        Ok(Identity(
            bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        ))
    }

    /// Parses the text that [`fmt::Display`] writes; `None` for any other text.
    pub fn parse(text: &str) -> Option<Identity> {
        let is_ours = text.len() == HEX_DIGITS
            && text
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        is_ours.then(|| Identity(text.to_owned()))
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// Whose mark a directory has.
#[derive(Debug, PartialEq, Eq)]
pub enum Claim {
    /// The directory has the mark of the expected volume.
    Ours,
    /// The directory has no mark.
    Free,
    /// The directory has the mark of another volume.
    Foreign(Identity),
}

impl Identity {
    /// Returns whose mark the directory `top` has.
    ///
    /// # Errors
    ///
    /// `ErrorKind::FailedPrecondition` if the file `.volume` is not a mark of this
    /// program.
    pub fn look(&self, top: impl AsFd, path: &str) -> Result<Claim> {
        Ok(match read_mark(top, path)? {
            Some(found) if found == *self => Claim::Ours,
            Some(found) => Claim::Foreign(found),
            None => Claim::Free,
        })
    }

    /// Marks the directory `top` as this volume, durably, unless it has a mark
    /// already.
    ///
    /// # Errors
    ///
    /// `ErrorKind::FailedPrecondition` if the file `.volume` is not a mark of this
    /// program.
    pub fn claim(&self, top: impl AsFd, path: &str) -> Result<Claim> {
        match self.look(&top, path)? {
            Claim::Free => {
                replace_file(&top, MARK, &format!("{self}\n"))
                    .context(|| format!("mark {path} as the writable volume"))?;
                Ok(Claim::Ours)
            }
            claim => Ok(claim),
        }
    }

    /// Removes this mark from the directory `top`, durably. The mark of another
    /// volume stays.
    pub fn unmark(&self, top: impl AsFd, path: &str) -> Result<()> {
        if self.look(&top, path)? != Claim::Ours {
            return Ok(());
        }
        unlinkat(&top, MARK, AtFlags::empty())
            .and_then(|()| fsync(&top))
            .context(|| format!("remove {path}/{MARK}"))
    }
}

/// Metadata of a volume's mark, of its record of ids, and of its directory of snapshots. As
/// long as the metadata is the same, the files need not be read again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    mark: SeenFile,
    ids: Option<SeenFile>,
    snapshots: (u64, u64),
}

/// The inode and times of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct SeenFile {
    device: u64,
    inode: u64,
    changed: (i64, i64),
    written: (i64, i64),
}

impl Seen {
    /// Reads the metadata below the directory `top`; `None` if the mark or `snapshots` is
    /// missing or cannot be read.
    pub(super) fn in_directory(top: impl AsFd) -> Option<Seen> {
        Seen::by(|name| statat(&top, name, AtFlags::SYMLINK_NOFOLLOW).ok())
    }

    /// Replaces the metadata of the record of ids by that of the file in the directory `top`.
    pub(super) fn with_ids_of(self, top: impl AsFd) -> Seen {
        let ids = statat(top, IDS, AtFlags::SYMLINK_NOFOLLOW);
        Seen {
            ids: ids.ok().map(SeenFile::of),
            ..self
        }
    }

    /// Reads the metadata below the directory `path`; `None` if the mark or `snapshots` is
    /// missing or cannot be read.
    pub(super) fn in_path(path: &str) -> Option<Seen> {
        Seen::by(|name| statat(CWD, format!("{path}/{name}"), AtFlags::SYMLINK_NOFOLLOW).ok())
    }

    /// Like [`Seen::in_path`], but no disk is accessed: `None` also if the kernel does not
    /// have the metadata in memory.
    pub(super) fn at_a_glance(path: &str) -> Option<Seen> {
        Seen::by(|name| match glance(CWD, &format!("{path}/{name}")) {
            Glance::There(file) => fstat(file).ok(),
            Glance::Absent | Glance::Unknown => None,
        })
    }

    #[allow(clippy::unnecessary_cast)] // their types differ among architectures
    fn by(look: impl Fn(&str) -> Option<Stat>) -> Option<Seen> {
        let snapshots = look(SNAPSHOTS)?;
        Some(Seen {
            mark: SeenFile::of(look(MARK)?),
            ids: look(IDS).map(SeenFile::of),
            snapshots: (snapshots.st_dev as u64, snapshots.st_ino as u64),
        })
    }
}

impl SeenFile {
    #[allow(clippy::unnecessary_cast)] // their types differ among architectures
    fn of(stat: Stat) -> SeenFile {
        SeenFile {
            device: stat.st_dev as u64,
            inode: stat.st_ino as u64,
            changed: (stat.st_ctime as i64, stat.st_ctime_nsec as i64),
            written: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
        }
    }
}

/// Reads the mark in the directory `path` and ignores its content: the caller wants to wait
/// until the disk answers.
pub fn ask_for_mark(path: &str) {
    if let Ok(top) = open_top(path) {
        let _ = read_mark(top, path);
    }
}

/// Returns an error unless the opened writable directory is the volume of that
/// identity.
pub(super) fn confirm(top: impl AsFd, path: &str, identity: &Identity) -> Result<()> {
    match read_mark(top, path)? {
        Some(found) if found == *identity => Ok(()),
        Some(found) => Err(missing(
            path,
            identity,
            &format!("the disk there is another one (volume {found})"),
        )),
        None => Err(missing(
            path,
            identity,
            "the directory has no file .volume (if it is the right disk all the same, write the \
             number of the volume into a file of that name)",
        )),
    }
}

fn missing(path: &str, identity: &Identity, why: &str) -> Error {
    Error::refused(format!(
        "the writable volume is not at {path}: {why}; \
             mount the disk that was there (volume {identity})"
    ))
}

/// Opens the directory in which the volume of that identity should be.
pub(super) fn open_expected(path: &str, identity: &Identity) -> Result<OwnedFd> {
    match open_top(path) {
        Err(Errno::NOENT | Errno::NOTDIR) => {
            Err(missing(path, identity, "there is no such directory"))
        }
        top => top.context(|| format!("open the writable volume {path}")),
    }
}

pub(super) fn open_top(path: &str) -> std::result::Result<OwnedFd, Errno> {
    open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

fn read_mark(top: impl AsFd, path: &str) -> Result<Option<Identity>> {
    let reading = || format!("read {path}/{MARK}");
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match openat(&top, MARK, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        file => file.context(reading)?,
    };
    let mut bytes = [0_u8; 64];
    let stat = fstat(&file).context(reading)?;
    let length = if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
        read(&file, &mut bytes).context(reading)?
    } else {
        0
    };
    let identity = std::str::from_utf8(&bytes[..length])
        .ok()
        .and_then(|text| Identity::parse(text.trim_end()));
    identity.map(Some).ok_or_else(|| {
        Error::refused(format!(
            "{path}/{MARK} is not the mark of a writable volume: choose another --writable-dir, \
             or, if this is the writable volume, remove that file and run `check --repair`"
        ))
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::error::ErrorKind;

    fn claim(identity: &Identity, dir: &std::path::Path) -> Result<Claim> {
        let path = dir.to_str().unwrap();
        identity.claim(open_top(path).unwrap(), path)
    }

    fn open_confirmed(path: &str, identity: &Identity) -> Result<()> {
        confirm(open_expected(path, identity)?, path, identity)
    }

    #[test]
    fn another_mark_is_seen_as_another() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        claim(&Identity::random().unwrap(), dir.path()).unwrap();
        assert_eq!(Seen::in_path(path), None);
        fs::create_dir(dir.path().join(SNAPSHOTS)).unwrap();
        let seen = Seen::in_path(path).unwrap();
        assert_eq!(Seen::in_path(path), Some(seen));
        assert_eq!(Seen::in_directory(open_top(path).unwrap()), Some(seen));
        assert_eq!(Seen::at_a_glance(path), Some(seen));
        let other = Identity::random().unwrap();
        replace_file(open_top(path).unwrap(), MARK, &other.to_string()).unwrap();
        assert_ne!(Seen::in_path(path), Some(seen));
    }

    #[test]
    fn a_mark_is_written_once_and_recognised() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        let (ours, other) = (Identity::random().unwrap(), Identity::random().unwrap());
        assert_ne!(ours, other);
        let bare = open_confirmed(path, &ours).unwrap_err();
        assert_eq!(bare.kind(), ErrorKind::FailedPrecondition);
        assert_eq!(
            fs::read_dir(path).unwrap().count(),
            0,
            "a look creates nothing"
        );

        assert_eq!(claim(&ours, dir.path()).unwrap(), Claim::Ours);
        assert_eq!(claim(&ours, dir.path()).unwrap(), Claim::Ours);
        assert_eq!(
            claim(&other, dir.path()).unwrap(),
            Claim::Foreign(ours.clone())
        );
        open_confirmed(path, &ours).unwrap();
        let wrong = open_confirmed(path, &other).unwrap_err().chain();
        assert!(
            wrong.contains(path) && wrong.contains(&ours.to_string()),
            "{wrong}"
        );
    }

    #[test]
    fn what_is_no_mark_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let ours = Identity::random().unwrap();
        for strange in [
            "",
            "hello\n",
            &"a".repeat(33),
            "0123456789ABCDEF0123456789ABCDEF",
        ] {
            fs::write(dir.path().join(MARK), strange).unwrap();
            let error = claim(&ours, dir.path()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
            assert_eq!(fs::read_to_string(dir.path().join(MARK)).unwrap(), strange);
        }
        fs::remove_file(dir.path().join(MARK)).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", dir.path().join(MARK)).unwrap();
        claim(&ours, dir.path()).unwrap_err();
    }
}
