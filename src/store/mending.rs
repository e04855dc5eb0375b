//! Statements that put a database right which does not go with its disks.

use std::borrow::Borrow;

use rusqlite::{Connection, params};

use super::convert::{sql_id, sql_number};
use super::rows::Rows;
use super::{completeness, sql_error};
use crate::error::Result;
use crate::types::{Content, SnapshotId};

impl<C: Borrow<Connection>> Rows<C> {
    /// Of when the database is, if it is known not to be the latest state of
    /// itself, in words.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn copied(&self) -> Result<Option<String>> {
        self.fact(completeness::COPIED)
    }
}

impl Rows<&Connection> {
    /// Strikes snapshots out, with whatever stands on them among them.
    ///
    /// # Errors
    ///
    /// Those of the database; [`crate::error::ErrorKind::Internal`] if something
    /// that is not among them stands on one.
    pub fn drop_snapshots(&self, ids: &[SnapshotId]) -> Result<()> {
        // Loose first: in a damaged database they may stand on each other.
        for statement in [
            "UPDATE snapshot SET parent_id = NULL WHERE id = ?1",
            "DELETE FROM snapshot WHERE id = ?1",
        ] {
            for id in ids {
                self.connection()
                    .prepare_cached(statement)
                    .and_then(|mut change| change.execute([sql_id(*id)]))
                    .map_err(|error| sql_error(error, format!("drop snapshot {id}")))?;
            }
        }
        Ok(())
    }

    /// Records anew what a layer holds.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn record_content(&self, id: SnapshotId, content: &Content) -> Result<()> {
        self.connection()
            .execute(
                "UPDATE snapshot SET size_bytes = ?2, inodes = ?3, data_bytes = ?4 WHERE id = ?1",
                params![
                    sql_id(id),
                    sql_number(content.usage.size_bytes),
                    sql_number(content.usage.inodes),
                    sql_number(content.data_bytes),
                ],
            )
            .map_err(|error| sql_error(error, format!("record what layer {id} holds")))?;
        Ok(())
    }

    /// Sees to it that no id up to that one is given out any more.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn skip_ids_through(&self, highest: u64) -> Result<()> {
        let highest = sql_number(highest);
        let skip = || {
            let changed = self.connection().execute(
                "UPDATE sqlite_sequence SET seq = max(seq, ?1) WHERE name = 'snapshot'",
                [highest],
            )?;
            if changed == 0 {
                self.connection().execute(
                    "INSERT INTO sqlite_sequence (name, seq) VALUES ('snapshot', ?1)",
                    [highest],
                )?;
            }
            Ok(())
        };
        skip().map_err(|error| sql_error(error, "skip the ids of directories that are there"))
    }

    /// The database is in use as it is, also if it was a copy.
    ///
    /// # Errors
    ///
    /// Those of the database.
    pub fn forget_copied(&self) -> Result<()> {
        self.forget_fact(completeness::COPIED)
    }
}
