//! The format of a file, determined before it is opened as our database.

use std::fs::OpenOptions;
use std::io::{ErrorKind as IoKind, Read};
use std::path::Path;

use super::schema;
use crate::error::{Context, Result};

/// The format of a file, from its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileFormat {
    /// There is no file, or it is empty (SQLite's own first state).
    Absent,
    /// A SQLite database with our application id.
    Ours,
    /// The bbolt database of containerd's Go snapshotters.
    Bolt,
    /// A SQLite database of another program.
    OtherSqlite,
    /// Anything else.
    Unknown,
}

/// Reports the format of the file at `path` without opening it as a database. The
/// application id is read from the file's header. A new database has it there from the
/// beginning, because the id is written before WAL mode is switched on.
pub fn probe_format(path: &Path) -> Result<FileFormat> {
    let mut head = Vec::with_capacity(HEADER_BYTES);
    let read = match OpenOptions::new().read(true).open(path) {
        Ok(file) => file.take(HEADER_BYTES as u64).read_to_end(&mut head),
        Err(error) if error.kind() == IoKind::NotFound => return Ok(FileFormat::Absent),
        Err(error) => Err(error),
    };
    read.context(|| format!("read the database {}", path.display()))?;
    Ok(format_of(&head))
}

/// SQLite's header (sqlite.org/fileformat2.html, section 1.3): the magic at 0,
/// the application id at 68, big-endian.
const HEADER_BYTES: usize = 100;
const SQLITE_MAGIC: &[u8] = b"SQLite format 3\0";
const APPLICATION_ID_AT: usize = 68;
/// bbolt's meta page: a 16-byte page header, then this number in the byte
/// order of the machine that wrote it (go.etcd.io/bbolt `db.go`, `magic`).
const BOLT_MAGIC: u32 = 0xED0C_DAED;

fn format_of(head: &[u8]) -> FileFormat {
    let word = |at: usize| -> Option<[u8; 4]> { head.get(at..at + 4)?.try_into().ok() };
    if head.is_empty() {
        FileFormat::Absent
    } else if head.starts_with(SQLITE_MAGIC) {
        if word(APPLICATION_ID_AT).map(i32::from_be_bytes) == Some(schema::APPLICATION_ID) {
            FileFormat::Ours
        } else {
            FileFormat::OtherSqlite
        }
    } else if word(16).is_some_and(|bytes| {
        u32::from_le_bytes(bytes) == BOLT_MAGIC || u32::from_be_bytes(bytes) == BOLT_MAGIC
    }) {
        FileFormat::Bolt
    } else {
        FileFormat::Unknown
    }
}
