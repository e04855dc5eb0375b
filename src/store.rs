//! Which snapshots exist: the SQLite database, the only truth about them.
//!
//! Owns: the schema and its migrations, transactions, the rules of the key
//! space (what is found, taken, a parent, removable), filters over rows, and
//! a few named facts such as the writable volume's identity.
//! Never: paths of snapshots, directories, mounts; a transaction kept open
//! during file work longer than a few `mkdir`s.
//!
//! One connection writes, behind a mutex; readers are taken from a pool and
//! never wait for the writer (WAL). `synchronous=FULL`: a committed
//! transaction survives power loss. After a crash SQLite replays or drops the
//! WAL's tail, so a transaction is there whole or not at all.

mod changes;
mod convert;
mod labels;
mod moves;
mod rows;
mod schema;
#[cfg(test)]
mod tests;

use std::fs::OpenOptions;
use std::io::{ErrorKind as IoKind, Read};
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags};

use crate::error::{Error, ErrorKind, Result};
use crate::lock::lock;

pub use moves::{Away, Retired};
pub use rows::{Ancestor, Commit, Created, LabelChange, New, Place, Rows, Snapshot};

/// What a file is, by its first bytes.
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

/// Tells what the file at `path` is without opening it as a database. The
/// application id is read from the header of the file itself: a database that
/// has only just been created keeps it there too, because it is written before
/// WAL mode is switched on.
///
/// # Errors
///
/// [`ErrorKind::Internal`] if the file cannot be read.
pub fn probe_format(path: &Path) -> Result<FileFormat> {
    let mut head = Vec::with_capacity(HEADER_BYTES);
    let read = match OpenOptions::new().read(true).open(path) {
        Ok(file) => file.take(HEADER_BYTES as u64).read_to_end(&mut head),
        Err(error) if error.kind() == IoKind::NotFound => return Ok(FileFormat::Absent),
        Err(error) => Err(error),
    };
    read.map_err(|error| {
        Error::caused(
            ErrorKind::Internal,
            format!("read the database {}", path.display()),
            error,
        )
    })?;
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

/// The database.
pub struct Store {
    path: PathBuf,
    writer: Mutex<Connection>,
    readers: Mutex<Vec<Connection>>,
}

impl Store {
    /// Opens the database at `path`, creating it (mode 0600) if there is none,
    /// and brings its schema up to date.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if it is damaged, [`ErrorKind::FailedPrecondition`]
    /// if a newer version of this program wrote it, [`ErrorKind::ResourceExhausted`]
    /// if its disk is full, [`ErrorKind::Internal`] otherwise.
    pub fn open(path: &Path) -> Result<Store> {
        let opening = || format!("open the database {}", path.display());
        // SQLite creates files 0644 less the umask; ours names every image
        // on the host, and its WAL takes the mode of the database.
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| Error::caused(ErrorKind::Internal, opening(), error))?;
        let mut writer = connect(path).map_err(|error| sql_error(error, opening()))?;
        schema::migrate(&mut writer).map_err(|error| error.while_doing(opening()))?;
        Ok(Store {
            path: path.to_owned(),
            writer: Mutex::new(writer),
            readers: Mutex::new(Vec::new()),
        })
    }

    /// Takes a reader; it sees every transaction committed before this call,
    /// and gives its connection back when dropped.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] if a new connection cannot be opened.
    pub fn read(&self) -> Result<Reader<'_>> {
        let pooled = lock(&self.readers).pop();
        let connection = match pooled {
            Some(connection) => connection,
            None => connect(&self.path).map_err(|error| {
                sql_error(error, format!("open the database {}", self.path.display()))
            })?,
        };
        Ok(Reader {
            store: self,
            rows: Some(Rows::new(connection)),
        })
    }

    /// Begins the one write transaction; waits for the one under way. Dropped
    /// without [`Transaction::commit`], it leaves no trace.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] if SQLite cannot begin.
    pub fn write(&self) -> Result<Transaction<'_>> {
        let connection = lock(&self.writer);
        connection
            .prepare_cached("BEGIN IMMEDIATE")
            .and_then(|mut begin| begin.execute([]))
            .map_err(|error| sql_error(error, "begin a transaction"))?;
        Ok(Transaction {
            connection,
            finished: false,
        })
    }

    /// Moves the WAL into the database file and empties it, as before a stop.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] or [`ErrorKind::ResourceExhausted`]; nothing is
    /// lost then, the next start reads the WAL.
    pub fn checkpoint(&self) -> Result<()> {
        lock(&self.readers).clear();
        lock(&self.writer)
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            .map_err(|error| sql_error(error, "checkpoint the database"))
    }
}

/// Read access; see [`Rows`] for what can be asked.
pub struct Reader<'a> {
    store: &'a Store,
    rows: Option<Rows<Connection>>,
}

impl Deref for Reader<'_> {
    type Target = Rows<Connection>;

    fn deref(&self) -> &Rows<Connection> {
        self.rows.as_ref().expect("only drop takes the connection")
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        if let Some(rows) = self.rows.take() {
            lock(&self.store.readers).push(rows.into_inner());
        }
    }
}

/// The write transaction; see [`Rows`] for what can be asked and changed.
pub struct Transaction<'a> {
    connection: MutexGuard<'a, Connection>,
    finished: bool,
}

impl Transaction<'_> {
    /// The rows as this transaction sees and changes them.
    pub fn rows(&self) -> Rows<&Connection> {
        Rows::new(&self.connection)
    }

    /// Makes everything done in it durable. The writer's lock is kept until the
    /// value is dropped, so that what a failure leaves on a disk can be undone
    /// before anybody else is given the same id.
    ///
    /// # Errors
    ///
    /// As of the database's disk; nothing of the transaction remains then.
    pub fn commit(&mut self) -> Result<()> {
        self.connection
            .prepare_cached("COMMIT")
            .and_then(|mut commit| commit.execute([]))
            .map_err(|error| sql_error(error, "commit to the database"))?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        if self.finished || self.connection.is_autocommit() {
            return;
        }
        if let Err(error) = self.connection.execute_batch("ROLLBACK") {
            log::error!("cannot roll a database transaction back: {error}");
        }
    }
}

fn connect(path: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(
        path,
        OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX,
    )?;
    // Only a checkpoint of another connection can be in the way, and shortly.
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.set_prepared_statement_cache_capacity(32);
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection)
}

/// Gives a failure of SQLite its kind.
fn sql_error(error: rusqlite::Error, what: impl Into<String>) -> Error {
    use rusqlite::ErrorCode;
    let kind = match error.sqlite_error_code() {
        Some(ErrorCode::DiskFull) => ErrorKind::ResourceExhausted,
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => ErrorKind::DataLoss,
        Some(ErrorCode::ReadOnly) => ErrorKind::FailedPrecondition,
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    Error::caused(kind, what, error)
}
