//! The file `.ids` at the top of a volume, which records the ids that were used there
//! last: the number of the newest block, and the block's token. A database that has not
//! reserved this block is not the database that has filled the volume, or is an older
//! copy of it.

use rustix::fd::AsFd;
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::{Errno, read};

use super::Dirs;
use super::durable::replace_file;
use super::paths::IDS;
use crate::error::{Context, Error, Result};
use crate::types::Block;

impl Dirs {
    /// The newest block whose ids were used on the volume; `None` if none is recorded,
    /// as on a volume that an earlier version of this program has filled.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`](crate::error::ErrorKind::DataLoss) if the file is damaged.
    pub fn newest_block(&self) -> Result<Option<Block>> {
        read_block(self.top_fd(), self.path())
    }

    /// Records durably that ids of this block are used on the volume.
    pub(super) fn record_block(&self, block: &Block) -> Result<()> {
        let text = format!("{} {}\n", block.first, block.token);
        match replace_file(self.top_fd(), IDS, &text) {
            Err(Errno::ISDIR) => {
                let path = self.path();
                Err(Error::refused(format!(
                    "{path}/{IDS} is a directory: move it away"
                )))
            }
            replaced => {
                replaced.context(|| format!("record the block of ids in {}/{IDS}", self.path()))
            }
        }
    }
}

pub(super) fn read_block(top: impl AsFd, path: &str) -> Result<Option<Block>> {
    let reading = || format!("read {path}/{IDS}");
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut bytes = [0_u8; 128];
    let length = match openat(top, IDS, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        // `.ids` is a link, so there is no file to read.
        Err(Errno::LOOP) => 0,
        file => match read(&file.context(reading)?, &mut bytes) {
            Err(Errno::ISDIR) => 0,
            length => length.context(reading)?,
        },
    };
    let block = std::str::from_utf8(&bytes[..length]).ok().and_then(parse);
    block.map(Some).ok_or_else(|| {
        Error::data_loss(format!(
            "{path}/{IDS} is damaged: run `check --repair`, which writes it again"
        ))
    })
}

fn parse(text: &str) -> Option<Block> {
    let (first, token) = text.strip_suffix('\n')?.split_once(' ')?;
    Some(Block {
        first: first.parse().ok()?,
        token: token.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let block = Block {
            first: 257,
            token: "ab12".to_owned(),
        };
        assert_eq!(parse("257 ab12\n"), Some(block));
        for strange in ["", "257 ab12", "257\n", "x ab12\n", " \n"] {
            assert_eq!(parse(strange), None, "{strange:?}");
        }
    }
}
