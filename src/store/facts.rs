//! Statements about named facts, such as the identity of the writable volume, and
//! about the host directories that were chosen for a snapshot when it was created. A
//! snapshot keeps its host directories, even if the flags of a later start name others.

use rusqlite::params;

use super::sql::Rows;
use super::{Transaction, completeness};
use crate::error::Result;
use crate::types::SnapshotId;

impl Rows {
    /// The value of a named fact; `None` if it is not recorded.
    pub fn fact(&self, name: &str) -> Result<Option<String>> {
        let sql = "SELECT value FROM fact WHERE name = ?1";
        let doing = format_args!("read {name} from the database");
        self.one(sql, [name], doing, |row| row.get(0))
    }

    /// When this database was made, as text, if it is a copy of an earlier state; otherwise
    /// `None`.
    pub fn copied(&self) -> Result<Option<String>> {
        self.fact(completeness::COPIED)
    }

    /// The host directories recorded for a snapshot, separated by colons; `None`
    /// if there are none.
    pub fn chosen_lowers(&self, id: SnapshotId) -> Result<Option<String>> {
        let sql = "SELECT paths FROM lower WHERE id = ?1";
        let doing = format_args!("look up the host directories of snapshot {id}");
        self.one(sql, [id], doing, |row| row.get(0))
    }
}

impl Transaction<'_> {
    /// Records a named fact, and replaces an earlier one of that name.
    pub fn record_fact(&self, name: &str, value: &str) -> Result<()> {
        self.execute(
            "INSERT INTO fact (name, value) VALUES (?1, ?2)
             ON CONFLICT (name) DO UPDATE SET value = excluded.value",
            [name, value],
            format_args!("record {name} in the database"),
        )
    }

    /// Deletes a named fact, if it is there.
    pub fn forget_fact(&self, name: &str) -> Result<()> {
        let sql = "DELETE FROM fact WHERE name = ?1";
        let doing = format_args!("delete {name} from the database");
        self.execute(sql, [name], doing)
    }

    /// Makes a copy the database in use: deletes the record that it is a copy.
    pub fn forget_copied(&self) -> Result<()> {
        self.forget_fact(completeness::COPIED)?;
        self.forget_fact(completeness::HAS_OWN_LOG)
    }

    /// Records the host directories chosen for a new snapshot, if there are any. They
    /// are deleted with the snapshot.
    pub fn record_lowers(&self, id: SnapshotId, paths: &[String]) -> Result<()> {
        if paths.is_empty() {
            return Ok(());
        }
        let sql = "INSERT INTO lower (id, paths) VALUES (?1, ?2)";
        let doing = format_args!("record the host directories of snapshot {id}");
        self.execute(sql, params![id, paths.join(":")], doing)
    }

    /// Deletes the host directories of a snapshot that has become a layer.
    pub fn forget_lowers(&self, id: SnapshotId) -> Result<()> {
        let sql = "DELETE FROM lower WHERE id = ?1";
        let doing = format_args!("delete the host directories of snapshot {id} from the database");
        self.execute(sql, [id], doing)
    }
}
