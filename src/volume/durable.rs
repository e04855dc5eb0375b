//! Making changes durable: replacing a small file, and flushing one snapshot or the whole
//! image volume.

use std::fs;
use std::path::Path;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{
    AtFlags, Mode, OFlags, fchmod, fstat, fstatfs, fstatvfs, fsync, major, minor, openat, renameat,
    syncfs, unlinkat,
};
use rustix::io::{Errno, write};

use super::dirs::open_to_list;
use super::{Dirs, Image};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::tree::{self, Flushed};
use crate::types::SnapshotId;
use crate::util::fault_point::is_left_out;

/// Makes `text` the content of the file `name` (mode 0600) in `directory`, durably,
/// with a new file `<name>.new` and a rename. Returns `ENOSPC` also if the disk has room
/// for only a part of the text.
pub fn replace_file(directory: impl AsFd, name: &str, text: &str) -> rustix::io::Result<()> {
    let new = format!("{name}.new");
    match unlinkat(&directory, new.as_str(), AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(errno),
    }
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = openat(&directory, new.as_str(), flags, Mode::from_raw_mode(0o600))?;
    if write(&file, text.as_bytes())? != text.len() {
        return Err(Errno::NOSPC);
    }
    fsync(&file)?;
    renameat(&directory, new.as_str(), &directory, name)?;
    fsync(&directory)
}

/// The error of a failed flush of the image volume: its disk has failed to write
/// something.
pub(super) fn failed_flush(errno: Errno) -> Error {
    let cause = std::io::Error::from(errno);
    Error::caused(ErrorKind::DataLoss, "flush the image volume", cause)
}

/// If a flush of the whole file system would write at most this many bytes of other
/// programs, the whole file system is flushed.
const FEW_BYTES: u64 = 64 << 20;
/// About how much a disk writes in the time that the flush of one file takes. Each file
/// to be flushed counts as that many bytes.
const BYTES_OF_A_FILE: u64 = 256 << 10;

/// How many bytes of all file systems the kernel still has to write; 0 if that is
/// unknown.
fn unwritten_bytes() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kibibytes = text.lines().filter_map(|line| {
        let (name, rest) = line.split_once(':')?;
        let number = rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()?;
        matches!(name, "Dirty" | "Writeback").then_some(number)
    });
    kibibytes.sum::<u64>() << 10
}

/// Whether a flush of the whole file system would write mostly data of other programs.
/// `unwritten` is how many bytes the kernel still has to write, and `own` is how many of
/// them this program can have written at most.
fn is_mostly_of_others(unwritten: u64, own: u64) -> bool {
    unwritten > own.saturating_mul(2).saturating_add(FEW_BYTES)
}

/// Whether the file system makes changes of its directories and inodes durable in the order
/// in which they were made, so that an fsync(2) after the last one covers all of them: XFS,
/// and ext4 if it has a journal.
fn keeps_order(directory: impl AsFd) -> bool {
    const EXT4: u64 = 0xef53;
    const XFS: u64 = 0x5846_5342;
    let (Ok(state), Ok(stat)) = (fstatfs(&directory), fstat(&directory)) else {
        return false;
    };
    #[allow(clippy::unnecessary_cast)] // its width differs among architectures
    match state.f_type as u64 {
        XFS => true,
        EXT4 => {
            let device = format!(
                "/sys/dev/block/{}:{}",
                major(stat.st_dev),
                minor(stat.st_dev)
            );
            let journal = fs::canonicalize(device).and_then(|device| {
                let name = device.file_name().unwrap_or_default();
                fs::read_to_string(Path::new("/sys/fs/ext4").join(name).join("journal_task"))
            });
            journal.is_ok_and(|task| task.trim() != "<none>")
        }
        _ => false,
    }
}

impl Dirs {
    /// Makes only one snapshot durable, if this takes less time than flushing the whole
    /// volume with everything that other programs have written there. Returns `false` if
    /// the caller has to flush the volume instead.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if the disk failed to write some of the data.
    pub fn sync_alone(&self, id: SnapshotId, upper: impl AsFd) -> Result<bool> {
        let is_forced = is_left_out("volume");
        let unwritten = unwritten_bytes();
        if !is_forced {
            // Usually the disk is quiet, and the files need not be counted.
            if !is_mostly_of_others(unwritten, 0) {
                return Ok(false);
            }
            let content = tree::count(&upper)?;
            let flushes = content.usage.inodes.saturating_mul(BYTES_OF_A_FILE);
            if !is_mostly_of_others(unwritten, content.data_bytes.saturating_add(flushes)) {
                return Ok(false);
            }
        }
        let flushing = || {
            format!(
                "flush snapshot {id} on the {} volume {}",
                self.volume(),
                self.path()
            )
        };
        if tree::flush_tree(&upper).context(flushing)? == Flushed::AllButNodes
            && !keeps_order(&upper)
        {
            return Ok(false);
        }
        self.sync_names(id).context(flushing)?;
        Ok(true)
    }

    /// Makes the name of a snapshot's directory durable, and first changes the directory
    /// (with its own mode): this change comes after all changes in the directory, so its flush
    /// covers them, and a file system that has stopped writing refuses it.
    fn sync_names(&self, id: SnapshotId) -> Result<()> {
        let flushing = || format!("flush the directory of snapshot {id}");
        let snapshots = self.snapshots_fd();
        let top = open_to_list(snapshots, id.to_string()).context(flushing)?;
        fstat(&top)
            .and_then(|stat| fchmod(&top, Mode::from_raw_mode(stat.st_mode)))
            .context(flushing)?;
        for directory in [top.as_fd(), snapshots] {
            fsync(directory).map_err(|errno| {
                Error::caused(ErrorKind::DataLoss, flushing(), std::io::Error::from(errno))
            })?;
        }
        Ok(())
    }
}

/// An open file on the image volume, for flushing the volume in the background. The
/// kernel reports a failed write once to each open file (syncfs(2), since Linux 5.8):
/// a failure that is reported for this file is reported to a commit as well.
pub struct Flush {
    file: OwnedFd,
}

impl Image {
    /// Opens a file to flush the volume with.
    pub fn flush(&self) -> Result<Flush> {
        open_to_list(self.top(), ".")
            .map(|file| Flush { file })
            .context(|| "open the image volume to flush it")
    }
}

impl Flush {
    /// Makes everything written on the volume so far durable.
    pub fn run(&self) -> Result<()> {
        syncfs(&self.file).map_err(failed_flush)
    }

    /// The free bytes of the volume. The number changes when something is written. No
    /// disk is accessed.
    pub fn free_bytes(&self) -> Result<u64> {
        let state = fstatvfs(&self.file)
            .context(|| "find out how much space is free on the image volume")?;
        Ok(state.f_bfree.saturating_mul(state.f_frsize))
    }

    /// Whether a flush now would mostly write other programs' data. `written` bytes
    /// were written on this volume since the last flush.
    pub fn is_for_others(&self, written: u64) -> bool {
        is_left_out("volume") || is_mostly_of_others(unwritten_bytes(), written)
    }
}
