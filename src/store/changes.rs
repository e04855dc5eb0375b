//! Statements that change snapshots, within a transaction. The refusals of
//! containerd's own store (`core/snapshots/storage/bolt.go`) are made here, in
//! its order.

use std::borrow::Borrow;

use rusqlite::{Connection, OptionalExtension, params};

use super::convert::{id_from_sql, sql_data_bytes, sql_id, sql_kind, sql_number, sql_volume};
use super::rows::{Commit, Created, LabelChange, New, Place, Rows, Snapshot};
use super::{labels, sql_error};
use crate::error::{Error, ErrorKind, Result};
use crate::types::{Kind, Quoted, SnapshotId, Timestamp};

impl Rows<&Connection> {
    /// Records a named fact, in place of the one of that name.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn record_fact(&self, name: &str, value: &str) -> Result<()> {
        self.connection()
            .execute(
                "INSERT INTO fact (name, value) VALUES (?1, ?2)
                 ON CONFLICT (name) DO UPDATE SET value = excluded.value",
                [name, value],
            )
            .map_err(|error| sql_error(error, format!("record {name} in the database")))?;
        Ok(())
    }

    /// Strikes a named fact out, if it is there.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn forget_fact(&self, name: &str) -> Result<()> {
        self.connection()
            .execute("DELETE FROM fact WHERE name = ?1", [name])
            .map_err(|error| sql_error(error, format!("forget {name} in the database")))?;
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
        self.connection()
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
            id: id_from_sql(self.connection().last_insert_rowid())?,
            ancestors: parent.map_or(Ok(Vec::new()), |parent| self.chain(parent))?,
        })
    }

    /// Turns an active snapshot into a layer; it keeps its id.
    ///
    /// # Errors
    ///
    /// As of [`Rows::committable`]; [`ErrorKind::NotFound`] if the key is another
    /// snapshot's by now; or those of the database.
    pub fn commit(&self, commit: &Commit<'_>) -> Result<()> {
        let (snapshot, parent) = self.committable(commit.key, commit.name, commit.parent)?;
        if snapshot.id != commit.id {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("snapshot {} was removed meanwhile", Quoted(commit.key)),
            ));
        }
        let now = Timestamp::now().nanos();
        self.connection()
            .prepare_cached(
                "UPDATE snapshot SET name = ?2, parent_id = ?3, kind = ?4, created_ns = ?5,
                     updated_ns = ?5, size_bytes = ?6, inodes = ?7, data_bytes = ?8, labels = ?9
                 WHERE id = ?1",
            )
            .and_then(|mut update| {
                update.execute(params![
                    sql_id(snapshot.id),
                    commit.name,
                    parent.map(sql_id),
                    sql_kind(Kind::Committed),
                    now,
                    sql_number(commit.content.usage.size_bytes),
                    sql_number(commit.content.usage.inodes),
                    sql_data_bytes(commit.data_bytes),
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
            .connection()
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
        self.connection()
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
            change.apply(&mut snapshot.info.labels);
        }
        snapshot.info.updated = Timestamp::now();
        self.connection()
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
