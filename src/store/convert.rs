//! Between SQLite's values and ours. What a sound database cannot hold is
//! [`ErrorKind::DataLoss`].

use rusqlite::Row;

use super::labels;
use super::rows::{DataBytes, Place, Snapshot};
use crate::error::{Error, ErrorKind, Result};
use crate::types::{Info, Kind, Labels, SnapshotId, Timestamp, Usage, Volume};

/// A row before its numbers have been checked.
pub(super) struct RawSnapshot {
    id: i64,
    name: String,
    kind: i64,
    volume: Option<i64>,
    created_ns: i64,
    updated_ns: i64,
    size_bytes: i64,
    inodes: i64,
    data_bytes: Option<i64>,
    labels: Option<Labels>,
    parent_id: Option<i64>,
    parent: Option<String>,
}

pub(super) fn raw_snapshot(row: &Row<'_>) -> rusqlite::Result<RawSnapshot> {
    Ok(RawSnapshot {
        id: row.get(0)?,
        name: row.get(1)?,
        kind: row.get(2)?,
        volume: row.get(3)?,
        created_ns: row.get(4)?,
        updated_ns: row.get(5)?,
        size_bytes: row.get(6)?,
        inodes: row.get(7)?,
        data_bytes: row.get(8)?,
        labels: row.get_ref(9)?.as_blob().ok().and_then(labels::decode),
        parent_id: row.get(10)?,
        parent: row.get(11)?,
    })
}

impl RawSnapshot {
    pub(super) fn check(self) -> Result<Snapshot> {
        let labels = self
            .labels
            .ok_or_else(|| damaged(format!("the labels of snapshot {}", self.id)))?;
        Ok(Snapshot {
            id: id_from_sql(self.id)?,
            parent_id: self.parent_id.map(id_from_sql).transpose()?,
            volume: volume_from_sql(self.volume)?,
            usage: Usage {
                size_bytes: self.size_bytes.try_into().unwrap_or(0),
                inodes: self.inodes.try_into().unwrap_or(0),
            },
            data_bytes: match self.data_bytes.map(u64::try_from) {
                None => DataBytes::Unknown,
                Some(Ok(bytes)) => DataBytes::Counted(bytes),
                Some(Err(_)) => DataBytes::WasMounted,
            },
            info: Info {
                name: self.name,
                parent: self.parent.unwrap_or_default(),
                kind: kind_from_sql(self.kind)?,
                created: Timestamp::from_nanos(self.created_ns),
                updated: Timestamp::from_nanos(self.updated_ns),
                labels,
            },
        })
    }
}

pub(super) fn damaged(what: String) -> Error {
    Error::new(
        ErrorKind::DataLoss,
        format!("the database is damaged: {what}"),
    )
}

pub(super) fn sql_number(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A negative number is none that was counted.
pub(super) fn sql_data_bytes(data_bytes: DataBytes) -> Option<i64> {
    match data_bytes {
        DataBytes::Counted(bytes) => Some(sql_number(bytes)),
        DataBytes::WasMounted => Some(-1),
        DataBytes::Unknown => None,
    }
}

pub(super) fn sql_id(id: SnapshotId) -> i64 {
    sql_number(id.number())
}

pub(super) fn id_from_sql(id: i64) -> Result<SnapshotId> {
    match u64::try_from(id) {
        Ok(number) if number > 0 => Ok(SnapshotId::new(number)),
        _ => Err(damaged(format!("{id} is no snapshot id"))),
    }
}

pub(super) fn place_from_sql(id: i64, kind: i64, volume: Option<i64>) -> Result<Place> {
    Ok(Place {
        id: id_from_sql(id)?,
        kind: kind_from_sql(kind)?,
        volume: volume_from_sql(volume)?,
    })
}

pub(super) fn sql_kind(kind: Kind) -> i64 {
    match kind {
        Kind::View => 1,
        Kind::Active => 2,
        Kind::Committed => 3,
    }
}

pub(super) fn kind_from_sql(kind: i64) -> Result<Kind> {
    match kind {
        1 => Ok(Kind::View),
        2 => Ok(Kind::Active),
        3 => Ok(Kind::Committed),
        _ => Err(damaged(format!("{kind} is no kind of snapshot"))),
    }
}

pub(super) fn sql_volume(volume: Volume) -> i64 {
    match volume {
        Volume::Image => 0,
        Volume::Writable => 1,
    }
}

pub(super) fn volume_from_sql(volume: Option<i64>) -> Result<Option<Volume>> {
    match volume {
        None => Ok(None),
        Some(0) => Ok(Some(Volume::Image)),
        Some(1) => Ok(Some(Volume::Writable)),
        Some(other) => Err(damaged(format!("{other} is no volume"))),
    }
}
