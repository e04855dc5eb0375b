//! The entries of a directory, without `.` and `..`.

use rustix::fd::AsFd;
use rustix::fs::{Dir, DirEntry, FileType};
use rustix::io::Result;

/// Reads a directory from its beginning, even if it has been read before.
pub fn entries(directory: impl AsFd) -> Result<impl Iterator<Item = Result<DirEntry>>> {
    Ok(Dir::read_from(directory)?.filter(is_own))
}

/// Whether an entry is neither `.` nor `..`. Returns `true` for an error, so that the caller
/// of [`entries`] gets it.
pub fn is_own(entry: &Result<DirEntry>) -> bool {
    let is_dot = |entry: &DirEntry| matches!(entry.file_name().to_bytes(), b"." | b"..");
    !entry.as_ref().is_ok_and(is_dot)
}

/// Whether a directory has no entries.
pub fn is_empty(directory: impl AsFd) -> Result<bool> {
    Ok(entries(directory)?.next().transpose()?.is_none())
}

/// Whether a file system does not report the types of directory entries (`d_type` in
/// readdir(3)). overlayfs needs the types to find whiteouts: without types, deleted files
/// show again. The directory must have at least one entry.
pub fn lacks_types(directory: impl AsFd) -> Result<bool> {
    for entry in entries(directory)? {
        if entry?.file_type() == FileType::Unknown {
            return Ok(true);
        }
    }
    Ok(false)
}
