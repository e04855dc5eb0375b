//! Reading a tree's entries, a directory after the other.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Dir, DirEntry};
use rustix::io::Errno;

use super::{MAX_LEVELS, open_directory, too_deep};
use crate::error::{Context, Result};
use crate::util::entries::is_own;

/// The directories being read, each in the one before. It goes down only where it
/// is told to.
pub(super) struct Walk {
    doing: &'static str,
    open: Vec<Dir>,
}

impl Walk {
    /// Begins with what is in `top`, opened anew; `doing` is what errors say.
    pub(super) fn begin(top: impl AsFd, doing: &'static str) -> Result<Walk> {
        let mut walk = Walk {
            doing,
            open: Vec::new(),
        };
        walk.enter(open_directory(&top, c".").context(|| doing)?)?;
        Ok(walk)
    }

    /// The next entry, of the directory entered last or of one above it.
    pub(super) fn next(&mut self) -> Result<Option<DirEntry>> {
        while let Some(dir) = self.open.last_mut() {
            match dir.find(is_own) {
                None => {
                    self.open.pop();
                }
                // Removed while it is read.
                Some(Err(Errno::NOENT)) => {}
                Some(entry) => return entry.map(Some).context(|| self.doing),
            }
        }
        Ok(None)
    }

    /// The directory that the last entry is in.
    pub(super) fn parent(&self) -> Result<BorrowedFd<'_>> {
        let dir = self.open.last().ok_or(Errno::BADF);
        dir.and_then(Dir::fd).context(|| self.doing)
    }

    /// Goes on with what is in that directory.
    pub(super) fn enter(&mut self, directory: OwnedFd) -> Result<()> {
        if self.open.len() >= MAX_LEVELS {
            return Err(too_deep());
        }
        self.open.push(Dir::new(directory).context(|| self.doing)?);
        Ok(())
    }
}
