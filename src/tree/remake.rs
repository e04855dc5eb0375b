//! Replacing symlinks and device nodes by new ones with the same content.
//!
//! Symlinks and device nodes cannot be opened, so their project id cannot be set. A new
//! entry inherits the id of its directory.

use std::ffi::CStr;

use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{AtFlags, FileType, Stat, fstat, futimens, renameat, statat, unlinkat};
use rustix::io::Errno;

use super::copy::{copy_node, times_of};
use crate::error::{Context, Result};

/// The name of the new entry while it is in the scratch directory.
const NEW: &CStr = c"new";

/// Creates a copy of the symlink or node `name` of `parent` in the directory `scratch`, and
/// renames the copy over the original. The times of `parent` are kept. Returns `false`,
/// and changes nothing, if the inode has further names (hard links), because they would
/// keep the old inode. After a crash, `scratch` may hold an entry, which the next call
/// replaces.
///
/// # Errors
///
/// `EXDEV` if `scratch` gives its new entries another project than `parent`
/// requires (rename(2)).
pub fn remake(parent: BorrowedFd<'_>, name: &CStr, scratch: impl AsFd) -> Result<bool> {
    let remaking = || format!("create {name:?} again");
    let scratch = scratch.as_fd();
    let stat = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(true),
        stat => stat.context(remaking)?,
    };
    if stat.st_nlink > 1 && !is_whiteout(&stat) {
        return Ok(false);
    }
    let above = fstat(parent).context(remaking)?;
    match unlinkat(scratch, NEW, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno).context(remaking),
    }
    copy_node((parent, name), (scratch, NEW), &stat).context(remaking)?;
    renameat(scratch, NEW, parent, name)
        .and_then(|()| futimens(parent, &times_of(&above)))
        .context(remaking)?;
    Ok(true)
}

/// Whether an entry is a whiteout. A whiteout with several names may be replaced all the
/// same: overlayfs itself links all whiteouts to one inode, and uses only their existence.
fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::time::{Duration, SystemTime};

    use super::*;

    #[test]
    fn a_link_is_another_inode_and_all_else_is_as_before() {
        let dir = tempfile::tempdir().unwrap();
        let (parent, scratch) = (dir.path().join("parent"), dir.path().join("scratch"));
        fs::create_dir(&parent).unwrap();
        fs::create_dir(&scratch).unwrap();
        symlink("somewhere", parent.join("link")).unwrap();
        symlink("of a crash", scratch.join("new")).unwrap();
        let opened = File::open(&parent).unwrap();
        let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        opened.set_modified(long_ago).unwrap();
        let kept = |stat: fs::Metadata| {
            let mtime = (stat.mtime(), stat.mtime_nsec());
            (stat.mode(), stat.uid(), stat.gid(), mtime)
        };
        let look = || fs::symlink_metadata(parent.join("link")).unwrap();
        let before = look();
        let made = remake(opened.as_fd(), c"link", File::open(&scratch).unwrap()).unwrap();
        let after = look();
        assert!(made);
        assert_ne!(before.ino(), after.ino());
        assert_eq!(kept(before), kept(after));
        assert_eq!(
            fs::read_link(parent.join("link")).unwrap().to_str(),
            Some("somewhere")
        );
        assert_eq!(fs::metadata(&parent).unwrap().modified().unwrap(), long_ago);
        assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0);

        fs::hard_link(parent.join("link"), parent.join("other")).unwrap();
        let made = remake(opened.as_fd(), c"link", File::open(&scratch).unwrap()).unwrap();
        assert!(!made && look().nlink() == 2);
    }
}
