//! The SQLite database. It alone decides which snapshots exist.
//!
//! Owns: the schema and its migrations, transactions, the rules for keys (which
//! snapshots are found, which keys are taken, what may be a parent or be
//! removed), filters over rows, and a few named facts such as the writable
//! volume's identity. Never: paths of snapshots, directories, mounts; a
//! transaction that stays open during file work longer than a few `mkdir`s.
//!
//! One connection writes, behind a mutex. Readers are taken from a pool and
//! never wait for the writer (WAL). `synchronous=FULL`: a committed transaction
//! survives a power cut. After a crash, SQLite applies or drops the end of the
//! log, so each transaction is there completely or not at all.

mod backup;
mod ballast;
mod blocks;
mod changes;
mod checkpoints;
mod completeness;
mod facts;
mod files;
mod format;
mod import;
mod labels;
mod layers;
mod projects;
mod schema;
mod snapshots;
mod sql;
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

use crate::error::{Context, Error, ErrorKind, Result};
use crate::util::fault_point::is_left_out;
use crate::util::lock::lock;
use crate::util::monitor::Monitor;

pub use completeness::{Completeness, IN_USE, peek_fact, probe_completeness};
pub use files::{
    DATABASE, DRAFT, ORIGINAL, find_remains, is_database_file, remove_companions, require_short,
};
pub use format::{FileFormat, probe_format};
pub use layers::{LeftoverDir, UnmovedLayer};
pub use projects::Project;
pub use snapshots::{Ancestor, Commit, DataBytes, LabelChange, New, Place, Snapshot, Tally};
pub use sql::Rows;
pub use transaction::Transaction;

use ballast::Ballast;
pub use ballast::set_space_aside;
use checkpoints::Frames;
use sql::sql_error;
use transaction::Writer;

/// The database: one connection that writes, and a pool of connections that read.
pub struct Store {
    path: PathBuf,
    /// The flags with which connections are opened: read-only (possibly while a daemon
    /// writes), or to read and write.
    access: OpenFlags,
    writer: Writer,
    readers: Mutex<Vec<Rows>>,
    ballast: Ballast,
    /// Whether anything has changed since the last copy.
    is_changed: Monitor<bool>,
    log_frames: Frames,
}

impl Store {
    /// Opens the database at `path`, creating it (mode 0600) if there is none,
    /// and brings its schema up to date.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if the database is damaged,
    /// [`ErrorKind::FailedPrecondition`] if a newer version of this program wrote it,
    /// [`ErrorKind::ResourceExhausted`] if its disk is full.
    pub fn open(path: &Path) -> Result<Store> {
        let store = match Store::try_open(path) {
            // On a full disk SQLite cannot even begin to read, because it has to
            // create the log and the log's index.
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
        // SQLite creates files with mode 0644 less the umask. This database names every
        // image on the host, so its mode is 0600. SQLite gives its log the same mode.
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)
            .context(opening)?;
        let access = OpenFlags::SQLITE_OPEN_READ_WRITE;
        let mut writer = connect(path, access).map_err(|error| sql_error(error, opening()))?;
        let prepared = schema::require_sound(&writer)
            .and_then(|()| match completeness {
                Completeness::Copy(_) => completeness::note_own_log(&writer),
                _ => Ok(()),
            })
            .and_then(|()| schema::migrate(&mut writer))
            .and_then(|()| match completeness {
                Completeness::LogMissing => completeness::note_missing_log(&writer),
                _ => Ok(()),
            });
        if let Err(error) = prepared {
            if error.kind() == ErrorKind::DataLoss {
                // Closing the connection would move the log into the damaged file.
                std::mem::forget(writer);
            }
            return Err(error.while_doing(opening()));
        }
        Ok(Store::new(path, access, Some(Rows::new(writer))))
    }

    fn new(path: &Path, access: OpenFlags, writer: Option<Rows>) -> Store {
        Store {
            path: path.to_owned(),
            access,
            writer: Writer::new(writer),
            readers: Mutex::default(),
            ballast: Ballast::of(path),
            is_changed: Monitor::default(),
            log_frames: Frames::default(),
        }
    }

    /// Opens the database at `path` read-only, also while a daemon uses it. Its
    /// contents are not changed; SQLite may leave an empty log beside it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if the database is damaged,
    /// [`ErrorKind::FailedPrecondition`] if another version of this program wrote it.
    pub fn open_read_only(path: &Path) -> Result<Store> {
        let opening = || format!("open the database {}", path.display());
        let access = OpenFlags::SQLITE_OPEN_READ_ONLY;
        let reader = connect(path, access).map_err(|error| sql_error(error, opening()))?;
        schema::require_sound(&reader)
            .and_then(|()| schema::require_current(&reader))
            .map_err(|error| error.while_doing(opening()))?;
        Ok(Store::new(path, access, None))
    }

    /// Takes a reader, which sees every transaction committed before this call.
    /// When dropped, the reader returns its connection to the pool.
    pub fn read(&self) -> Result<Reader<'_>> {
        let pooled = lock(&self.readers).pop();
        let rows = match pooled {
            Some(rows) => rows,
            None => connect(&self.path, self.access)
                .map(Rows::new)
                .map_err(|error| sql_error(error, format!("open {}", self.shown())))?,
        };
        Ok(Reader {
            store: self,
            rows: Some(rows),
        })
    }

    fn shown(&self) -> String {
        format!("the database {}", self.path.display())
    }

    /// Marks the database as in use. Callers do this before the first change. If the log is
    /// lost from now on, [`probe_completeness`] notices the loss.
    pub fn begin_use(&self) -> Result<()> {
        let writer = self.alone();
        completeness::mark_in_use(writer.rows()?)?;
        if let Err(error) = self.begin_log_again() {
            log::debug!("the first request will be slower: {}", error.chain());
        }
        Ok(())
    }

    /// Moves the contents of the log into the database file; the log keeps a copy.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] if a reader of another process still needs the log.
    pub fn settle(&self) -> Result<()> {
        completeness::settle(self.alone().rows()?)
    }

    /// Releases the ballast, and lets SQLite begin its log again, so that a removal
    /// can be recorded on a full disk. Returns `false` if there is no ballast left.
    pub fn make_room(&self) -> bool {
        let is_released = self.ballast.release();
        let moved = self.alone().rows().and_then(completeness::shrink_log);
        if let Err(error) = moved {
            log::debug!(
                "the log of the database stays as long as it is: {}",
                error.chain()
            );
        }
        is_released
    }

    /// Creates the ballast files again, unless they exist or there is no space. They let a
    /// removal be recorded on a full disk.
    pub fn refill_ballast(&self) {
        self.ballast.fill();
    }

    /// Ends the use of the database: moves the log into the database file, and fills the log
    /// with zeros. After that, nothing can be written any more.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] or [`ErrorKind::ResourceExhausted`]. Nothing is
    /// lost in either case, because the next start reads the log.
    pub fn close(&self) -> Result<()> {
        self.is_changed.stop();
        lock(&self.readers).clear();
        let Some(writer) = self.alone().close() else {
            return Ok(());
        };
        let keeps_log = self.has_full_log();
        let closed = completeness::mark_unused(&writer);
        if closed.is_err() {
            // Closing the connection would remove the log, which has to exist while
            // the mark is set.
            std::mem::forget(writer);
        } else {
            drop(writer);
            if keeps_log {
                self.remake_log();
            }
        }
        closed
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            log::warn!(
                "the database was not closed cleanly; nothing is lost, because the next start \
                 reads its log: {}",
                error.chain()
            );
        }
    }
}

/// A connection for reading. [`Rows`] has the queries.
pub struct Reader<'a> {
    store: &'a Store,
    rows: Option<Rows>,
}

impl Deref for Reader<'_> {
    type Target = Rows;

    fn deref(&self) -> &Rows {
        self.rows.as_ref().expect("only drop takes the connection")
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        let rows = self.rows.take();
        // A connection that could not end its transaction would see the state of that moment
        // for ever, so it is not used again.
        let usable = rows.filter(|rows| rows.connection().is_autocommit());
        lock(&self.store.readers).extend(usable);
    }
}

fn not_writable() -> Error {
    Error::new(
        ErrorKind::Unavailable,
        "the database is not open for writing",
    )
}

/// The size of a connection's cache.
const CACHE_KIB: i32 = 256;
/// How many changed pages of a transaction stay in memory before SQLite writes
/// them to the log.
const MOST_CHANGED_PAGES: i32 = 500;

fn connect(path: &Path, access: OpenFlags) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    // SQLite waits up to this long for a lock. Only a checkpoint of another connection can
    // hold one, for a short time.
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.set_prepared_statement_cache_capacity(32);
    // Without this setting, SQLite plans a statement again for each value of a
    // parameter.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    // The default of 2000 KiB is not needed: each connection has a cache of its own, and the
    // kernel's page cache serves all of them.
    connection.pragma_update(None, "cache_size", -CACHE_KIB)?;
    // The changes of a batch stay in memory until its commit, even beyond the size of
    // the cache. Then only the commit can fail on a full disk, for the batch as a
    // whole.
    connection.pragma_update(None, "cache_spill", MOST_CHANGED_PAGES)?;
    let synchronous = if is_left_out("row") { "OFF" } else { "FULL" };
    connection.pragma_update(None, "synchronous", synchronous)?;
    connection.pragma_update(None, "foreign_keys", true)?;
    Ok(connection)
}
