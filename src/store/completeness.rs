//! Whether a database file is in the latest state of the database.
//!
//! SQLite keeps the latest transactions in a log beside the file (`-wal`), and
//! treats a file whose log is missing as complete. Therefore a mark in the file
//! itself says that the database is in use. As long as the mark is there, there
//! must be a log that is not empty, even after a crash; a clean end removes
//! the mark. A copy (see `backup`) has a mark of its own.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rusqlite::{Connection, OpenFlags, OptionalExtension};

use super::files::{LOG, beside};
use super::sql::{Rows, sql_error};
use super::{FileFormat, probe_format};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::text::uri::encode_path;

/// The name of the fact that marks a database as in use.
pub const IN_USE: &str = "in_use";
pub(super) const COPIED: &str = "copied";
/// The name of the fact that the log beside a copy belongs to the copy. It is recorded when
/// a repair of the copy begins.
pub(super) const HAS_OWN_LOG: &str = "copy_has_own_log";

/// What is known about a database before it is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// Nothing indicates that the database is incomplete.
    Whole,
    /// The database was in use, and its log, with the latest transactions, is missing.
    LogMissing,
    /// The database is a copy of an earlier state, made at this time (UTC).
    Copy(String),
    /// The database is a copy, made at this time (UTC), but the log beside it belongs to
    /// another state.
    CopyWithLog(String),
}

/// Reports whether the database at `path` is complete. No file is created or changed.
/// Damage is found later, by [`super::Store::open`].
pub fn probe_completeness(path: &Path) -> Result<Completeness> {
    if probe_format(path)? != FileFormat::Ours {
        return Ok(Completeness::Whole);
    }
    let has_log = has_log(path)?;
    // In the middle of a checkpoint, the file alone may be inconsistent. The facts
    // are `None` then.
    let fact = |name| peek_fact(path, name);
    Ok(match (fact(COPIED), has_log) {
        (Some(made), false) => Completeness::Copy(made),
        (Some(made), true) if fact(HAS_OWN_LOG).is_some() => Completeness::Copy(made),
        (Some(made), true) => Completeness::CopyWithLog(made),
        (None, false) if fact(IN_USE).is_some() => Completeness::LogMissing,
        (None, _) => Completeness::Whole,
    })
}

/// Whether the database at `path` has a log with a valid header. After a clean end, the
/// log is missing, or full of zeros.
pub(super) fn has_log(path: &Path) -> Result<bool> {
    let mut head = Vec::with_capacity(LOG_HEADER_BYTES);
    let read = match File::open(beside(path, LOG)) {
        Ok(log) => log.take(LOG_HEADER_BYTES as u64).read_to_end(&mut head),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => Err(error),
    };
    read.context(|| format!("read the log of the database {}", path.display()))?;
    Ok(is_log_header(&head))
}

/// The length of the log's header (sqlite.org/fileformat2.html, section 4.1): eight
/// numbers. The first shows the byte order of the last two, which are the checksum of
/// the others.
const LOG_HEADER_BYTES: usize = 32;
const LOG_MAGIC: u32 = 0x377F_0682;

/// Whether `head` is a valid header of a log. SQLite ignores a log without a valid header.
fn is_log_header(head: &[u8]) -> bool {
    let (words, rest) = head.as_chunks::<4>();
    let numbers: Vec<_> = words.iter().map(|word| u32::from_be_bytes(*word)).collect();
    if numbers.len() != LOG_HEADER_BYTES / 4 || !rest.is_empty() || numbers[0] & !1 != LOG_MAGIC {
        return false;
    }
    let is_big_endian = numbers[0] & 1 == 1;
    let summed = |number: u32| match is_big_endian {
        true => number,
        false => number.swap_bytes(),
    };
    let mut sums = [0_u32; 2];
    for pair in numbers[..6].chunks(2) {
        sums[0] = sums[0].wrapping_add(summed(pair[0])).wrapping_add(sums[1]);
        sums[1] = sums[1].wrapping_add(summed(pair[1])).wrapping_add(sums[0]);
    }
    sums == numbers[6..]
}

/// Reads a fact from the database file alone, without its log. This function changes
/// nothing, because a daemon may be using the database.
pub fn peek_fact(path: &Path, name: &str) -> Option<String> {
    read_without_log(path, name).ok().flatten()
}

/// Reads a fact with the option `immutable`, with which SQLite neither reads a log nor
/// locks the file.
fn read_without_log(path: &Path, name: &str) -> rusqlite::Result<Option<String>> {
    let path = encode_path(path.as_os_str().as_encoded_bytes());
    let uri = format!("file:{path}?immutable=1");
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
        | OpenFlags::SQLITE_OPEN_URI
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    Connection::open_with_flags(uri, flags)?
        .query_row("SELECT value FROM fact WHERE name = ?1", [name], |row| {
            row.get(0)
        })
        .optional()
}

/// Records in the database that its log is missing. Without this record, a new log would
/// make the database look complete. A repair removes the record.
pub(super) fn note_missing_log(connection: &Connection) -> Result<()> {
    connection
        .execute(
            "INSERT OR REPLACE INTO fact (name, value)
             VALUES (?1, 'when its log was lost'), (?2, 'yes')",
            [COPIED, HAS_OWN_LOG],
        )
        .map(drop)
        .map_err(|error| sql_error(error, "record that the database's log is missing"))
}

/// Records in a copy of the database that any log beside the copy is its own. The record
/// is written before the copy gets a log.
pub(super) fn note_own_log(connection: &Connection) -> Result<()> {
    let doing = "record that a repair of the copy begins";
    let has_own = connection
        .query_row("SELECT 1 FROM fact WHERE name = ?1", [HAS_OWN_LOG], |_| {
            Ok(())
        })
        .optional()
        .map_err(|error| sql_error(error, doing))?;
    if has_own.is_some() {
        return Ok(());
    }
    connection
        .pragma_update(None, "journal_mode", "DELETE")
        .and_then(|()| {
            connection.execute(
                "INSERT INTO fact (name, value) VALUES (?1, 'yes')",
                [HAS_OWN_LOG],
            )
        })
        .map(drop)
        .map_err(|error| sql_error(error, doing))
}

/// Marks the database as in use, and moves the mark and the rest of the log into the file
/// itself. The log keeps its contents: from now on, an empty log means a lost one.
pub(super) fn mark_in_use(rows: &Rows) -> Result<()> {
    let sql = "INSERT INTO fact (name, value) VALUES (?1, 'yes') ON CONFLICT DO NOTHING";
    rows.execute(sql, [IN_USE], "mark the database as in use")?;
    match settle(rows) {
        // Without the mark in the file, the database works; only the loss of its log would
        // not be noticed.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::Unavailable | ErrorKind::ResourceExhausted
            ) =>
        {
            log::warn!(
                "the database works, but a loss of its log would not be noticed until the next \
                 start: {}",
                error.chain()
            );
            Ok(())
        }
        settled => settled,
    }
}

/// Moves the contents of the log into the database file.
pub(super) fn settle(rows: &Rows) -> Result<()> {
    checkpoint(rows, "FULL")
}

/// Moves the contents of the log into the database file, except for the part that readers
/// still need.
pub(super) fn shrink_log(rows: &Rows) -> Result<()> {
    checkpoint(rows, "PASSIVE")
}

/// A change of a fact that no code reads.
pub(super) const MEANINGLESS_CHANGE: &str =
    "INSERT OR REPLACE INTO fact (name, value) VALUES ('overwritten', random())";

/// Removes the mark of a database in use, and moves the log into the database file.
pub(super) fn mark_unused(rows: &Rows) -> Result<()> {
    let sql = "DELETE FROM fact WHERE name = ?1";
    rows.execute(sql, [IN_USE], "close the database")?;
    checkpoint(rows, "TRUNCATE")
}

/// Runs a checkpoint, which moves the log into the database file. It waits for readers as
/// long as the connection waits for any lock.
pub(super) fn checkpoint(rows: &Rows, mode: &str) -> Result<()> {
    let sql = format!("PRAGMA wal_checkpoint({mode})");
    let is_busy = rows.one(&sql, [], "move the log into the database", |row| row.get(0))?;
    if is_busy == Some(true) {
        return Err(Error::new(
            ErrorKind::Unavailable,
            "the log cannot be moved into the database, because another process reads it: try \
             again once that process has ended",
        ));
    }
    Ok(())
}

/// Turns a database into a copy: removes the mark, and records the time of the
/// copy.
pub(super) fn mark_copied(connection: &Connection) -> rusqlite::Result<()> {
    let sql = "DELETE FROM fact WHERE name IN (?1, ?2)";
    connection.execute(sql, [IN_USE, HAS_OWN_LOG])?;
    connection.execute(
        "INSERT OR REPLACE INTO fact (name, value)
         VALUES (?1, strftime('%Y-%m-%d %H:%M:%S UTC', 'now'))",
        [COPIED],
    )?;
    Ok(())
}
