//! Reads bbolt files (go.etcd.io/bbolt), in which containerd's Go snapshotters keep their
//! database.
//!
//! Owns: the file format. Never: writes or locks a file, or knows the meaning of its buckets
//! ([`snapshots`] does).
//!
//! A file is a sequence of pages. Pages 0 and 1 are metas: each has the place of
//! the root bucket, and the meta with the higher transaction number counts. A
//! bucket is a tree: branch pages lead to leaf pages, which hold keys in order,
//! each with a value or a nested bucket. If the contents of a page need more
//! room, it continues on the pages after it. A small bucket has its only leaf
//! page in its own value. A reader does not need the list of free pages.
//!
//! Nothing in a file is trusted. Every position is checked against the file's
//! length, no page is read twice (in a sound file none is referred to twice),
//! nothing recurses, and the amount of returned data is limited.

mod meta;
mod page;
pub mod snapshots;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;

use crate::error::{Error, ErrorKind, Result};
use meta::Meta;
use page::{Content, Element, HEADER_BYTES};

/// The most bytes of a page and its continuation. No label can be larger than a
/// message of containerd, which has at most 16 MiB.
const MAX_RUN_BYTES: u64 = 32 << 20;
/// The most bytes of all keys and values together: enough for a hundred
/// thousand snapshots.
const MAX_HANDED_OUT_BYTES: usize = 256 << 20;
/// The memory that each key with its value takes in addition to its bytes. It counts
/// towards the limit, so that very many small entries reach the limit too.
const ELEMENT_COST_BYTES: usize = 128;

/// An open file, at its last complete transaction.
pub(crate) struct Database {
    file: File,
    meta: Meta,
    /// The pages that have been read.
    seen: HashSet<u64>,
    handed_out_bytes: usize,
}

/// A bucket as its value describes it: the number of the root page, or the page itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bucket {
    root: u64,
    sequence: u64,
    /// The page of a bucket whose only page is in its value.
    inline: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Data(Vec<u8>),
    Bucket(Bucket),
}

/// A key, which is never empty, and what is stored under it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) key: Vec<u8>,
    pub(crate) value: Value,
}

impl Bucket {
    /// Reads a bucket from its value: the number of its root page, its
    /// sequence, and, if that number is 0, the page.
    fn read(value: &[u8]) -> Result<Bucket> {
        let (root, rest) = value
            .split_first_chunk()
            .ok_or_else(|| damaged("a bucket is cut short"))?;
        let (sequence, inline) = rest
            .split_first_chunk()
            .ok_or_else(|| damaged("a bucket is cut short"))?;
        Ok(Bucket {
            root: u64::from_le_bytes(*root),
            sequence: u64::from_le_bytes(*sequence),
            inline: inline.to_vec(),
        })
    }

    /// The last number that the bucket has given out (bbolt's `NextSequence`).
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }
}

impl Database {
    /// Reads a file's metas. The caller keeps all processes from writing to it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if neither meta is sound, or the file is shorter
    /// than its meta says; [`ErrorKind::FailedPrecondition`] for another version
    /// of the format, or if a machine with the other byte order wrote it;
    /// [`ErrorKind::Internal`] if it cannot be read.
    pub(crate) fn open(file: File) -> Result<Database> {
        let length = file
            .metadata()
            .map_err(|error| unreadable(error, "read its length"))?
            .len();
        let meta = meta::newest(&file, length)?;
        let pages = length / meta.page_size;
        if pages < meta.page_count {
            return Err(damaged(format!(
                "it was cut short: it has {pages} pages of {}",
                meta.page_count
            )));
        }
        Ok(Database {
            file,
            meta,
            seen: HashSet::new(),
            handed_out_bytes: 0,
        })
    }

    /// The number of the last complete transaction.
    pub(crate) fn transaction(&self) -> u64 {
        self.meta.transaction
    }

    /// The bucket that contains all others.
    pub(crate) fn root(&self) -> Bucket {
        Bucket {
            root: self.meta.root,
            sequence: 0,
            inline: Vec::new(),
        }
    }

    /// All entries of a bucket, in the order of their keys. A bucket can be
    /// read once.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if the bucket is damaged;
    /// [`ErrorKind::Internal`] if the file cannot be read.
    pub(crate) fn entries(&mut self, bucket: &Bucket) -> Result<Vec<Entry>> {
        let mut entries = Vec::new();
        if bucket.root == 0 {
            match page::read(&bucket.inline, 0)? {
                Content::Leaf(elements) => self.hand_out(&mut entries, elements)?,
                Content::Branch(_) => return Err(damaged("a bucket within a page has branches")),
            }
            return Ok(entries);
        }
        let mut ahead = vec![bucket.root];
        while let Some(number) = ahead.pop() {
            let run = self.read_run(number)?;
            match page::read(&run, number)? {
                // Only a bucket of one page can be empty.
                Content::Leaf(elements) if elements.is_empty() && number != bucket.root => {
                    return Err(damaged(format!("page {number} is empty")));
                }
                Content::Leaf(elements) => self.hand_out(&mut entries, elements)?,
                Content::Branch(children) => ahead.extend(children.into_iter().rev()),
            }
        }
        Ok(entries)
    }

    /// Reads a page and those that continue it. Each page can be read once, so
    /// that a circle ends, and reading takes no longer than the length of the
    /// file.
    fn read_run(&mut self, number: u64) -> Result<Vec<u8>> {
        self.enter(number)?;
        let size = self.meta.page_size;
        let mut head = [0; HEADER_BYTES];
        self.read_at(&mut head, number * size)?;
        let more = page::overflow(&head);
        if (more + 1) * size > MAX_RUN_BYTES {
            return Err(damaged(format!("page {number} continues on {more} others")));
        }
        for following in number + 1..=number + more {
            self.enter(following)?;
        }
        let length = usize::try_from((more + 1) * size).expect("it is at most MAX_RUN_BYTES");
        let mut run = vec![0; length];
        self.read_at(&mut run, number * size)?;
        Ok(run)
    }

    fn enter(&mut self, number: u64) -> Result<()> {
        if number < meta::COUNT || number >= self.meta.page_count {
            return Err(damaged(format!(
                "it refers to page {number}, which is not one of its {} pages with contents",
                self.meta.page_count
            )));
        }
        match self.seen.insert(number) {
            true => Ok(()),
            false => Err(damaged(format!("it refers to page {number} twice"))),
        }
    }

    fn read_at(&self, buffer: &mut [u8], at: u64) -> Result<()> {
        self.file
            .read_exact_at(buffer, at)
            .map_err(|error| unreadable(error, format!("read it at byte {at}")))
    }

    fn hand_out(&mut self, entries: &mut Vec<Entry>, elements: Vec<Element<'_>>) -> Result<()> {
        for element in elements {
            if entries
                .last()
                .is_some_and(|last| last.key.as_slice() >= element.key)
            {
                return Err(damaged("keys are out of order"));
            }
            self.handed_out_bytes += ELEMENT_COST_BYTES + element.key.len() + element.value.len();
            if self.handed_out_bytes > MAX_HANDED_OUT_BYTES {
                return Err(damaged(format!(
                    "it holds more than {} MiB",
                    MAX_HANDED_OUT_BYTES >> 20
                )));
            }
            entries.push(Entry {
                key: element.key.to_vec(),
                value: match element.is_bucket {
                    true => Value::Bucket(Bucket::read(element.value)?),
                    false => Value::Data(element.value.to_vec()),
                },
            });
        }
        Ok(())
    }
}

fn damaged(what: impl Into<String>) -> Error {
    Error::data_loss(format!("the bbolt database is damaged: {}", what.into()))
}

fn unreadable(error: std::io::Error, doing: impl Into<String>) -> Error {
    let kind = match error.kind() {
        std::io::ErrorKind::UnexpectedEof => ErrorKind::DataLoss,
        _ => ErrorKind::Internal,
    };
    Error::caused(kind, doing, error)
}
