//! Reads the snapshots in a bbolt file, as containerd's Go snapshotters keep them (containerd
//! `core/snapshots/storage`, `bolt.go`; `snapshots/storage` in 1.x).
//!
//! The bucket `v1` contains the bucket `snapshots`, which contains a bucket for
//! each snapshot under its key. A snapshot's bucket has `id` (unsigned varint),
//! `parent` (a key), `kind` (one byte), `inodes` and `size` (signed varints, once
//! committed), `createdat` and `updatedat` (Go's binary times) and a bucket
//! `labels`. The sequence of `snapshots` is the last id. The bucket `parents` in
//! `v1` only repeats the parents.

use std::collections::HashSet;
use std::fs::File;

use super::{Bucket, Database, Entry, Value, damaged};
use crate::error::{Context, Result};
use crate::types::{Info, Kind, Labels, Quoted, SnapshotId, Timestamp, Usage};

/// The contents of a bbolt file with snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// The snapshots, in the order of their keys.
    pub snapshots: Vec<Original>,
    /// The highest id that was ever given out.
    pub highest_id: u64,
    /// The number of the last transaction.
    pub transaction: u64,
}

/// One snapshot of the Go snapshotter that this program replaces (the *original*).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Original {
    /// The id, which is also the name of its directories.
    pub id: SnapshotId,
    /// What callers see of the snapshot.
    pub info: Info,
    /// The usage that was counted at the commit; `None` if the snapshot is not committed.
    pub usage: Option<Usage>,
}

/// Reads all snapshots.
///
/// # Errors
///
/// [`crate::error::ErrorKind::DataLoss`] if the record of a snapshot is damaged.
pub fn read(file: File) -> Result<Contents> {
    let mut database = Database::open(file)?;
    let mut contents = Contents {
        snapshots: Vec::new(),
        highest_id: 0,
        transaction: database.transaction(),
    };
    // Before the first snapshot, there are no buckets.
    let root = database.root();
    let Some(version) = find_bucket(&mut database, &root, b"v1")? else {
        return Ok(contents);
    };
    let Some(all) = find_bucket(&mut database, &version, b"snapshots")? else {
        return Ok(contents);
    };
    let mut ids = HashSet::new();
    for entry in database.entries(&all)? {
        // containerd skips entries that are not buckets, too.
        let Value::Bucket(bucket) = entry.value else {
            continue;
        };
        let name = text(entry.key).ok_or_else(|| damaged("a snapshot's key is not UTF-8"))?;
        let snapshot = read_snapshot(&mut database, &bucket, name.clone())
            .context(|| format!("read snapshot {}", Quoted(&name)))?;
        if !ids.insert(snapshot.id) {
            return Err(damaged(format!("two snapshots have id {}", snapshot.id)));
        }
        contents.highest_id = contents.highest_id.max(snapshot.id.number());
        contents.snapshots.push(snapshot);
    }
    contents.highest_id = contents.highest_id.max(all.sequence());
    // SQLite cannot store larger numbers, and no machine has had so many snapshots.
    if i64::try_from(contents.highest_id).is_err() {
        return Err(damaged("an id is larger than any real one"));
    }
    Ok(contents)
}

fn find_bucket(database: &mut Database, within: &Bucket, name: &[u8]) -> Result<Option<Bucket>> {
    let entries = database.entries(within)?;
    Ok(entries.into_iter().find_map(|entry| match entry.value {
        Value::Bucket(bucket) if entry.key == name => Some(bucket),
        _ => None,
    }))
}

fn read_snapshot(database: &mut Database, bucket: &Bucket, name: String) -> Result<Original> {
    let entries = database.entries(bucket)?;
    let labels = match find(&entries, b"labels") {
        Some(Value::Bucket(labels)) => read_labels(database, labels)?,
        _ => Labels::new(),
    };
    let data = |key: &[u8]| match find(&entries, key) {
        Some(Value::Data(data)) => Some(data.as_slice()),
        _ => None,
    };
    let bad = |what: &str| damaged(format!("its {what} is invalid"));
    let id = data(b"id").and_then(unsigned).filter(|id| *id > 0);
    let kind = match data(b"kind") {
        Some([1]) => Kind::View,
        Some([2]) => Kind::Active,
        Some([3]) => Kind::Committed,
        _ => return Err(bad("kind")),
    };
    let parent = match data(b"parent") {
        None => String::new(),
        Some(parent) => text(parent.to_vec()).ok_or_else(|| bad("parent"))?,
    };
    let moment = |key| data(key).and_then(time);
    let count = |key, what| match data(key) {
        None => Ok(None),
        // A negative number is damage.
        Some(data) => match signed(data) {
            Some(count) => Ok(Some(u64::try_from(count).unwrap_or(0))),
            None => Err(bad(what)),
        },
    };
    let usage = match (
        count(b"size", "size")?,
        count(b"inodes", "number of inodes")?,
    ) {
        (Some(size_bytes), Some(inodes)) => Some(Usage { size_bytes, inodes }),
        _ => None,
    };
    Ok(Original {
        id: SnapshotId::new(id.ok_or_else(|| bad("id"))?),
        info: Info {
            name,
            parent,
            kind,
            created: moment(b"createdat").ok_or_else(|| bad("time of creation"))?,
            updated: moment(b"updatedat").ok_or_else(|| bad("time of change"))?,
            labels,
        },
        usage: usage.filter(|_| kind == Kind::Committed),
    })
}

fn read_labels(database: &mut Database, bucket: &Bucket) -> Result<Labels> {
    let mut labels = Labels::new();
    for entry in database.entries(bucket)? {
        let Value::Data(value) = entry.value else {
            return Err(damaged("a label is a bucket"));
        };
        let bad = || damaged("a label is not UTF-8");
        let key = text(entry.key).ok_or_else(bad)?;
        labels.insert(key, text(value).ok_or_else(bad)?);
    }
    Ok(labels)
}

fn find<'a>(entries: &'a [Entry], key: &[u8]) -> Option<&'a Value> {
    let found = entries.iter().find(|entry| entry.key == key);
    found.map(|entry| &entry.value)
}

fn text(bytes: Vec<u8>) -> Option<String> {
    String::from_utf8(bytes).ok()
}

/// Decodes Go's `encoding/binary.Uvarint`: seven bits in each byte, the lowest
/// first. The highest bit of a byte shows that another byte follows.
fn unsigned(bytes: &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for (index, byte) in bytes.iter().enumerate() {
        let bits = u64::from(byte & 0x7f);
        let shift = u32::try_from(index).ok()?.checked_mul(7)?;
        let shifted = bits.checked_shl(shift)?;
        if shifted >> shift != bits {
            return None;
        }
        number |= shifted;
        if byte & 0x80 == 0 {
            return (index + 1 == bytes.len()).then_some(number);
        }
    }
    None
}

/// Decodes Go's `encoding/binary.Varint`: the sign is the lowest bit.
fn signed(bytes: &[u8]) -> Option<i64> {
    let number = unsigned(bytes)?;
    let half = i64::try_from(number >> 1).ok()?;
    Some(if number & 1 == 0 { half } else { !half })
}

/// The seconds from the year 1, with which Go begins to count, to 1970.
const SECONDS_TO_1970: i64 = 62_135_596_800;

/// Decodes Go's `time.Time.MarshalBinary`: a version, seconds since the year 1 (8
/// bytes), nanoseconds (4), the offset from UTC in minutes (2) and, in version 2,
/// the remaining seconds of the offset (1). The moment does not depend on the
/// offset.
fn time(bytes: &[u8]) -> Option<Timestamp> {
    let (version, rest) = bytes.split_first()?;
    let (seconds, rest) = rest.split_first_chunk()?;
    let (nanos, offset) = rest.split_first_chunk()?;
    let nanos = i32::from_be_bytes(*nanos);
    let is_known = matches!((version, offset.len()), (1, 2) | (2, 3));
    if !is_known || !(0..1_000_000_000).contains(&nanos) {
        return None;
    }
    i64::from_be_bytes(*seconds)
        .checked_sub(SECONDS_TO_1970)?
        .checked_mul(1_000_000_000)?
        .checked_add(nanos.into())
        .map(Timestamp::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_go_writes_them() {
        assert_eq!(unsigned(&[0]), Some(0));
        assert_eq!(unsigned(&[0xac, 0x02]), Some(300));
        let most = [&[0xff; 9][..], &[0x01]].concat();
        assert_eq!(unsigned(&most), Some(u64::MAX));
        assert_eq!(signed(&[0x02]), Some(1));
        assert_eq!(signed(&[0x01]), Some(-1));
        assert_eq!(signed(&most), Some(i64::MIN));
        let too_much = [&[0xff; 9][..], &[0x02]].concat();
        for nonsense in [&[][..], &[0x80], &[0x01, 0x01], &too_much, &[0xff; 40]] {
            assert_eq!(unsigned(nonsense), None, "{nonsense:?}");
        }
    }

    #[test]
    fn times_are_read_as_go_writes_them() {
        let with = |version: u8, seconds: i64, nanos: i32, offset: &[u8]| {
            let mut bytes = vec![version];
            bytes.extend_from_slice(&seconds.to_be_bytes());
            bytes.extend_from_slice(&nanos.to_be_bytes());
            bytes.extend_from_slice(offset);
            time(&bytes).map(Timestamp::nanos)
        };
        let utc = [0xff; 2];
        let at = SECONDS_TO_1970 + 1_700_000_000;
        assert_eq!(
            with(1, at, 123_456_789, &utc),
            Some(1_700_000_000_123_456_789)
        );
        assert_eq!(with(1, at, 0, &[0, 60]), Some(1_700_000_000_000_000_000));
        assert_eq!(
            with(2, at, 1, &[0, 60, 30]),
            Some(1_700_000_000_000_000_001)
        );
        assert_eq!(with(3, at, 0, &utc), None);
        assert_eq!(with(1, at, 1_000_000_000, &utc), None);
        assert_eq!(with(1, at, -1, &utc), None);
        assert_eq!(with(1, at, 0, &[0]), None);
        assert_eq!(with(1, i64::MAX, 0, &utc), None);
        // Go's zero time, in the year 1, is out of the range of a `Timestamp`.
        assert_eq!(with(1, 0, 0, &utc), None);
        assert_eq!(time(&[]), None);
    }
}
