//! Making things durable: a small file that is replaced, and all of the image volume.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags, fstatvfs, fsync, openat, renameat, syncfs, unlinkat};
use rustix::io::{Errno, write};

use super::Image;
use super::dirs::open_to_list;
use crate::error::{Context, Error, ErrorKind, Result};

/// Makes `text` the content of the file `name` (mode 0600) in `directory`,
/// durably, by way of a new file `<name>.new` and a rename. `ENOSPC` is also what it
/// returns where the disk takes only a part.
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

/// The error of a flush of the image volume: its disk has failed to take something.
pub(super) fn failed_flush(errno: Errno) -> Error {
    let cause = std::io::Error::from(errno);
    Error::caused(ErrorKind::DataLoss, "flush the image volume", cause)
}

/// An open file on the image volume, for flushing the volume beside its requests. The
/// kernel reports a failed write once to each open file (syncfs(2), since Linux 5.8): what
/// is reported to this file is reported to a commit as well.
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
    /// Makes everything written so far durable.
    pub fn run(&self) -> Result<()> {
        syncfs(&self.file).map_err(failed_flush)
    }

    /// How much is free, in blocks: another number whenever something was
    /// written. Asks no disk.
    pub fn free_blocks(&self) -> Result<u64> {
        let state = fstatvfs(&self.file).context(|| "look how full the image volume is")?;
        Ok(state.f_bfree)
    }
}
