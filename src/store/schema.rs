//! The schema and its history.
//!
//! `user_version` counts the migrations that a database has been through.
//! [`MIGRATIONS`] only ever grows at its end: a migration that has been released is
//! never edited.

use rusqlite::{Connection, TransactionBehavior};

use super::sql::{damaged, sql_error};
use crate::error::{Error, Result};

/// The number ("orws" in ASCII) in the header of each database of this program (`PRAGMA
/// application_id`).
pub const APPLICATION_ID: i32 = 0x6F72_7773;

const MIGRATIONS: &[&str] = &[
    // 1: snapshots. `volume` is where a snapshot's directory is (0 image,
    // 1 writable); it is NULL for a view with a parent, which has no directory.
    // AUTOINCREMENT prevents that the id of a removed snapshot is given out again.
    "CREATE TABLE fact (
         name  TEXT PRIMARY KEY,
         value TEXT NOT NULL
     ) STRICT, WITHOUT ROWID;
     CREATE TABLE snapshot (
         id         INTEGER PRIMARY KEY AUTOINCREMENT,
         name       TEXT NOT NULL UNIQUE,
         parent_id  INTEGER REFERENCES snapshot (id),
         kind       INTEGER NOT NULL CHECK (kind IN (1, 2, 3)),
         volume     INTEGER CHECK (volume IN (0, 1)),
         created_ns INTEGER NOT NULL,
         updated_ns INTEGER NOT NULL,
         size_bytes INTEGER NOT NULL DEFAULT 0,
         inodes     INTEGER NOT NULL DEFAULT 0,
         labels     BLOB NOT NULL
     ) STRICT;
     CREATE INDEX snapshot_by_parent ON snapshot (parent_id) WHERE parent_id IS NOT NULL;",
    // 2: leftover directories of moved layers. Until the next boot of the host, such a
    // directory may be mounted by an active snapshot or a view on the layer that has an id
    // up to `highest_id`.
    "CREATE TABLE retired (
         id         INTEGER PRIMARY KEY,
         highest_id INTEGER NOT NULL,
         boot_id    TEXT NOT NULL
     ) STRICT;
     CREATE INDEX snapshot_away ON snapshot (created_ns) WHERE kind = 3 AND volume = 1;",
    // 3: the sum of the lengths of a layer's files at its commit, for `check`.
    "ALTER TABLE snapshot ADD COLUMN data_bytes INTEGER;",
    // 4: host directories that the daemon's flags have chosen for a snapshot, separated by
    // colons. They are in a separate table, because hardly any snapshot has them.
    "CREATE TABLE lower (
         id    INTEGER PRIMARY KEY REFERENCES snapshot (id) ON DELETE CASCADE,
         paths TEXT NOT NULL
     ) STRICT;",
    // 5: project ids on the writable volume. A row stays after its snapshot is removed,
    // until nothing is charged to the id any more. A row without a snapshot is an id that
    // a start has found on a directory of an interrupted request.
    "CREATE TABLE project (
         project     INTEGER PRIMARY KEY,
         snapshot_id INTEGER UNIQUE,
         max_bytes   INTEGER,
         max_inodes  INTEGER
     ) STRICT;",
    // 6: reserved blocks of ids (the history of this database), and tombstones of
    // directories that may be deleted; see `blocks.rs`.
    "CREATE TABLE block (
         first INTEGER PRIMARY KEY,
         token TEXT NOT NULL
     ) STRICT;
     CREATE TABLE tombstone (
         volume INTEGER NOT NULL CHECK (volume IN (0, 1)),
         id     INTEGER NOT NULL,
         PRIMARY KEY (volume, id)
     ) STRICT, WITHOUT ROWID;",
    // 7: layers whose files containerd has given the owners of a user namespace.
    "ALTER TABLE snapshot ADD COLUMN is_remapped INTEGER NOT NULL DEFAULT 0
         CHECK (is_remapped IN (0, 1));",
    // 8: the size of a leftover directory.
    "ALTER TABLE retired ADD COLUMN size_bytes INTEGER NOT NULL DEFAULT 0;
     UPDATE retired SET size_bytes = coalesce(
         (SELECT size_bytes FROM snapshot WHERE snapshot.id = retired.id), 0);",
    // 9: the extended attributes of a layer at its commit, and whether it is hollow, for
    // `check`; NULL for layers that are older than these columns.
    "ALTER TABLE snapshot ADD COLUMN attributes INTEGER;
     ALTER TABLE snapshot ADD COLUMN is_hollow INTEGER CHECK (is_hollow IN (0, 1));",
    // 10: the digests of sound layers, for `check --deep`.
    "CREATE TABLE digest (
         id     INTEGER PRIMARY KEY REFERENCES snapshot (id) ON DELETE CASCADE,
         digest TEXT NOT NULL
     ) STRICT;",
];

/// Checks the whole database file for damage.
pub fn require_sound(connection: &Connection) -> Result<()> {
    let checking = |error| sql_error(error, "check the database");
    let said: String = connection
        .query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))
        .map_err(checking)?;
    if said == "ok" {
        return Ok(());
    }
    Err(damaged(said.replace('\n', " ")))
}

/// How many migrations the database has been through.
fn version(connection: &Connection) -> Result<usize> {
    let version: u32 = connection
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(|error| sql_error(error, "read the version of the database's schema"))?;
    Ok(version as usize)
}

/// Returns an error unless the schema has the current version. This is for callers that
/// must not change the database.
pub fn require_current(connection: &Connection) -> Result<()> {
    let version = version(connection)?;
    if version == MIGRATIONS.len() {
        return Ok(());
    }
    Err(Error::refused(format!(
        "the database has schema version {version}, but this program reads version {}: another \
         release wrote the database; start the daemon of this release first",
        MIGRATIONS.len()
    )))
}

/// Brings the schema up to date. Each missing migration runs in a transaction of its
/// own, so that a crash leaves the schema at one version or the next.
pub fn migrate(connection: &mut Connection) -> Result<()> {
    migrate_through(connection, MIGRATIONS)
}

fn migrate_through(connection: &mut Connection, migrations: &[&str]) -> Result<()> {
    let migrating = |error| sql_error(error, "bring the database's schema up to date");
    let version = version(connection)?;
    if version > migrations.len() {
        return Err(Error::refused(format!(
            "the database has schema version {version}, but this program knows versions up to {}: \
             a newer release wrote the database; run that release",
            migrations.len()
        )));
    }
    if version == 0 {
        connection
            .pragma_update(None, "application_id", APPLICATION_ID)
            .map_err(migrating)?;
    }
    for (done, migration) in migrations.iter().enumerate().skip(version) {
        let transaction = connection
            .transaction_with_behavior(TransactionBehavior::Exclusive)
            .map_err(migrating)?;
        transaction.execute_batch(migration).map_err(migrating)?;
        transaction
            .pragma_update(None, "user_version", (done + 1) as u32)
            .map_err(migrating)?;
        transaction.commit().map_err(migrating)?;
    }
    // The mode is set after the first write, so that the application id is in the
    // file's header and not only in the log. The file keeps the mode.
    let mode: String = connection
        .pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))
        .map_err(migrating)?;
    if mode != "wal" {
        return Err(Error::refused(format!(
            "SQLite cannot use a write-ahead log on the database's file system (its journal mode \
             is {mode}): put the database on a local disk with --state-dir"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn version(connection: &Connection) -> u32 {
        connection
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .unwrap()
    }

    #[test]
    fn an_older_database_gets_only_what_it_lacks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metadata.db");
        let mut connection = Connection::open(&path).unwrap();
        migrate_through(&mut connection, &["CREATE TABLE a (x)"]).unwrap();
        assert_eq!(version(&connection), 1);
        connection.execute("INSERT INTO a VALUES (7)", []).unwrap();
        let grown = ["CREATE TABLE a (x)", "ALTER TABLE a ADD COLUMN y DEFAULT 8"];
        migrate_through(&mut connection, &grown).unwrap();
        migrate_through(&mut connection, &grown).unwrap();
        assert_eq!(version(&connection), 2);
        let row: (i64, i64) = connection
            .query_row("SELECT x, y FROM a", [], |row| {
                Ok((row.get(0)?, row.get(1)?))
            })
            .unwrap();
        assert_eq!(row, (7, 8));
    }

    #[test]
    fn a_failed_migration_leaves_the_version_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut connection = Connection::open(dir.path().join("metadata.db")).unwrap();
        let broken = ["CREATE TABLE a (x)", "CREATE TABLE b (x); SELECT nonsense"];
        migrate_through(&mut connection, &broken).unwrap_err();
        assert_eq!(version(&connection), 1);
        assert!(connection.execute("INSERT INTO b VALUES (1)", []).is_err());
    }

    #[test]
    fn a_newer_database_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut connection = Connection::open(dir.path().join("metadata.db")).unwrap();
        migrate(&mut connection).unwrap();
        connection
            .pragma_update(None, "user_version", 1000)
            .unwrap();
        let error = migrate(&mut connection).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
        assert!(error.chain().contains("newer release"), "{}", error.chain());
    }
}
