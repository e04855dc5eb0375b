//! Reads the two meta pages at the beginning of a bbolt file. bbolt writes them in turn: a
//! crash can damage the page that is being written, and the other page still describes the
//! transaction before.
//!
//! After the page's header, a meta has these fields: magic (4 bytes), version
//! (4), page size (4), unused (4), the root bucket's page (8) and sequence (8),
//! the free list's page (8), the number of pages in use (8), the transaction
//! (8), and the FNV-1a sum of all these fields (8).

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::page::HEADER_BYTES;
use super::{damaged, unreadable};
use crate::error::{Error, Result};
use crate::util::fnv::Fnv;

/// The number of metas, each of which has a page of its own.
pub(super) const COUNT: u64 = 2;

const MAGIC: u32 = 0xED0C_DAED;
const VERSION: u32 = 2;
const SUMMED_BYTES: usize = 56;
const BYTES: usize = SUMMED_BYTES + 8;
/// The page sizes of all machines, and smaller page sizes that only tests use.
const PAGE_SIZES: std::ops::RangeInclusive<u64> = 512..=65536;

/// The contents of a meta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) page_size: u64,
    pub(super) root: u64,
    pub(super) page_count: u64,
    pub(super) transaction: u64,
}

/// The result of reading one of the two places of a meta.
enum Candidate {
    Whole(Meta),
    Foreign(Error),
    Damaged,
}

/// The meta of the last complete transaction.
pub(super) fn newest(file: &File, length: u64) -> Result<Meta> {
    let first = look(file, length, 0)?;
    // The place of the second meta depends on the page size. If the first meta is damaged,
    // every page size is tried.
    let sizes = match &first {
        Candidate::Whole(meta) => meta.page_size..=meta.page_size,
        _ => PAGE_SIZES,
    };
    let mut second = None;
    for size in sizes.filter(|size| size.is_power_of_two()) {
        if let Candidate::Whole(meta) = look(file, length, size)?
            && meta.page_size == size
        {
            second = Some(meta);
            break;
        }
    }
    match (first, second) {
        (Candidate::Whole(one), Some(other)) if other.transaction > one.transaction => Ok(other),
        (Candidate::Whole(meta), _) | (_, Some(meta)) => Ok(meta),
        (Candidate::Foreign(error), None) => Err(error),
        (Candidate::Damaged, None) => Err(damaged("both of its meta pages are damaged")),
    }
}

fn look(file: &File, length: u64, page_at: u64) -> Result<Candidate> {
    if length < page_at + (HEADER_BYTES + BYTES) as u64 {
        return Ok(Candidate::Damaged);
    }
    let mut bytes = [0; BYTES];
    file.read_exact_at(&mut bytes, page_at + HEADER_BYTES as u64)
        .map_err(|error| unreadable(error, "read its metas"))?;
    Ok(read(&bytes))
}

fn read(bytes: &[u8; BYTES]) -> Candidate {
    let small = |at: usize| -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
    };
    let large = |at: usize| -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
    };
    let foreign = |what: &str| Candidate::Foreign(Error::refused(what));
    if small(0) == MAGIC.swap_bytes() {
        return foreign(
            "the bbolt database was written on a machine with the other byte order \
             (big-endian), which this program does not read",
        );
    }
    let mut sum = Fnv::new();
    sum.add(&bytes[..SUMMED_BYTES]);
    if small(0) != MAGIC || large(SUMMED_BYTES) != sum.sum() {
        return Candidate::Damaged;
    }
    if small(4) != VERSION {
        return foreign(&format!(
            "the bbolt database has version {} of its format, this program reads version \
             {VERSION}",
            small(4)
        ));
    }
    let page_size = u64::from(small(8));
    if !PAGE_SIZES.contains(&page_size) || !page_size.is_power_of_two() {
        return foreign(&format!(
            "the bbolt database has pages of {page_size} bytes, this program reads those of {} \
             to {}",
            PAGE_SIZES.start(),
            PAGE_SIZES.end()
        ));
    }
    Candidate::Whole(Meta {
        page_size,
        root: large(16),
        page_count: large(40),
        transaction: large(48),
    })
}
