//! Flushing the image volume beside its requests.

use rustix::fd::OwnedFd;
use rustix::fs::{fstatvfs, syncfs};

use super::Image;
use super::dirs::open_to_list;
use crate::error::{Context, Result};

/// An open file of its own on the image volume: the kernel tells a failed write
/// once to each (`syncfs(2)`, since Linux 5.8), and what this one hears is not
/// taken from a commit.
pub struct Flush {
    file: OwnedFd,
}

impl Image {
    /// Opens such a file.
    pub fn flush(&self) -> Result<Flush> {
        open_to_list(self.top(), ".")
            .map(|file| Flush { file })
            .context(|| "open the image volume to flush it")
    }
}

impl Flush {
    /// Makes everything written so far durable.
    pub fn run(&self) -> Result<()> {
        syncfs(&self.file).context(|| "flush the image volume")
    }

    /// How much is free, in blocks: another number whenever something was
    /// written. Asks no disk.
    pub fn free_blocks(&self) -> Result<u64> {
        let state = fstatvfs(&self.file).context(|| "look how full the image volume is")?;
        Ok(state.f_bfree)
    }
}
