//! Flushing one tree, and nothing else on its file system.

use std::sync::Mutex;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::fsync;
use rustix::io::Errno;

use super::{Visited, visit_open};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::util::lock::lock;

const FLUSHING: &str = "flush a directory tree";

/// How many files are flushed at the same time. Simultaneous flushes become one flush of
/// the disk.
const THREADS: usize = 8;

/// How much [`flush_tree`] has made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flushed {
    /// The whole tree.
    Whole,
    /// All files and directories of the tree. The tree also contains symbolic links,
    /// device nodes or pipes. Their names are durable, but their owners, times and
    /// attributes are not, because they cannot be opened to flush them.
    AllButNodes,
}

/// Makes the files and directories of a tree durable, including `top` itself, each
/// by fsync(2).
///
/// # Errors
///
/// [`ErrorKind::DataLoss`] if the disk failed to write some of the data.
pub fn flush_tree(top: impl AsFd) -> Result<Flushed> {
    let (sender, receiver) = sync_channel(THREADS);
    let receiver = Mutex::new(receiver);
    thread::scope(|scope| {
        let flushing: Vec<_> = (0..THREADS)
            .map_while(|_| {
                let thread = thread::Builder::new().name("flush".to_owned());
                thread.spawn_scoped(scope, || flush_all(&receiver)).ok()
            })
            .collect();
        if flushing.is_empty() {
            return Err(Errno::AGAIN).context(|| FLUSHING);
        }
        let mut flushed = Flushed::Whole;
        let visited = visit_open(top, |visited| {
            let (Visited::Directory(fd) | Visited::File(fd)) = visited else {
                flushed = Flushed::AllButNodes;
                return Ok(());
            };
            let fd = fd.try_clone_to_owned();
            // The threads receive until the sender is dropped.
            let _ = sender.send(fd.context(|| FLUSHING)?);
            Ok(())
        });
        drop(sender);
        for thread in flushing {
            match thread.join().unwrap_or(Err(Errno::IO)) {
                Ok(()) => {}
                // The file system does not support fsync(2).
                Err(Errno::INVAL) => return Err(Errno::INVAL).context(|| FLUSHING),
                Err(errno) => {
                    let cause = std::io::Error::from(errno);
                    return Err(Error::caused(ErrorKind::DataLoss, FLUSHING, cause));
                }
            }
        }
        visited.map(|()| flushed)
    })
}

/// Flushes every file that arrives. Returns the first failure after the last file.
fn flush_all(files: &Mutex<Receiver<OwnedFd>>) -> std::result::Result<(), Errno> {
    let mut result = Ok(());
    loop {
        let next = lock(files).recv();
        let Ok(file) = next else {
            return result;
        };
        result = result.and(fsync(file));
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_tree_is_flushed_and_its_nodes_are_reported() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        for number in 0..10 * THREADS {
            fs::write(dir.path().join(format!("a/b/{number}")), "content").unwrap();
        }
        let flush = || flush_tree(File::open(dir.path()).unwrap()).unwrap();
        assert_eq!(flush(), Flushed::Whole);
        symlink("target", dir.path().join("a/link")).unwrap();
        assert_eq!(flush(), Flushed::AllButNodes);
    }
}
