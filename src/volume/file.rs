//! Replacing a small file so that a crash leaves the old one or the new one.

use rustix::fd::AsFd;
use rustix::fs::{AtFlags, Mode, OFlags, fsync, openat, renameat, unlinkat};
use rustix::io::{Errno, write};

/// Makes `text` the content of the file `name` (mode 0600) in `directory`,
/// durably, by way of a new file `<name>.new` and a rename.
///
/// # Errors
///
/// What the disk says; `ENOSPC` also where it takes only a part.
pub fn replace_file(directory: impl AsFd, name: &str, text: &str) -> Result<(), Errno> {
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
