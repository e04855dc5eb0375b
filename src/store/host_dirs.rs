//! Statements about the host directories that were chosen for a snapshot when
//! it was made. Later starts may choose others; a container keeps its own.

use std::borrow::Borrow;

use rusqlite::{Connection, OptionalExtension, params};

use super::convert::sql_id;
use super::rows::Rows;
use super::sql_error;
use crate::error::Result;
use crate::types::SnapshotId;

impl<C: Borrow<Connection>> Rows<C> {
    /// The directories recorded for a snapshot, separated by colons; `None`
    /// without any.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn chosen_lowers(&self, id: SnapshotId) -> Result<Option<String>> {
        self.connection()
            .prepare_cached("SELECT paths FROM lower WHERE id = ?1")
            .and_then(|mut query| query.query_row([sql_id(id)], |row| row.get(0)).optional())
            .map_err(|error| sql_error(error, format!("look up the directories of snapshot {id}")))
    }
}

impl Rows<&Connection> {
    /// Records the directories chosen for a new snapshot; none, if there are none.
    /// They go with it.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn record_lowers(&self, id: SnapshotId, paths: &[String]) -> Result<()> {
        if paths.is_empty() {
            return Ok(());
        }
        self.connection()
            .prepare_cached("INSERT INTO lower (id, paths) VALUES (?1, ?2)")
            .and_then(|mut insert| insert.execute(params![sql_id(id), paths.join(":")]))
            .map_err(|error| {
                sql_error(error, format!("record the directories of snapshot {id}"))
            })?;
        Ok(())
    }

    /// Strikes them out: the snapshot is a layer now.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn forget_lowers(&self, id: SnapshotId) -> Result<()> {
        self.connection()
            .prepare_cached("DELETE FROM lower WHERE id = ?1")
            .and_then(|mut delete| delete.execute([sql_id(id)]))
            .map_err(|error| {
                sql_error(error, format!("forget the directories of snapshot {id}"))
            })?;
        Ok(())
    }
}
