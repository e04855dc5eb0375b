//! Removing whiteouts.

use rustix::fd::AsFd;
use rustix::fs::{AtFlags, FileType, statat, unlinkat};
use rustix::io::Errno;

use super::open_directory;
use super::walk::Walk;
use crate::error::{Context, Result};

const REMOVING: &str = "remove the whiteouts of a directory tree";

/// Removes every whiteout below `top`: each character device 0:0
/// (Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories").
pub fn remove_whiteouts(top: impl AsFd) -> Result<()> {
    let mut walk = Walk::begin(&top, REMOVING)?;
    while let Some(entry) = walk.next()? {
        let (parent, name) = (walk.parent()?, entry.file_name());
        let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            stat => stat.context(|| REMOVING)?,
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::CharacterDevice if stat.st_rdev == 0 => {
                unlinkat(parent, name, AtFlags::empty()).context(|| REMOVING)?;
            }
            FileType::Directory => match open_directory(parent, name) {
                // The directory is gone, was replaced, or is a mount point.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {}
                opened => walk.enter(opened.context(|| REMOVING)?, name)?,
            },
            _ => {}
        }
    }
    Ok(())
}
