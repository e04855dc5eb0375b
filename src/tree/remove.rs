//! Deleting trees.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::panic::resume_unwind;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{
    AtFlags, Dir, FileType, IFlags, ioctl_getflags, ioctl_setflags, renameat, statat, unlinkat,
};
use rustix::io::Errno;

use super::{open_directory, open_file};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::util::entries::{entries, is_own};
use crate::util::lock::lock;

/// How many levels each thread descends with open descriptors. Deeper directories are
/// moved up first, so that a tree of any depth can be deleted.
const MAX_DEPTH: usize = 48;

/// How often the directories of one tree are read again because new entries have
/// appeared. New entries appear only if a program still writes into the tree.
const MAX_ROUNDS: u32 = 64;

/// The number of entries from which on a second thread is used. The file system does most
/// of the work, and can work in two directories at once. A disk that has two requests at a
/// time can choose their order.
const WORTH_TWO: usize = 8;

/// Deletes everything in the directory `top`, but not `top` itself. An entry that
/// cannot be deleted is tried once; the rest is still deleted, and the first failure
/// is returned at the end. Another program may delete in the same tree at the same
/// time.
pub fn remove_children(top: impl AsFd) -> Result<()> {
    let top = top.as_fd();
    let last_name = AtomicU64::new(0);
    let mut all = Removal::new(top, &last_name);
    loop {
        // The names are read one by one while their entries are deleted, because a tree
        // may have any number of directories that have to be moved up to here.
        let names = list(top).context(|| "list the entries to delete")?;
        let mut names = names.filter(|name| !name.as_ref().is_ok_and(|it| all.kept.contains(it)));
        let first: Vec<_> = names.by_ref().take(WORTH_TWO).collect();
        let threads = if first.len() < WORTH_TWO { 1 } else { 2 };
        let names = Mutex::new(first.into_iter().chain(names));
        let work = || {
            let mut removal = Removal::new(top, &last_name);
            // The guard must be dropped before the tree is deleted, which takes
            // long.
            while let Some(name) = { lock(&names).next() } {
                match name {
                    Ok(name) => removal.remove_tree(&name),
                    Err(errno) => drop(removal.fail::<()>(c".", errno)),
                }
            }
            removal
        };
        let removal = thread::scope(|scope| {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut both = work();
            for other in others {
                both.add(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
            }
            both
        });
        drop(names);
        let moved_up = removal.moved_up;
        all.add(removal);
        // Directories that were moved up are now entries of `top`, and the next
        // pass deletes them.
        if moved_up == 0 {
            return all.into_result();
        }
    }
}

/// Deletes the entry `name` of `parent`, with everything in it. Another program may
/// delete it at the same time.
pub fn remove_entry(parent: impl AsFd, name: &str) -> Result<()> {
    let parent = parent.as_fd();
    let deleting = || format!("delete {name:?}");
    let name = CString::new(name).map_err(|_| Errno::INVAL);
    let name = &*name.context(deleting)?;
    let removed = match unlink(parent, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOTDIR) => unlink(parent, name, AtFlags::empty()),
        Err(Errno::NOTEMPTY | Errno::EXIST) => match open_directory(parent, name) {
            Err(errno) => Err(errno),
            Ok(directory) => {
                remove_children(directory).context(deleting)?;
                unlink(parent, name, AtFlags::REMOVEDIR)
            }
        },
        removed => removed,
    };
    match removed {
        Err(Errno::NOENT) => Ok(()),
        removed => removed.context(deleting),
    }
}

fn list(
    dir: BorrowedFd<'_>,
) -> std::result::Result<impl Iterator<Item = std::result::Result<CString, Errno>>, Errno> {
    let names = entries(open_directory(dir, c".")?)?;
    Ok(names.map(|entry| Ok(entry?.file_name().to_owned())))
}

/// A directory that is being emptied.
struct Level {
    dir: Dir,
    /// The directory's name in its parent.
    name: CString,
    /// Whether something in this directory cannot be deleted, so that the directory cannot
    /// be deleted either. Such a directory is not read again: otherwise, each level would
    /// double the work for the levels below it.
    is_kept: bool,
}

struct Removal<'a> {
    top: BorrowedFd<'a>,
    /// The last number that was given to a directory that was moved up.
    last_name: &'a AtomicU64,
    moved_up: u64,
    failed: u64,
    first_failure: Option<(CString, Errno)>,
    /// The entries of `top` in which something cannot be deleted.
    kept: HashSet<CString>,
    /// How often directories of the current tree were read again.
    rounds: u32,
}

impl<'a> Removal<'a> {
    fn new(top: BorrowedFd<'a>, last_name: &'a AtomicU64) -> Removal<'a> {
        Removal {
            top,
            last_name,
            moved_up: 0,
            failed: 0,
            first_failure: None,
            kept: HashSet::new(),
            rounds: 0,
        }
    }

    fn add(&mut self, other: Removal<'_>) {
        self.moved_up += other.moved_up;
        self.kept.extend(other.kept);
        self.failed += other.failed;
        self.first_failure = self.first_failure.take().or(other.first_failure);
    }

    fn remove_tree(&mut self, name: &CStr) {
        self.rounds = 0;
        let failed_before = self.failed;
        let mut levels: Vec<Level> = Vec::new();
        // Nearly all entries of the trash are directories.
        levels.extend(self.visit(self.top, name, FileType::Directory, 0));
        while let Some(level) = levels.last_mut() {
            let failed = self.failed;
            match level.dir.find(is_own) {
                Some(Ok(entry)) => {
                    let depth = levels.len();
                    let level = levels.last().expect("the loop holds one");
                    let below = match level.dir.fd() {
                        Ok(fd) => self.visit(fd, entry.file_name(), entry.file_type(), depth),
                        Err(errno) => self.fail(&level.name, errno),
                    };
                    levels.extend(below);
                }
                Some(Err(errno)) => {
                    let failed = levels.pop().expect("the loop holds one");
                    self.fail::<()>(&failed.name, errno);
                }
                None => {
                    let level = levels.pop().expect("the loop holds one");
                    let parent = levels.last().map_or(Ok(self.top), |above| above.dir.fd());
                    let again = match parent {
                        _ if level.is_kept => None,
                        Ok(parent) => self.finish(parent, level),
                        Err(errno) => self.fail(&level.name, errno),
                    };
                    levels.extend(again);
                }
            }
            if self.failed > failed {
                levels.iter_mut().for_each(|level| level.is_kept = true);
            }
        }
        if self.failed > failed_before {
            self.kept.insert(name.to_owned());
        }
    }

    /// Deletes one entry. If it is a directory that is not empty, returns it, so that the
    /// caller empties it.
    fn visit(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        file_type: FileType,
        depth: usize,
    ) -> Option<Level> {
        // Many directories are empty, and can be deleted without being opened.
        let is_directory = file_type == FileType::Directory
            && match unlinkat(parent, name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => return None,
                Err(Errno::NOTDIR) => false,
                // The directory is emptied first, whatever the failure was.
                Err(_) => true,
            };
        if !is_directory {
            match unlink(parent, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => return None,
                Err(Errno::ISDIR) => {}
                Err(errno) => return self.fail(name, errno),
            }
        }
        if depth >= MAX_DEPTH {
            let number = self.last_name.fetch_add(1, Ordering::Relaxed) + 1;
            let away = format!("deep.{number}");
            return match rename_mutable(parent, name, self.top, &away) {
                // The name may also have been taken by an earlier removal: the
                // next pass tries the next name.
                Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => {
                    self.moved_up += 1;
                    None
                }
                // There is no progress: the next pass would fail in the same
                // way.
                Err(errno) => self.fail(name, errno),
            };
        }
        match open_directory(parent, name).and_then(Dir::new) {
            Ok(dir) => Some(Level {
                dir,
                name: name.to_owned(),
                is_kept: false,
            }),
            Err(Errno::NOENT) => None,
            Err(errno) => self.fail(name, errno),
        }
    }

    /// Deletes an emptied directory. Returns the directory if it has new entries, so that the
    /// caller reads it once more.
    fn finish(&mut self, parent: BorrowedFd<'_>, mut level: Level) -> Option<Level> {
        match unlink(parent, &level.name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => None,
            Err(Errno::NOTEMPTY) if self.rounds < MAX_ROUNDS => {
                self.rounds += 1;
                level.dir.rewind();
                Some(level)
            }
            Err(errno) => self.fail(&level.name, errno),
        }
    }

    fn fail<T>(&mut self, name: &CStr, errno: Errno) -> Option<T> {
        self.failed += 1;
        self.first_failure.get_or_insert((name.to_owned(), errno));
        None
    }

    fn into_result(self) -> Result<()> {
        let Some((name, errno)) = self.first_failure else {
            return Ok(());
        };
        let left = self.failed;
        Err(Error::caused(
            ErrorKind::Internal,
            format!("{left} entries cannot be deleted, the first one is {name:?}"),
            std::io::Error::from(errno),
        ))
    }
}

/// `unlinkat`, tried once more after clearing an immutable or append-only flag
/// (`chattr(1)`): a container with `CAP_LINUX_IMMUTABLE` may have set one.
fn unlink(parent: BorrowedFd<'_>, name: &CStr, flags: AtFlags) -> std::result::Result<(), Errno> {
    match unlinkat(parent, name, flags) {
        Err(Errno::PERM) => {
            make_entry_mutable(parent, name)?;
            unlinkat(parent, name, flags)
        }
        unlinked => unlinked,
    }
}

/// `renameat` to another directory, tried once more after clearing an immutable or
/// append-only flag.
fn rename_mutable(
    parent: BorrowedFd<'_>,
    name: &CStr,
    to: BorrowedFd<'_>,
    new_name: &str,
) -> std::result::Result<(), Errno> {
    match renameat(parent, name, to, new_name) {
        Err(Errno::PERM) => {
            make_entry_mutable(parent, name)?;
            renameat(parent, name, to, new_name)
        }
        renamed => renamed,
    }
}

/// Clears the immutable and append-only flags of an entry and of its directory.
fn make_entry_mutable(parent: BorrowedFd<'_>, name: &CStr) -> std::result::Result<(), Errno> {
    let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
    // Entries of other types cannot have these flags.
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => make_mutable(open_directory(parent, name)?),
        FileType::RegularFile => {
            if let Some((file, _)) = open_file(parent, name)? {
                make_mutable(file);
            }
        }
        _ => {}
    }
    make_mutable(parent);
    Ok(())
}

/// Clears the immutable and append-only flags. A failure is not reported, because the
/// caller's next unlink fails then.
fn make_mutable(fd: impl AsFd) {
    if let Ok(flags) = ioctl_getflags(&fd) {
        let wanted = flags - (IFlags::IMMUTABLE | IFlags::APPEND);
        if wanted != flags {
            let _ = ioctl_setflags(&fd, wanted);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    use rustix::fs::{Mode, mkdirat};

    use super::*;

    #[test]
    fn empties_a_directory_and_keeps_what_its_links_point_to() {
        let dir = tempfile::tempdir().unwrap();
        let (top, outside) = (dir.path().join("top"), dir.path().join("outside"));
        fs::create_dir_all(top.join("a/b/c")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("keep"), "x").unwrap();
        fs::write(top.join("a/b/file"), "x").unwrap();
        fs::write(top.join("loose"), "x").unwrap();
        symlink(&outside, top.join("a/link")).unwrap();
        symlink(&outside, top.join("link")).unwrap();
        remove_children(File::open(&top).unwrap()).unwrap();
        assert_eq!(fs::read_dir(&top).unwrap().count(), 0);
        assert!(outside.join("keep").exists());
    }

    #[test]
    fn no_depth_is_too_deep() {
        let dir = tempfile::tempdir().unwrap();
        let mut fd = rustix::fd::OwnedFd::from(File::open(dir.path()).unwrap());
        for _ in 0..2_000 {
            mkdirat(&fd, c"d", Mode::RWXU).unwrap();
            fd = open_directory(&fd, c"d").unwrap();
        }
        drop(fd);
        remove_children(File::open(dir.path()).unwrap()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn many_entries_go_in_one_call() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..3_000 {
            fs::write(dir.path().join(format!("file {number}")), "").unwrap();
        }
        remove_children(File::open(dir.path()).unwrap()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
