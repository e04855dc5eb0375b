//! Creating links and nodes again in their place.
//!
//! Symlinks and device nodes cannot be opened, so their project id cannot be set. A new one
//! inherits the id of its directory.

use std::ffi::CStr;

use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{AtFlags, FileType, Stat, fstat, futimens, renameat, statat, unlinkat};
use rustix::io::Errno;

use super::copy::{copy_node, times_of};
use crate::error::{Context, Result};

/// In the scratch directory.
const NEW: &CStr = c"new";

/// Makes the link or node `name` in `parent` anew, as it is, in the directory
/// `scratch`, and puts it into its place in one step; the times of `parent` stay.
/// `false`, and nothing done, if it has other names: they would be names of another
/// one then. After a crash there may be something in `scratch`, which the next call
/// overwrites.
///
/// # Errors
///
/// `EXDEV` if `scratch` does not give to what is made in it what `parent` asks for
/// (rename(2)).
pub fn remake(parent: BorrowedFd<'_>, name: &CStr, scratch: impl AsFd) -> Result<bool> {
    let remaking = || format!("make {name:?} anew");
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

/// overlayfs gives many names to one whiteout, and needs one only to be there.
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
