//! The statements that ask about snapshots, and what they are asked with.

use std::borrow::Borrow;

use rusqlite::{Connection, OptionalExtension};

use super::convert::{
    RawSnapshot, damaged, id_from_sql, kind_from_sql, place_from_sql, raw_snapshot, sql_id,
    volume_from_sql,
};
use super::sql_error;
use crate::error::{Error, ErrorKind, Result};
use crate::text::filter::{Filters, Subject};
use crate::types::{Content, Info, Kind, Labels, Quoted, SnapshotId, Usage, Volume};

/// One snapshot as it is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The number of its directories.
    pub id: SnapshotId,
    /// The parent's number.
    pub parent_id: Option<SnapshotId>,
    /// Where its directory is; `None` for a view of a parent, which has none.
    pub volume: Option<Volume>,
    /// What callers see.
    pub info: Info,
    /// As counted at commit; zero before.
    pub usage: Usage,
    /// What is known of [`Content::data_bytes`].
    pub data_bytes: DataBytes,
}

impl Snapshot {
    /// What it is, and where its directory.
    pub fn place(&self) -> Place {
        Place {
            id: self.id,
            kind: self.info.kind,
            volume: self.volume,
        }
    }
}

/// What is known of the length of all of a layer's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataBytes {
    /// It was counted at the commit.
    Counted(u64),
    /// It was counted at a commit after which a container could still write: the
    /// layer is what it came to be.
    WasMounted,
    /// It was not counted: no layer, or one older than this count.
    Unknown,
}

/// One layer below a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ancestor {
    /// The layer.
    pub id: SnapshotId,
    /// Where its bytes are.
    pub volume: Volume,
}

/// A snapshot to be prepared.
pub struct New<'a> {
    /// [`Kind::Active`] or [`Kind::View`].
    pub kind: Kind,
    /// Its key.
    pub key: &'a str,
    /// The parent's name; empty without one.
    pub parent: &'a str,
    /// Its labels, already checked.
    pub labels: &'a Labels,
    /// Where its directory will be, if it gets one.
    pub volume: Option<Volume>,
}

/// A snapshot that [`Rows::create`] has entered.
#[derive(Debug, PartialEq, Eq)]
pub struct Created {
    /// Its number.
    pub id: SnapshotId,
    /// The layers below it, nearest first.
    pub ancestors: Vec<Ancestor>,
}

/// An active snapshot to become a layer.
pub struct Commit<'a> {
    /// Its number: another snapshot may have got the key meanwhile.
    pub id: SnapshotId,
    /// The key it has.
    pub key: &'a str,
    /// The name it gets.
    pub name: &'a str,
    /// A parent named only now (rebase); empty to keep the one it has.
    pub parent: &'a str,
    /// The labels it gets, already checked.
    pub labels: &'a Labels,
    /// What it holds.
    pub content: Content,
    /// [`DataBytes::Counted`], unless it is mounted.
    pub data_bytes: DataBytes,
}

/// What a snapshot is, and where its directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number.
    pub id: SnapshotId,
    /// What it was.
    pub kind: Kind,
    /// Where its directory is, if it has one.
    pub volume: Option<Volume>,
}

impl Place {
    /// Whether it is a layer whose bytes have not moved to the image volume yet.
    pub fn is_unmoved(&self) -> bool {
        self.kind == Kind::Committed && self.volume == Some(Volume::Writable)
    }
}

/// Snapshots of one kind, with their directories in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// What they are.
    pub kind: Kind,
    /// Where, if they have directories.
    pub volume: Option<Volume>,
    /// How many.
    pub count: u64,
    /// What the layers among them took at their commits.
    pub bytes: u64,
}

/// One step of an update of labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LabelChange {
    /// All labels are replaced.
    Replace(Labels),
    /// One label is set.
    Set(String, String),
    /// One label is dropped, if it is there.
    Delete(String),
}

impl LabelChange {
    /// Makes the change.
    pub fn apply(self, labels: &mut Labels) {
        match self {
            LabelChange::Replace(all) => *labels = all,
            LabelChange::Set(key, value) => {
                labels.insert(key, value);
            }
            LabelChange::Delete(key) => {
                labels.remove(&key);
            }
        }
    }
}

/// Rows seen through a reader's connection or through a transaction's.
pub struct Rows<C> {
    connection: C,
}

impl<C> Rows<C> {
    pub(super) fn new(connection: C) -> Rows<C> {
        Rows { connection }
    }

    pub(super) fn into_inner(self) -> C {
        self.connection
    }
}

const SELECT: &str = "SELECT s.id, s.name, s.kind, s.volume, s.created_ns, s.updated_ns, \
     s.size_bytes, s.inodes, s.data_bytes, s.labels, s.parent_id, p.name \
     FROM snapshot s LEFT JOIN snapshot p ON p.id = s.parent_id";

impl<C: Borrow<Connection>> Rows<C> {
    pub(super) fn connection(&self) -> &Connection {
        self.connection.borrow()
    }

    /// The snapshot of that key or name, if there is one.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn find(&self, name: &str) -> Result<Option<Snapshot>> {
        let doing = || format!("look snapshot {} up", Quoted(name));
        let found = self
            .connection()
            .prepare_cached(&format!("{SELECT} WHERE s.name = ?1"))
            .and_then(|mut query| query.query_row([name], raw_snapshot).optional())
            .map_err(|error| sql_error(error, doing()))?;
        found.map(RawSnapshot::check).transpose()
    }

    /// The snapshot of that key or name.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], or those of the database.
    pub fn stat(&self, name: &str) -> Result<Snapshot> {
        self.find(name)?.ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("snapshot {} does not exist", Quoted(name)),
            )
        })
    }

    /// Shows `each` snapshot that the filters let through, in order of name.
    ///
    /// # Errors
    ///
    /// Those of the database, and the first one of `each`.
    pub fn list(
        &self,
        filters: &Filters,
        mut each: impl FnMut(Snapshot) -> Result<()>,
    ) -> Result<()> {
        let listing = |error| sql_error(error, "list snapshots");
        let mut query = self
            .connection()
            .prepare_cached(&format!("{SELECT} ORDER BY s.name"))
            .map_err(listing)?;
        let mut rows = query.query([]).map_err(listing)?;
        while let Some(row) = rows.next().map_err(listing)? {
            let snapshot = raw_snapshot(row).map_err(listing)?.check()?;
            let info = &snapshot.info;
            let subject = Subject {
                name: &info.name,
                parent: &info.parent,
                kind: info.kind.word(),
                labels: &info.labels,
            };
            if filters.is_all() || filters.matches(&subject) {
                each(snapshot)?;
            }
        }
        Ok(())
    }

    /// The layers from `id` downwards, itself first.
    ///
    /// # Errors
    ///
    /// Those of the database; [`ErrorKind::DataLoss`] if one of them has no
    /// directory of its own, as only a view may, or stands on itself.
    pub fn chain(&self, id: SnapshotId) -> Result<Vec<Ancestor>> {
        let doing = |error| sql_error(error, format!("look up what snapshot {id} stands on"));
        // Not one recursive statement: for that SQLite makes two tables of its own each
        // time, which takes several times as long.
        self.at_one_moment(|| {
            let mut query = self
                .connection()
                .prepare_cached("SELECT parent_id, volume FROM snapshot WHERE id = ?1")
                .map_err(doing)?;
            let mut chain: Vec<Ancestor> = Vec::new();
            let mut next = Some(id);
            while let Some(id) = next {
                if chain.iter().any(|layer| layer.id == id) {
                    return Err(damaged(format!("layer {id} stands on itself")));
                }
                let layer: Option<(Option<i64>, Option<i64>)> = query
                    .query_row([sql_id(id)], |row| Ok((row.get(0)?, row.get(1)?)))
                    .optional()
                    .map_err(doing)?;
                let Some((parent, volume)) = layer else {
                    break;
                };
                let volume = volume_from_sql(volume)?
                    .ok_or_else(|| damaged(format!("layer {id} has no volume")))?;
                chain.push(Ancestor { id, volume });
                next = parent.map(id_from_sql).transpose()?;
            }
            Ok(chain)
        })
    }

    /// Has all that `work` asks be of one moment, and the database's locks be taken
    /// once for it.
    ///
    /// # Errors
    ///
    /// Those of `work`, or of the database.
    pub fn at_one_moment<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let connection = self.connection();
        if !connection.is_autocommit() {
            return work();
        }
        let begun = connection
            .unchecked_transaction()
            .map_err(|error| sql_error(error, "begin to read the database"))?;
        let found = work();
        drop(begun);
        found
    }

    /// Every snapshot's number, kind, volume and name, in no order.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn inventory(&self) -> Result<Vec<(Place, String)>> {
        let doing = |error| sql_error(error, "list the snapshots' directories");
        let mut query = self
            .connection()
            .prepare_cached("SELECT id, kind, volume, name FROM snapshot")
            .map_err(doing)?;
        let rows = query
            .query_map([], |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, i64>(1)?,
                    row.get::<_, Option<i64>>(2)?,
                    row.get::<_, String>(3)?,
                ))
            })
            .map_err(doing)?;
        let mut inventory = Vec::new();
        for row in rows {
            let (id, kind, volume, name) = row.map_err(doing)?;
            inventory.push((place_from_sql(id, kind, volume)?, name));
        }
        Ok(inventory)
    }

    /// How many snapshots there are, by kind and place.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn tally(&self) -> Result<Vec<Held>> {
        let doing = |error| sql_error(error, "count the snapshots");
        let mut query = self
            .connection()
            .prepare_cached(
                "SELECT kind, volume, count(*), sum(size_bytes) FROM snapshot
                 GROUP BY kind, volume ORDER BY kind, volume",
            )
            .map_err(doing)?;
        let rows = query
            .query_map([], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
            })
            .map_err(doing)?;
        let mut tally = Vec::new();
        for row in rows {
            let (kind, volume, count, bytes): (i64, _, i64, i64) = row.map_err(doing)?;
            tally.push(Held {
                kind: kind_from_sql(kind)?,
                volume: volume_from_sql(volume)?,
                count: count.try_into().unwrap_or(0),
                bytes: bytes.try_into().unwrap_or(0),
            });
        }
        Ok(tally)
    }

    /// Whether no snapshot has ever been entered.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn is_untouched(&self) -> Result<bool> {
        self.connection()
            .query_row(
                "SELECT NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'snapshot')",
                [],
                |row| row.get(0),
            )
            .map_err(|error| sql_error(error, "look whether the database was ever used"))
    }

    /// A named fact that [`Rows::record_fact`] has recorded.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn fact(&self, name: &str) -> Result<Option<String>> {
        self.connection()
            .query_row("SELECT value FROM fact WHERE name = ?1", [name], |row| {
                row.get(0)
            })
            .optional()
            .map_err(|error| sql_error(error, format!("read {name} from the database")))
    }
}
