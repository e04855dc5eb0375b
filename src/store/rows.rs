//! The statements: what can be asked of the snapshots, and changed in a
//! transaction. The refusals of containerd's own store
//! (`core/snapshots/storage/bolt.go`) are made here, in its order.

use std::borrow::Borrow;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::{labels, sql_error};
use crate::error::{Error, ErrorKind, Result};
use crate::filter::{Filters, Subject};
use crate::types::{Info, Kind, Labels, Quoted, SnapshotId, Timestamp, Usage, Volume};

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
    /// The key it has.
    pub key: &'a str,
    /// The name it gets.
    pub name: &'a str,
    /// A parent named only now (rebase); empty to keep the one it has.
    pub parent: &'a str,
    /// The labels it gets, already checked.
    pub labels: &'a Labels,
    /// What it holds.
    pub usage: Usage,
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
     s.size_bytes, s.inodes, s.labels, s.parent_id, p.name \
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

    /// The layers from `id` downwards, itself first, in one statement.
    ///
    /// # Errors
    ///
    /// Those of the database; [`ErrorKind::DataLoss`] if one of them has no
    /// directory of its own, as only a view may.
    pub fn chain(&self, id: SnapshotId) -> Result<Vec<Ancestor>> {
        let doing = |error| sql_error(error, format!("look up what snapshot {id} stands on"));
        // UNION without ALL ends even if a damaged database holds a circle.
        let mut query = self
            .connection()
            .prepare_cached(
                "WITH RECURSIVE chain (id, parent_id, volume) AS (
                     SELECT id, parent_id, volume FROM snapshot WHERE id = ?1
                     UNION
                     SELECT s.id, s.parent_id, s.volume
                     FROM chain JOIN snapshot s ON s.id = chain.parent_id
                 )
                 SELECT id, volume FROM chain",
            )
            .map_err(doing)?;
        let rows = query
            .query_map([sql_id(id)], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, Option<i64>>(1)?))
            })
            .map_err(doing)?;
        let mut chain = Vec::new();
        for row in rows {
            let (id, volume) = row.map_err(doing)?;
            let id = id_from_sql(id)?;
            let volume = volume_from_sql(volume)?
                .ok_or_else(|| damaged(format!("layer {id} has no volume")))?;
            chain.push(Ancestor { id, volume });
        }
        Ok(chain)
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

impl Rows<&Connection> {
    /// Records a named fact, in place of the one of that name.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn record_fact(&self, name: &str, value: &str) -> Result<()> {
        self.connection
            .execute(
                "INSERT INTO fact (name, value) VALUES (?1, ?2)
                 ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                [name, value],
            )
            .map_err(|error| sql_error(error, format!("record {name} in the database")))?;
        Ok(())
    }

    /// Enters an active snapshot or a view.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] for an unknown parent,
    /// [`ErrorKind::InvalidArgument`] for a parent that is not committed,
    /// [`ErrorKind::AlreadyExists`] for a key in use, or those of the database.
    pub fn create(&self, new: &New<'_>) -> Result<Created> {
        let parent = match new.parent {
            "" => None,
            name => Some(self.committed_parent(name, ErrorKind::InvalidArgument)?),
        };
        self.refuse_taken(new.key)?;
        let now = Timestamp::now().nanos();
        self.connection
            .prepare_cached(
                "INSERT INTO snapshot
                     (name, parent_id, kind, volume, created_ns, updated_ns, labels)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?5, ?6)",
            )
            .and_then(|mut insert| {
                insert.execute(params![
                    new.key,
                    parent.map(sql_id),
                    sql_kind(new.kind),
                    new.volume.map(sql_volume),
                    now,
                    labels::encode(new.labels),
                ])
            })
            .map_err(|error| sql_error(error, format!("enter snapshot {}", Quoted(new.key))))?;
        Ok(Created {
            id: id_from_sql(self.connection.last_insert_rowid())?,
            ancestors: parent.map_or(Ok(Vec::new()), |parent| self.chain(parent))?,
        })
    }

    /// Turns an active snapshot into a layer; it keeps its id.
    ///
    /// # Errors
    ///
    /// As of [`Rows::committable`], or those of the database.
    pub fn commit(&self, commit: &Commit<'_>) -> Result<()> {
        let (snapshot, parent) = self.committable(commit.key, commit.name, commit.parent)?;
        let now = Timestamp::now().nanos();
        self.connection
            .prepare_cached(
                "UPDATE snapshot SET name = ?2, parent_id = ?3, kind = ?4, created_ns = ?5,
                     updated_ns = ?5, size_bytes = ?6, inodes = ?7, labels = ?8
                 WHERE id = ?1",
            )
            .and_then(|mut update| {
                update.execute(params![
                    sql_id(snapshot.id),
                    commit.name,
                    parent.map(sql_id),
                    sql_kind(Kind::Committed),
                    now,
                    sql_number(commit.usage.size_bytes),
                    sql_number(commit.usage.inodes),
                    labels::encode(commit.labels),
                ])
            })
            .map_err(|error| sql_error(error, format!("commit snapshot {}", Quoted(commit.key))))?;
        Ok(())
    }

    /// Strikes a snapshot out.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], [`ErrorKind::FailedPrecondition`] if others
    /// stand on it, or those of the database.
    pub fn remove(&self, name: &str) -> Result<Place> {
        let removing = |error| sql_error(error, format!("remove snapshot {}", Quoted(name)));
        let snapshot = self.stat(name)?;
        let child: Option<String> = self
            .connection
            .prepare_cached("SELECT name FROM snapshot WHERE parent_id = ?1 LIMIT 1")
            .and_then(|mut query| {
                query
                    .query_row([sql_id(snapshot.id)], |row| row.get(0))
                    .optional()
            })
            .map_err(removing)?;
        if let Some(child) = child {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "snapshot {} is the parent of {}: remove that first",
                    Quoted(name),
                    Quoted(&child)
                ),
            ));
        }
        self.connection
            .prepare_cached("DELETE FROM snapshot WHERE id = ?1")
            .and_then(|mut delete| delete.execute([sql_id(snapshot.id)]))
            .map_err(removing)?;
        Ok(Place {
            id: snapshot.id,
            kind: snapshot.info.kind,
            volume: snapshot.volume,
        })
    }

    /// Changes a snapshot's labels, step by step, and returns it as it is then.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`], or those of the database.
    pub fn update(&self, name: &str, changes: Vec<LabelChange>) -> Result<Snapshot> {
        let mut snapshot = self.stat(name)?;
        for change in changes {
            match change {
                LabelChange::Replace(labels) => snapshot.info.labels = labels,
                LabelChange::Set(key, value) => {
                    snapshot.info.labels.insert(key, value);
                }
                LabelChange::Delete(key) => {
                    snapshot.info.labels.remove(&key);
                }
            }
        }
        snapshot.info.updated = Timestamp::now();
        self.connection
            .prepare_cached("UPDATE snapshot SET updated_ns = ?2, labels = ?3 WHERE id = ?1")
            .and_then(|mut update| {
                update.execute(params![
                    sql_id(snapshot.id),
                    snapshot.info.updated.nanos(),
                    labels::encode(&snapshot.info.labels),
                ])
            })
            .map_err(|error| sql_error(error, format!("update snapshot {}", Quoted(name))))?;
        Ok(snapshot)
    }
}

impl<C: Borrow<Connection>> Rows<C> {
    /// Checks that `key` can be committed as `name` (onto `parent`, if given),
    /// and returns the snapshot and the parent it will have.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::AlreadyExists`] if the name is in use (checked first);
    /// [`ErrorKind::NotFound`] for an unknown key or parent;
    /// [`ErrorKind::FailedPrecondition`] if the snapshot is not active or the
    /// parent not committed; [`ErrorKind::InvalidArgument`] if the snapshot
    /// stands on another parent already.
    pub fn committable(
        &self,
        key: &str,
        name: &str,
        parent: &str,
    ) -> Result<(Snapshot, Option<SnapshotId>)> {
        self.refuse_taken(name)?;
        let snapshot = self.stat(key)?;
        if snapshot.info.kind != Kind::Active {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "snapshot {} is {}, only an active one can be committed",
                    Quoted(key),
                    snapshot.info.kind
                ),
            ));
        }
        let parent_id = match (parent, snapshot.info.parent.as_str()) {
            ("", _) => snapshot.parent_id,
            (given, "") => Some(self.committed_parent(given, ErrorKind::FailedPrecondition)?),
            (given, has) if given == has => snapshot.parent_id,
            (given, has) => {
                return Err(Error::new(
                    ErrorKind::InvalidArgument,
                    format!(
                        "snapshot {} stands on {} and cannot be committed onto {}",
                        Quoted(key),
                        Quoted(has),
                        Quoted(given)
                    ),
                ));
            }
        };
        Ok((snapshot, parent_id))
    }

    fn committed_parent(&self, name: &str, otherwise: ErrorKind) -> Result<SnapshotId> {
        let parent = self.find(name)?.ok_or_else(|| {
            Error::new(
                ErrorKind::NotFound,
                format!("parent snapshot {} does not exist", Quoted(name)),
            )
        })?;
        if parent.info.kind != Kind::Committed {
            return Err(Error::new(
                otherwise,
                format!(
                    "parent snapshot {} is {}, it has to be committed",
                    Quoted(name),
                    parent.info.kind
                ),
            ));
        }
        Ok(parent.id)
    }

    fn refuse_taken(&self, name: &str) -> Result<()> {
        if self.find(name)?.is_none() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::AlreadyExists,
            format!("snapshot {} already exists", Quoted(name)),
        ))
    }
}

/// A row before its numbers have been checked.
struct RawSnapshot {
    id: i64,
    name: String,
    kind: i64,
    volume: Option<i64>,
    created_ns: i64,
    updated_ns: i64,
    size_bytes: i64,
    inodes: i64,
    labels: Option<Labels>,
    parent_id: Option<i64>,
    parent: Option<String>,
}

fn raw_snapshot(row: &Row<'_>) -> rusqlite::Result<RawSnapshot> {
    Ok(RawSnapshot {
        id: row.get(0)?,
        name: row.get(1)?,
        kind: row.get(2)?,
        volume: row.get(3)?,
        created_ns: row.get(4)?,
        updated_ns: row.get(5)?,
        size_bytes: row.get(6)?,
        inodes: row.get(7)?,
        labels: row.get_ref(8)?.as_blob().ok().and_then(labels::decode),
        parent_id: row.get(9)?,
        parent: row.get(10)?,
    })
}

impl RawSnapshot {
    fn check(self) -> Result<Snapshot> {
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

fn damaged(what: String) -> Error {
    Error::new(
        ErrorKind::DataLoss,
        format!("the database is damaged: {what}"),
    )
}

fn sql_number(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
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

fn sql_kind(kind: Kind) -> i64 {
    match kind {
        Kind::View => 1,
        Kind::Active => 2,
        Kind::Committed => 3,
    }
}

fn kind_from_sql(kind: i64) -> Result<Kind> {
    match kind {
        1 => Ok(Kind::View),
        2 => Ok(Kind::Active),
        3 => Ok(Kind::Committed),
        _ => Err(damaged(format!("{kind} is no kind of snapshot"))),
    }
}

fn sql_volume(volume: Volume) -> i64 {
    match volume {
        Volume::Image => 0,
        Volume::Writable => 1,
    }
}

fn volume_from_sql(volume: Option<i64>) -> Result<Option<Volume>> {
    match volume {
        None => Ok(None),
        Some(0) => Ok(Some(Volume::Image)),
        Some(1) => Ok(Some(Volume::Writable)),
        Some(other) => Err(damaged(format!("{other} is no volume"))),
    }
}
