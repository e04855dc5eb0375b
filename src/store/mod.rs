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

mod backup;
mod ballast;
mod changes;
mod completeness;
mod convert;
mod format;
mod host_dirs;
mod import;
mod labels;
mod mending;
mod moves;
mod projects;
mod rows;
mod schema;
#[cfg(test)]
mod tests;
mod transaction;

use std::fs::OpenOptions;
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags};

use crate::error::{Error, ErrorKind, Result};
use crate::util::lock::lock;

pub use completeness::{Completeness, IN_USE, peek_fact, probe_completeness};
pub use format::{FileFormat, probe_format};
pub use import::{find_remains, remove_companions};
pub use moves::{Away, Retired};
pub use projects::Project;
pub use rows::{
    Ancestor, Commit, Created, DataBytes, Held, LabelChange, New, Place, Rows, Snapshot,
};
pub use transaction::{MOST_TOGETHER, Transaction};

use backup::Changes;
use ballast::Ballast;
pub use ballast::set_space_aside;
use transaction::Writer;

/// The database.
pub struct Store {
    path: PathBuf,
    access: Access,
    writer: Writer,
    readers: Mutex<Vec<Connection>>,
    ballast: Ballast,
    changes: Changes,
}

/// What a database is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// To be read, perhaps beside a daemon that writes.
    Read,
    /// To be read and written, by nobody else.
    ReadWrite,
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
        let store = match Store::try_open(path) {
            // On a full disk SQLite cannot even begin to read: the log and its
            // index are files of their own.
            Err(error) if error.kind() != ErrorKind::DataLoss && Ballast::of(path).release() => {
                Store::try_open(path)?
            }
            opened => opened?,
        };
        store.refill_ballast();
        Ok(store)
    }

    fn try_open(path: &Path) -> Result<Store> {
        let opening = || format!("open the database {}", path.display());
        let completeness = probe_completeness(path)?;
        // SQLite creates files 0644 less the umask; ours names every image
        // on the host, and its WAL takes the mode of the database.
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| Error::caused(ErrorKind::Internal, opening(), error))?;
        let mut writer =
            connect(path, Access::ReadWrite).map_err(|error| sql_error(error, opening()))?;
        let prepared = schema::require_sound(&writer)
            .and_then(|()| schema::migrate(&mut writer))
            .and_then(|()| match completeness {
                Completeness::LogMissing => completeness::note_missing_log(&writer),
                _ => Ok(()),
            });
        if let Err(error) = prepared {
            if error.kind() == ErrorKind::DataLoss {
                // Closed, it would move its log into what is damaged.
                std::mem::forget(writer);
            }
            return Err(error.while_doing(opening()));
        }
        Ok(Store {
            path: path.to_owned(),
            access: Access::ReadWrite,
            writer: Writer::new(Some(writer)),
            readers: Mutex::new(Vec::new()),
            ballast: Ballast::of(path),
            changes: Changes::default(),
        })
    }

    /// Opens the database at `path` to read it only, also while a daemon uses
    /// it. What it holds is not changed; SQLite may leave an empty log beside it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if it is damaged, [`ErrorKind::FailedPrecondition`]
    /// if another version of this program wrote it, [`ErrorKind::Internal`]
    /// otherwise.
    pub fn open_read_only(path: &Path) -> Result<Store> {
        let opening = || format!("open the database {}", path.display());
        let reader = connect(path, Access::Read).map_err(|error| sql_error(error, opening()))?;
        schema::require_sound(&reader)
            .and_then(|()| schema::require_current(&reader))
            .map_err(|error| error.while_doing(opening()))?;
        Ok(Store {
            path: path.to_owned(),
            access: Access::Read,
            writer: Writer::new(None),
            readers: Mutex::new(vec![reader]),
            ballast: Ballast::of(path),
            changes: Changes::default(),
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
            None => connect(&self.path, self.access)
                .map_err(|error| sql_error(error, format!("open {}", self.shown())))?,
        };
        Ok(Reader {
            store: self,
            rows: Some(Rows::new(connection)),
        })
    }

    fn shown(&self) -> String {
        format!("the database {}", self.path.display())
    }

    /// Marks the database as in use, before anything is acknowledged: should its
    /// log get lost from now on, [`probe_completeness`] tells.
    ///
    /// # Errors
    ///
    /// As of [`Store::write`], or of the database's disk.
    pub fn begin_use(&self) -> Result<()> {
        completeness::mark_in_use(self.alone().connection()?)
    }

    /// Moves all that the log holds into the file itself; the log keeps it.
    ///
    /// # Errors
    ///
    /// As of [`Store::begin_use`]; [`ErrorKind::Unavailable`] if a reader of
    /// another process is in the way.
    pub fn settle(&self) -> Result<()> {
        completeness::settle(self.alone().connection()?)
    }

    /// Gives back the space that was set aside, and has SQLite begin its log
    /// anew, so that a removal can be recorded on a full disk. `false` if that
    /// has been done and there is nothing more to give.
    pub fn make_room(&self) -> bool {
        let is_released = self.ballast.release();
        if let Ok(writer) = self.alone().connection() {
            // What it cannot move stays in the log.
            let moved = writer.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
            if let Err(error) = moved {
                log::debug!("checkpoint the database: {error}");
            }
        }
        is_released
    }

    /// Sets space aside for removals on a full disk, if it is not set aside
    /// already and there is some.
    pub fn refill_ballast(&self) {
        self.ballast.fill();
    }

    /// Ends the use of the database: its log is moved into it, and nothing can
    /// be written any more.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] or [`ErrorKind::ResourceExhausted`]; nothing is
    /// lost then, the next start reads the log.
    pub fn close(&self) -> Result<()> {
        self.changes.stop();
        lock(&self.readers).clear();
        let Some(writer) = self.alone().close() else {
            return Ok(());
        };
        completeness::mark_unused(&writer).inspect_err(|_| {
            // Closed, it would take the log away, which the mark asks for.
            std::mem::forget(writer);
        })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            log::warn!("{}", error.chain());
        }
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
        let connection = self.rows.take().map(Rows::into_inner);
        // One that could not end its transaction would see that moment for ever.
        let usable = connection.filter(|connection| connection.is_autocommit());
        lock(&self.store.readers).extend(usable);
    }
}

/// The file beside a database that has its name and that suffix.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn not_writable() -> Error {
    Error::new(
        ErrorKind::Unavailable,
        "the database is not open for writing",
    )
}

/// What a connection keeps of the database in memory.
const CACHE_KIB: i32 = 256;
/// How many changed pages a transaction keeps in memory before it writes them.
const MOST_CHANGED_PAGES: i32 = 500;

fn connect(path: &Path, access: Access) -> rusqlite::Result<Connection> {
    let access = match access {
        Access::Read => OpenFlags::SQLITE_OPEN_READ_ONLY,
        Access::ReadWrite => OpenFlags::SQLITE_OPEN_READ_WRITE,
    };
    let connection = Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    // Only a checkpoint of another connection can be in the way, and shortly.
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.set_prepared_statement_cache_capacity(32);
    // Without this promise a statement is planned anew for each value it is given.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    // In KiB, of 2000 by default: each has one of its own, and the kernel one for all.
    connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
    // What a batch has changed stays in memory until its commit, cache or not: only
    // there a full disk fails it as a whole.
    connection.pragma_update(None, "cache_spill", MOST_CHANGED_PAGES)?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection)
}

/// Gives a failure of SQLite its kind.
fn sql_error(error: rusqlite::Error, what: impl Into<String>) -> Error {
    use rusqlite::ErrorCode;
    let extended_code = error.sqlite_error().map(|failure| failure.extended_code);
    let kind = match error.sqlite_error_code() {
        // What it says where there is no room for the log's index.
        _ if extended_code == Some(rusqlite::ffi::SQLITE_IOERR_SHMSIZE) => {
            ErrorKind::ResourceExhausted
        }
        Some(ErrorCode::DiskFull) => ErrorKind::ResourceExhausted,
        Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => ErrorKind::DataLoss,
        Some(ErrorCode::ReadOnly) => ErrorKind::FailedPrecondition,
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => ErrorKind::Unavailable,
        _ => ErrorKind::Internal,
    };
    match error {
        // Its own text has the same words twice.
        rusqlite::Error::SqliteFailure(failure, Some(said)) => {
            let cause = format!("{said} (SQLite error {})", failure.extended_code);
            Error::caused(kind, what, cause)
        }
        error => Error::caused(kind, what, error),
    }
}
