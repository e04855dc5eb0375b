//! Taking over volumes that another program has filled, and giving them back.
//!
//! Opening such a volume creates nothing on it. Directories that are not taken over
//! are set aside in `<volume>/left-out/<id>`. After a crash, only some of them may
//! have been set aside; the next try puts all of them back first.

use std::collections::HashMap;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, FileType, Stat, fstat, fsync, statat, syncfs, unlinkat};
use rustix::io::Errno;

use super::dirs::{ensure_directory, list, move_aside, open_to_list, open_upper, stop_handing_on};
use super::identity;
use super::image::no_entry_types;
use super::paths::{EMPTY, IDS, LEFT_OUT, SNAPSHOTS, TRASH, upper_of};
use super::preconditions::no_directory;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::types::{SnapshotId, Volume};

/// A volume that another program has filled.
pub struct Filled {
    volume: Volume,
    path: String,
    top: OwnedFd,
    snapshots: OwnedFd,
}

impl Filled {
    /// Opens the volume at `path`; `None` if there is no such directory, or it has no
    /// `snapshots`, like a bare mount point.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if `snapshots` is not a directory.
    pub fn open(volume: Volume, path: &str) -> Result<Option<Filled>> {
        let top = match identity::open_top(path) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            top => top.context(|| format!("open the {volume} volume {path}"))?,
        };
        match open_to_list(&top, SNAPSHOTS) {
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::NOTDIR | Errno::LOOP) => Err(no_directory(path, SNAPSHOTS)),
            snapshots => Ok(Some(Filled {
                volume,
                path: path.to_owned(),
                top,
                snapshots: snapshots.context(|| format!("open {path}/{SNAPSHOTS}"))?,
            })),
        }
    }

    /// Whether this is the image volume or the writable one.
    pub fn volume(&self) -> Volume {
        self.volume
    }

    /// The path of the volume, as configured.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The volume's directory itself.
    pub fn top(&self) -> impl AsFd {
        &self.top
    }

    /// The numbered entries of `snapshots/`, and the names of all others.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if the file system does not report which
    /// entries are directories.
    pub fn numbered(&self) -> Result<(HashMap<SnapshotId, FileType>, Vec<String>)> {
        let mut numbered = HashMap::new();
        let mut others = Vec::new();
        for entry in list(&self.snapshots, &self.path, SNAPSHOTS)? {
            if entry.file_type == FileType::Unknown {
                return Err(no_entry_types(&self.path));
            }
            match SnapshotId::from_directory_name(entry.name.to_bytes()) {
                Some(id) => drop(numbered.insert(id, entry.file_type)),
                None => others.push(entry.name.to_string_lossy().into_owned()),
            }
        }
        others.sort();
        Ok((numbered, others))
    }

    /// Whether a snapshot has a directory `fs` on this volume.
    pub fn has_upper(&self, id: SnapshotId) -> Result<bool> {
        // If the snapshot's own directory is a link, opening the path below
        // would follow it.
        Ok(self.is_directory(&id.to_string())? && self.is_directory(&upper_of(id))?)
    }

    fn is_directory(&self, name: &str) -> Result<bool> {
        match statat(&self.snapshots, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
            found => found
                .map(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
                .context(|| format!("look at {}/{SNAPSHOTS}/{name}", self.path)),
        }
    }

    /// Opens a snapshot's `fs`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if the snapshot has no `fs`.
    pub fn open_upper(&self, id: SnapshotId) -> Result<OwnedFd> {
        open_upper(&self.snapshots, &self.path, id)
    }

    /// The metadata of `snapshots/`.
    pub fn stat_snapshots(&self) -> Result<Stat> {
        fstat(&self.snapshots).context(|| format!("look at {}/{SNAPSHOTS}", self.path))
    }

    /// The metadata of a snapshot's `fs`; `None` if it cannot be read.
    pub fn stat_upper(&self, id: SnapshotId) -> Option<Stat> {
        statat(&self.snapshots, upper_of(id), AtFlags::SYMLINK_NOFOLLOW).ok()
    }

    /// The ids of everything that is set aside.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if `left-out` is no directory.
    pub fn left_out(&self) -> Result<Vec<SnapshotId>> {
        Ok(self.open_left_out()?.map_or(Vec::new(), |(_, ids)| ids))
    }

    fn open_left_out(&self) -> Result<Option<(OwnedFd, Vec<SnapshotId>)>> {
        let path = &self.path;
        let fd = match open_to_list(&self.top, LEFT_OUT) {
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::NOTDIR | Errno::LOOP) => return Err(no_directory(path, LEFT_OUT)),
            fd => fd.context(|| format!("open {path}/{LEFT_OUT}"))?,
        };
        let entries = list(&fd, path, LEFT_OUT)?;
        let ids = entries
            .iter()
            .filter_map(|entry| SnapshotId::from_directory_name(entry.name.to_bytes()));
        let mut ids: Vec<_> = ids.collect();
        ids.sort();
        Ok(Some((fd, ids)))
    }

    /// Moves the entries with these ids to `left-out/`, durably.
    pub fn set_aside(&self, ids: &[SnapshotId]) -> Result<()> {
        if ids.is_empty() {
            return Ok(());
        }
        let path = &self.path;
        let left_out = ensure_directory(&self.top, path, LEFT_OUT)?;
        for id in ids {
            let name = id.to_string();
            move_into(&self.snapshots, &left_out, &name)
                .context(|| format!("move {path}/{SNAPSHOTS}/{id} to {path}/{LEFT_OUT}"))?;
        }
        self.flush([&left_out, &self.snapshots, &self.top])
    }

    /// Moves everything from `left-out/` back to `snapshots/`, durably.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if `snapshots/` has an entry of the same
    /// name by now.
    pub fn put_back(&self) -> Result<()> {
        let path = &self.path;
        let Some((left_out, ids)) = self.open_left_out()? else {
            return Ok(());
        };
        for id in ids {
            let name = id.to_string();
            match move_into(&left_out, &self.snapshots, &name) {
                Err(Errno::EXIST | Errno::NOTEMPTY) => {
                    return Err(Error::refused(format!(
                        "{path}/{SNAPSHOTS}/{id} and {path}/{LEFT_OUT}/{id} are both there: \
                             move one of them away, and run the command again"
                    )));
                }
                moved => moved.context(|| {
                    format!("move {path}/{LEFT_OUT}/{id} back to {path}/{SNAPSHOTS}")
                })?,
            }
        }
        // This fails if `left-out/` holds anything else; the directory stays then.
        let _ = unlinkat(&self.top, LEFT_OUT, AtFlags::REMOVEDIR);
        self.flush([&self.snapshots, &left_out, &self.top])
    }

    /// Makes everything written on the volume so far durable.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if the disk failed to write some of the data.
    pub fn sync(&self) -> Result<()> {
        syncfs(&self.snapshots).map_err(|errno| {
            let what = format!("flush the {} volume {}", self.volume, self.path);
            Error::caused(ErrorKind::DataLoss, what, std::io::Error::from(errno))
        })
    }

    /// Removes the files and the empty directories that a start of this program has created on
    /// the volume.
    pub fn leave(&self) {
        let _ = unlinkat(&self.top, IDS, AtFlags::empty());
        let made: &[&str] = match self.volume {
            Volume::Image => &[TRASH, EMPTY],
            Volume::Writable => &[TRASH],
        };
        for name in made {
            let _ = unlinkat(&self.top, *name, AtFlags::REMOVEDIR);
        }
    }

    fn flush(&self, directories: [&OwnedFd; 3]) -> Result<()> {
        let mut flushed = directories.into_iter().map(fsync);
        flushed
            .try_for_each(|flushed| flushed)
            .context(|| format!("flush the directories of {}", self.path))
    }
}

/// Renames without replacing anything, also into a directory that belongs to a project by
/// now.
fn move_into(from: &OwnedFd, to: &OwnedFd, name: &str) -> std::result::Result<(), Errno> {
    match move_aside(from, name, to, name) {
        Err(Errno::XDEV) if stop_handing_on(to) == Ok(true) => move_aside(from, name, to, name),
        moved => moved,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_is_set_aside_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert!(Filled::open(Volume::Image, path).unwrap().is_none());
        for number in ["1", "2", "new-3"] {
            fs::create_dir_all(dir.path().join(format!("snapshots/{number}/fs"))).unwrap();
        }
        symlink("1", dir.path().join("snapshots/4")).unwrap();
        let filled = Filled::open(Volume::Image, path).unwrap().unwrap();
        let (numbered, others) = filled.numbered().unwrap();
        assert_eq!((numbered.len(), others), (3, vec!["new-3".to_owned()]));
        let has_upper = |id| filled.has_upper(SnapshotId::new(id)).unwrap();
        assert!(has_upper(1) && !has_upper(4) && !has_upper(5));
        let ids = [SnapshotId::new(2), SnapshotId::new(4)];
        assert_eq!(filled.left_out().unwrap(), []);
        filled.put_back().unwrap();
        filled.set_aside(&ids).unwrap();
        assert_eq!(filled.left_out().unwrap(), ids);
        assert!(dir.path().join("left-out/2/fs").is_dir());
        assert!(!dir.path().join("snapshots/2").exists());
        filled.put_back().unwrap();
        assert!(dir.path().join("snapshots/2/fs").is_dir());
        assert!(dir.path().join("snapshots/4").is_symlink());
        filled.leave();
        let left: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(left, ["snapshots"]);

        filled.set_aside(&ids).unwrap();
        fs::create_dir(dir.path().join("snapshots/2")).unwrap();
        let error = filled.put_back().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        fs::rename(dir.path().join("left-out"), dir.path().join("away")).unwrap();
        symlink("away", dir.path().join("left-out")).unwrap();
        filled.left_out().unwrap_err();
        filled.set_aside(&ids).unwrap_err();
    }
}
