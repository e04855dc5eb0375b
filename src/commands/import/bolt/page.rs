//! Reads one page of a bbolt file: its header, and the elements of a leaf or a branch.
//!
//! All numbers are in the byte order of the machine that wrote the file. [`super::meta`]
//! accepts little-endian only. The header has 16 bytes: the page's own number (8), its kind
//! (2), the number of elements (2), and the number of pages that continue it (4). The elements
//! follow, 16 bytes each, and after them all keys and values. An element contains the distance
//! from itself to its key.

use super::damaged;
use crate::error::Result;

pub(super) const HEADER_BYTES: usize = 16;
const ELEMENT_BYTES: usize = 16;

const BRANCH: u16 = 0x01;
const LEAF: u16 = 0x02;
/// A flag of a leaf's element: its value is a bucket.
const IS_BUCKET: u32 = 0x01;

/// A key of a leaf, with its value.
pub(super) struct Element<'a> {
    pub(super) key: &'a [u8],
    pub(super) value: &'a [u8],
    pub(super) is_bucket: bool,
}

pub(super) enum Content<'a> {
    Leaf(Vec<Element<'a>>),
    /// The numbers of the pages below a branch, in order.
    Branch(Vec<u64>),
}

/// How many pages continue the page with this header.
pub(super) fn overflow(header: &[u8; HEADER_BYTES]) -> u64 {
    let [.., a, b, c, d] = *header;
    u32::from_le_bytes([a, b, c, d]).into()
}

/// Reads a page with this number, including the pages that continue it.
pub(super) fn read(page: &[u8], number: u64) -> Result<Content<'_>> {
    let cut = || damaged(format!("page {number} is cut short"));
    let found = u64::from_le_bytes(bytes_at(page, 0).ok_or_else(cut)?);
    let kind = u16::from_le_bytes(bytes_at(page, 8).ok_or_else(cut)?);
    let count = u16::from_le_bytes(bytes_at(page, 10).ok_or_else(cut)?);
    if found != number {
        return Err(damaged(format!(
            "page {number} says that it is page {found}"
        )));
    }
    let count = usize::from(count);
    // Keys and values do not overlap, so all of them together fit into the page.
    let mut room = page
        .len()
        .checked_sub(HEADER_BYTES + count * ELEMENT_BYTES)
        .ok_or_else(cut)?;
    let mut take = |at: usize, length: u32| {
        let length = usize::try_from(length).ok()?;
        room = room.checked_sub(length)?;
        page.get(at..at.checked_add(length)?)
    };
    let starts = (0..count).map(|index| HEADER_BYTES + index * ELEMENT_BYTES);
    match kind {
        LEAF => {
            let element = |at: usize| {
                let [flags, position, key, value] =
                    [0, 4, 8, 12].map(|field| bytes_at(page, at + field).map(u32::from_le_bytes));
                let key_at = at.checked_add(usize::try_from(position?).ok()?)?;
                let key = take(key_at, key?)?;
                let value = take(key_at.checked_add(key.len())?, value?)?;
                let is_bucket = flags? & IS_BUCKET != 0;
                (!key.is_empty()).then_some(Element {
                    key,
                    value,
                    is_bucket,
                })
            };
            let elements: Option<_> = starts.map(element).collect();
            elements.map(Content::Leaf)
        }
        // The keys of a branch are only for searching.
        BRANCH if count > 0 => {
            let child = |at: usize| bytes_at(page, at + 8).map(u64::from_le_bytes);
            let children: Option<_> = starts.map(child).collect();
            children.map(Content::Branch)
        }
        _ => {
            return Err(damaged(format!(
                "page {number} is neither a leaf nor a branch"
            )));
        }
    }
    .ok_or_else(|| {
        damaged(format!(
            "page {number} has an element that lies outside of the page"
        ))
    })
}

fn bytes_at<const N: usize>(page: &[u8], at: usize) -> Option<[u8; N]> {
    page.get(at..at.checked_add(N)?)?.try_into().ok()
}
