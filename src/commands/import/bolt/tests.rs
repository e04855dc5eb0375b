//! Files that are built byte by byte, sound and damaged. The tests with files
//! that containerd's own package has written are in `tests/bolt`.

use std::fs::File;
use std::io::Write;

use super::snapshots::{Contents, read};
use super::*;
use crate::types::Kind;
use crate::util::fnv::Fnv;

const BRANCH: u16 = 1;
const LEAF: u16 = 2;

/// An element of a leaf: whether it is a bucket, its key, its value.
type Pair<'a> = (bool, &'a [u8], Vec<u8>);

fn header(number: u64, kind: u16, count: usize, overflow: u32) -> Vec<u8> {
    let mut page = number.to_le_bytes().to_vec();
    page.extend_from_slice(&kind.to_le_bytes());
    page.extend_from_slice(&u16::try_from(count).unwrap().to_le_bytes());
    page.extend_from_slice(&overflow.to_le_bytes());
    page
}

fn leaf(number: u64, overflow: u32, pairs: &[Pair<'_>]) -> Vec<u8> {
    let mut page = header(number, LEAF, pairs.len(), overflow);
    let mut behind = pairs.len() * 16;
    for (is_bucket, key, value) in pairs {
        for number in [usize::from(*is_bucket), behind, key.len(), value.len()] {
            page.extend_from_slice(&u32::try_from(number).unwrap().to_le_bytes());
        }
        behind = behind + key.len() + value.len() - 16;
    }
    for (_, key, value) in pairs {
        page.extend_from_slice(key);
        page.extend_from_slice(value);
    }
    page
}

fn branch(number: u64, children: &[u64]) -> Vec<u8> {
    let mut page = header(number, BRANCH, children.len(), 0);
    for child in children {
        page.extend_from_slice(&[0; 8]);
        page.extend_from_slice(&child.to_le_bytes());
    }
    page
}

fn bucket(root: u64, sequence: u64, inline: &[u8]) -> Vec<u8> {
    [&root.to_le_bytes(), &sequence.to_le_bytes(), inline].concat()
}

fn meta(number: u64, size: u32, root: u64, pages: u64, transaction: u64) -> Vec<u8> {
    let mut page = header(number, 4, 0, 0);
    let mut fields = Vec::new();
    for field in [0xED0C_DAED, 2, size, 0_u32] {
        fields.extend_from_slice(&field.to_le_bytes());
    }
    for field in [root, 0, 2, pages, transaction] {
        fields.extend_from_slice(&field.to_le_bytes());
    }
    let mut sum = Fnv::new();
    sum.add(&fields);
    page.extend_from_slice(&fields);
    page.extend_from_slice(&sum.sum().to_le_bytes());
    page
}

/// Builds a file: two meta pages, the second one newer, followed by `pages`.
fn file_of(size: u32, root: u64, pages: &[Vec<u8>]) -> Vec<u8> {
    let size_bytes = usize::try_from(size).unwrap();
    let mut file = Vec::new();
    let mut body = Vec::new();
    for page in pages {
        body.extend_from_slice(page);
        body.resize(body.len().next_multiple_of(size_bytes), 0);
    }
    let count = 2 + u64::try_from(body.len() / size_bytes).unwrap();
    for number in [0, 1] {
        file.extend(meta(number, size, root, count, 7 + number));
        file.resize(file.len().next_multiple_of(size_bytes), 0);
    }
    file.extend(body);
    file
}

fn snapshot(id: u8, kind: u8, parent: &str, labels: Option<Vec<u8>>) -> Vec<u8> {
    let time = [
        &[1][..],
        &63_900_000_000_i64.to_be_bytes(),
        &[0, 0, 0, 5, 0xff, 0xff],
    ]
    .concat();
    let mut pairs: Vec<Pair<'_>> = vec![
        (false, b"createdat", time.clone()),
        (false, b"id", vec![id]),
        (false, b"inodes", vec![6]),
        (false, b"kind", vec![kind]),
    ];
    pairs.extend(labels.map(|labels| (true, &b"labels"[..], labels)));
    if !parent.is_empty() {
        pairs.push((false, b"parent", parent.as_bytes().to_vec()));
    }
    pairs.push((false, b"size", vec![0x80, 0x80, 0x01]));
    pairs.push((false, b"updatedat", time));
    leaf(0, 0, &pairs)
}

/// A branch over two leaves, one of which a further page continues, a bucket
/// within its value, and one with labels.
fn sample(size: u32) -> Vec<u8> {
    let labels = bucket(0, 0, &leaf(0, 0, &[(false, b"a", b"b".to_vec())]));
    let mut with_labels = snapshot(2, 2, "base", Some(labels));
    with_labels[..8].copy_from_slice(&7_u64.to_le_bytes());
    let filler = vec![b'x'; usize::try_from(size).unwrap()];
    let pages = [
        leaf(2, 0, &[(true, b"v1", bucket(3, 0, &[]))]),
        leaf(3, 0, &[(true, b"snapshots", bucket(4, 9, &[]))]),
        branch(4, &[5, 8]),
        leaf(
            5,
            1,
            &[
                (true, b"base", bucket(0, 0, &snapshot(1, 3, "", None))),
                (false, b"odd", filler),
            ],
        ),
        with_labels,
        leaf(8, 0, &[(true, b"web", bucket(7, 0, &[]))]),
    ];
    file_of(size, 2, &pages)
}

fn open(bytes: &[u8]) -> Result<Contents> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    read(file)
}

#[track_caller]
fn refused(bytes: &[u8], kind: ErrorKind, words: &str) {
    let error = open(bytes).unwrap_err();
    assert_eq!(error.kind(), kind, "{}", error.chain());
    assert!(error.chain().contains(words), "{}", error.chain());
}

#[test]
fn pages_of_all_kinds_are_read() {
    for size in [1024, 4096, 16384, 65536] {
        let contents = open(&sample(size)).unwrap();
        assert_eq!((contents.highest_id, contents.transaction), (9, 8));
        let [base, web] = contents.snapshots.as_slice() else {
            panic!("{contents:?}");
        };
        assert_eq!((base.id.number(), base.info.kind), (1, Kind::Committed));
        let usage = base.usage.unwrap();
        assert_eq!((usage.inodes, usage.size_bytes), (3, 8192));
        assert_eq!(web.info.name, "web");
        assert_eq!(web.info.parent, "base");
        assert_eq!(web.info.labels["a"], "b");
        assert_eq!(web.usage, None, "not committed");
        assert_eq!(web.info.created.nanos() % 1_000_000_000, 5);
    }
}

#[test]
fn a_file_without_snapshots_is_empty() {
    let contents = open(&file_of(4096, 2, &[leaf(2, 0, &[])])).unwrap();
    assert_eq!(contents.snapshots, []);
    assert_eq!(contents.highest_id, 0);
}

#[test]
fn the_newest_whole_meta_counts() {
    let mut bytes = sample(4096);
    // The first meta, which is the older one, leads to an empty bucket.
    bytes.extend(leaf(9, 0, &[]));
    bytes.resize(10 * 4096, 0);
    let older = meta(0, 4096, 9, 10, 7);
    bytes[..older.len()].copy_from_slice(&older);
    assert_eq!(open(&bytes).unwrap().snapshots.len(), 2);
    bytes[4096 + 40] ^= 1;
    assert_eq!(open(&bytes).unwrap().snapshots.len(), 0);
}

#[test]
fn the_second_meta_is_found_without_the_first() {
    for size in [1024, 4096, 65536] {
        let mut bytes = sample(size);
        bytes[20] ^= 1;
        assert_eq!(open(&bytes).unwrap().snapshots.len(), 2);
        bytes[usize::try_from(size).unwrap() + 20] ^= 1;
        refused(&bytes, ErrorKind::DataLoss, "both of its meta pages");
    }
}

#[test]
fn other_formats_are_named() {
    let mut bytes = sample(4096);
    for at in [16, 4096 + 16] {
        bytes[at..at + 4].reverse();
    }
    refused(&bytes, ErrorKind::FailedPrecondition, "byte order");

    let with = |at: usize, value: u32| {
        let mut bytes = sample(4096);
        for page in [0, 4096] {
            let start = page + 16;
            bytes[start + at..start + at + 4].copy_from_slice(&value.to_le_bytes());
            let mut sum = Fnv::new();
            sum.add(&bytes[start..start + 56]);
            bytes[start + 56..start + 64].copy_from_slice(&sum.sum().to_le_bytes());
        }
        bytes
    };
    refused(&with(4, 3), ErrorKind::FailedPrecondition, "version 3");
    for size in [0, 3000, 256, 1 << 30] {
        refused(&with(8, size), ErrorKind::FailedPrecondition, "pages of");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let v1 = |root| leaf(2, 0, &[(true, b"v1", bucket(root, 0, &[]))]);
    let cases: [(&str, Vec<Vec<u8>>); 12] = [
        ("twice", vec![v1(3), branch(3, &[3])]),
        ("twice", vec![v1(3), branch(3, &[4]), branch(4, &[3])]),
        ("twice", vec![v1(2)]),
        ("not one of its", vec![v1(99)]),
        ("not one of its", vec![v1(1)]),
        ("not one of its", vec![leaf(2, 9, &[])]),
        ("neither a leaf nor", vec![v1(3), branch(3, &[])]),
        ("is empty", vec![v1(3), branch(3, &[4]), leaf(4, 0, &[])]),
        ("continues on", vec![leaf(2, u32::MAX, &[])]),
        ("says that it is page", vec![leaf(3, 0, &[])]),
        (
            "out of order",
            vec![leaf(2, 0, &[(false, b"b", vec![]), (false, b"a", vec![])])],
        ),
        (
            "a bucket is cut short",
            vec![leaf(2, 0, &[(true, b"v1", vec![0; 9])])],
        ),
    ];
    for (words, pages) in cases {
        refused(&file_of(4096, 2, &pages), ErrorKind::DataLoss, words);
    }
    // An element after the page's end, and elements that all share the same bytes.
    let mut behind = leaf(2, 0, &[(false, b"k", vec![1])]);
    behind[20..24].copy_from_slice(&4090_u32.to_le_bytes());
    refused(
        &file_of(4096, 2, &[behind]),
        ErrorKind::DataLoss,
        "outside of the page",
    );
    let mut shared = leaf(2, 0, &[(false, b"a", vec![]), (false, b"b", vec![0; 4000])]);
    shared[28..32].copy_from_slice(&4000_u32.to_le_bytes());
    refused(
        &file_of(4096, 2, &[shared]),
        ErrorKind::DataLoss,
        "outside of the page",
    );
}

#[test]
fn snapshots_that_make_no_sense_are_named() {
    let all = |pairs: &[Pair<'_>]| {
        let pages = [
            leaf(2, 0, &[(true, b"v1", bucket(3, 0, &[]))]),
            leaf(3, 0, &[(true, b"snapshots", bucket(4, 0, &[]))]),
            leaf(4, 0, pairs),
        ];
        file_of(4096, 2, &pages)
    };
    let one = |page: Vec<u8>| all(&[(true, b"web", bucket(0, 0, &page))]);
    assert_eq!(
        open(&one(snapshot(1, 2, "", None)))
            .unwrap()
            .snapshots
            .len(),
        1
    );
    refused(
        &one(snapshot(0, 2, "", None)),
        ErrorKind::DataLoss,
        "\"web\": ",
    );
    refused(&one(snapshot(1, 4, "", None)), ErrorKind::DataLoss, "kind");
    refused(&one(leaf(0, 0, &[])), ErrorKind::DataLoss, "kind");
    let twice = all(&[
        (true, b"one", bucket(0, 0, &snapshot(1, 2, "", None))),
        (true, b"two", bucket(0, 0, &snapshot(1, 2, "", None))),
    ]);
    refused(&twice, ErrorKind::DataLoss, "id 1");
    let odd = all(&[(true, &[0xff], bucket(0, 0, &snapshot(1, 2, "", None)))]);
    refused(&odd, ErrorKind::DataLoss, "UTF-8");
}

#[test]
fn a_file_cut_short_is_refused() {
    let whole = sample(1024);
    for length in 0..whole.len() {
        if length % 1024 < 100 || length % 1024 > 1000 {
            let error = open(&whole[..length]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DataLoss, "{}", error.chain());
        }
    }
}

/// Whatever value a byte has, reading ends with a result. The result need not be
/// right, because only the metas have a checksum.
#[test]
fn no_byte_can_be_trusted() {
    let whole = sample(512);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&whole).unwrap();
    for (at, byte) in whole.iter().enumerate() {
        for value in [0, 0xff, byte ^ 0x80, byte.wrapping_add(1)] {
            file.write_all_at(&[value], at as u64).unwrap();
            let _: Result<Contents> = read(File::try_clone(&file).unwrap());
        }
        file.write_all_at(&[*byte], at as u64).unwrap();
    }
    assert_eq!(read(file).unwrap().snapshots.len(), 2);
}

/// Many small elements take more memory than space in the file.
#[test]
fn every_element_counts() {
    const IN_A_PAGE: u32 = 60_000;
    const SIZE: usize = 65_536;
    let overflow = (usize::try_from(IN_A_PAGE).unwrap() * (16 + 4) + 16) / SIZE;
    let mut pages = Vec::new();
    let mut children = Vec::new();
    for page in 0..40_u32 {
        let keys: Vec<_> = (0..IN_A_PAGE)
            .map(|key| (page * IN_A_PAGE + key).to_be_bytes())
            .collect();
        let pairs: Vec<Pair<'_>> = keys
            .iter()
            .map(|key| (false, key.as_slice(), Vec::new()))
            .collect();
        let number = 3 + u64::from(page) * u64::try_from(overflow + 1).unwrap();
        children.push(number);
        pages.push(leaf(number, u32::try_from(overflow).unwrap(), &pairs));
    }
    pages.insert(0, branch(2, &children));
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&file_of(u32::try_from(SIZE).unwrap(), 2, &pages))
        .unwrap();
    let mut database = Database::open(file).unwrap();
    let root = database.root();
    let error = database.entries(&root).unwrap_err();
    assert!(error.chain().contains("more than 256 MiB"), "{error:?}");
}
