//! The size of the database's log, and when its contents are moved into the database.
//!
//! If a file has grown, flushing it costs a second flush, of the file system's journal.
//! Therefore the log gets its full size, in zeros, before the first request, and SQLite
//! writes over the zeros. The first transaction after a complete checkpoint costs a
//! second flush too, for the log's header. A thread runs the checkpoints and makes that
//! transaction, so that no request pays for either, unless requests follow each other
//! without a pause until the log is full.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::{Connection, hooks};
use rustix::fs::OFlags;

use super::completeness::{MEANINGLESS_CHANGE, checkpoint};
use super::files::{LOG, beside};
use super::sql::{Rows, sql_error};
use super::{Store, connect};
use crate::error::{ErrorKind, Result};
use crate::util::fault_point::is_left_out;
use crate::util::monitor::Monitor;
use crate::util::threads::Background;

/// The full size of the log.
const LOG_BYTES: u64 = 4 << 20;
/// How many zeros are written before the next flush, while requests are served.
const CHUNK_BYTES: u64 = 256 << 10;
/// If the disk of the log has less free space than this, the log does not get its full size.
const SPARED_BYTES: u64 = 2 * LOG_BYTES;
/// If the log holds this many pages, the thread waits for a pause to move them.
const MANY_FRAMES: usize = 500;
/// If the log holds this many pages, requests have to wait until the pages are moved. A
/// log of the full size has room for 1018 pages.
const MOST_FRAMES: usize = 950;
/// A time without a commit that counts as a pause.
const PAUSE: Duration = Duration::from_millis(20);
/// How long a checkpoint, and the requests behind it, wait for a reader that still needs
/// the log.
const PATIENCE: Duration = Duration::from_millis(100);
/// How long the thread waits before it tries a failed checkpoint again.
const BACKOFF: Duration = Duration::from_secs(1);

/// The number of pages in the log after the last commit.
pub(super) type Frames = Arc<Monitor<usize>>;

impl Store {
    /// Starts the thread that gives the log its full size and runs checkpoints. Commits do
    /// not run checkpoints any more.
    pub fn start_checkpoints(self: &Arc<Store>) -> Result<Background> {
        count_frames(self.alone().connection()?, &self.log_frames)?;
        let stop = |store: &Store| store.log_frames.stop();
        Background::start("checkpointer", self, stop, Store::keep_log_short)
    }

    fn keep_log_short(&self) {
        self.extend_log(CHUNK_BYTES, SPARED_BYTES);
        while self.await_pause().is_some() {
            let is_short = self.move_log().unwrap_or_else(|error| {
                log::warn!(
                    "the database's log cannot be moved into the database, so the log grows; this \
                     is tried again: {}",
                    error.chain()
                );
                false
            });
            if !is_short {
                // The next commit reports the number of pages.
                self.log_frames.look(|frames| *frames = 0);
                self.log_frames.pause(BACKOFF);
            }
        }
    }

    /// Waits until the log holds [`MANY_FRAMES`], and then for a pause in the commits, or
    /// until the log holds [`MOST_FRAMES`].
    fn await_pause(&self) -> Option<()> {
        let enough = |frames: &usize| *frames < MANY_FRAMES;
        loop {
            let seen = self.log_frames.wait_while(enough, |frames| *frames)?;
            let end = Some(Instant::now() + PAUSE);
            let is_same = |frames: &usize| *frames == seen;
            let now = self.log_frames.wait_until(end, is_same, |frames| *frames)?;
            if now == seen || now >= MOST_FRAMES {
                return Some(());
            }
        }
    }

    /// Moves the log's contents into the database. Returns `false` if a reader still
    /// needs the log.
    fn move_log(&self) -> Result<bool> {
        let rows = self.connect_to_move()?;
        let count = || self.log_frames.look(|frames| *frames);
        let before = count();
        checkpoint(&rows, "PASSIVE")?;
        let writer = self.alone();
        writer.rows()?;
        if count() != before {
            if count() < MOST_FRAMES {
                // A request has committed meanwhile, so this was no pause. The rest of the
                // log is moved in the next pause.
                return Ok(true);
            }
            match checkpoint(&rows, "RESTART") {
                Err(error) if error.kind() == ErrorKind::Unavailable => return Ok(false),
                moved => moved?,
            }
        }
        write_header(&rows)?;
        Ok(count() < MANY_FRAMES)
    }

    /// Begins the log again after a complete checkpoint. The caller holds the writer.
    pub(super) fn begin_log_again(&self) -> Result<()> {
        write_header(&self.connect_to_move()?)
    }

    /// Opens the connection that runs checkpoints. Its own commits flush only the log's
    /// header.
    fn connect_to_move(&self) -> Result<Rows> {
        let connecting = |error| sql_error(error, format!("open {}", self.shown()));
        let mut connection = connect(&self.path, self.access).map_err(connecting)?;
        let synchronous = if is_left_out("row") { "OFF" } else { "NORMAL" };
        connection
            .pragma_update(None, "synchronous", synchronous)
            .and_then(|()| connection.busy_timeout(PATIENCE))
            // If a reader has made the log grow beyond its full size, SQLite
            // truncates it.
            .and_then(|()| {
                connection.pragma_update_and_check(
                    None,
                    "journal_size_limit",
                    LOG_BYTES.cast_signed(),
                    |_| Ok(()),
                )
            })
            .map_err(connecting)?;
        count_frames(&mut connection, &self.log_frames)?;
        Ok(Rows::new(connection))
    }

    /// Whether the log has its full size.
    pub(super) fn has_full_log(&self) -> bool {
        std::fs::metadata(beside(&self.path, LOG)).is_ok_and(|log| log.len() >= LOG_BYTES)
    }

    /// Creates the log of a closed database again, with its full size.
    pub(super) fn remake_log(&self) {
        self.extend_log(LOG_BYTES, 0);
    }

    /// Gives the log its full size, if its disk has enough free space, and flushes it
    /// after each chunk.
    fn extend_log(&self, chunk: u64, spared: u64) {
        if let Err(error) = self.try_extend_log(chunk, spared) {
            let shown = self.shown();
            log::debug!("cannot give the log of {shown} its full size: {error}");
        }
    }

    /// Appends zeros to the log until it has its full size. This needs no lock, because
    /// SQLite does not use the length of its log.
    fn try_extend_log(&self, chunk: u64, spared: u64) -> io::Result<()> {
        let path = beside(&self.path, LOG);
        let mut log = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&path)?;
        let mut zeros = Vec::new();
        loop {
            let lacking = LOG_BYTES.saturating_sub(log.metadata()?.len());
            if lacking == 0 || self.log_frames.is_stopping() && chunk < lacking {
                return Ok(());
            }
            require_space(&path, spared)?;
            zeros.resize(usize::try_from(chunk.min(lacking)).unwrap_or(0), 0);
            log.write_all(&zeros)?;
            log.sync_data()?;
        }
    }
}

fn require_space(path: &Path, spared: u64) -> io::Result<()> {
    let disk = rustix::fs::statvfs(path)?;
    if disk.f_bavail.saturating_mul(disk.f_frsize) < spared {
        return Err(io::ErrorKind::StorageFull.into());
    }
    Ok(())
}

/// Replaces SQLite's own checkpoints by a count of the pages that they would
/// move.
fn count_frames(connection: &mut Connection, frames: &Frames) -> Result<()> {
    let frames = Arc::clone(frames);
    let note = move |_: &mut hooks::Wal, pages| {
        let pages = usize::try_from(pages).unwrap_or(0);
        if pages < MANY_FRAMES {
            frames.look(|frames| *frames = pages);
        } else {
            frames.change(|frames| *frames = pages);
        }
        Ok(())
    };
    let counting = "count the pages in the database's log";
    connection
        .wal_hook(Some(note))
        .map_err(|error| sql_error(error, counting))
}

/// Makes a first change after a complete checkpoint, so that SQLite begins the log
/// again with a new header.
fn write_header(rows: &Rows) -> Result<()> {
    rows.execute(MEANINGLESS_CHANGE, [], "begin the database's log again")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::completeness::has_log;
    use crate::store::{Completeness, probe_completeness};

    fn change(store: &Store, value: usize) {
        let changed =
            store.together(|transaction| transaction.record_fact("test", &value.to_string()));
        changed.unwrap();
    }

    #[test]
    fn a_log_keeps_its_size_and_nothing_else_at_a_clean_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metadata.db");
        let log = beside(&path, LOG);
        for round in 0..3 {
            let store = Arc::new(Store::open(&path).unwrap());
            store.begin_use().unwrap();
            let thread = store.start_checkpoints().unwrap();
            while !store.has_full_log() {
                assert_eq!(round, 0);
                std::thread::yield_now();
            }
            change(&store, round);
            assert!(has_log(&path).unwrap());
            drop(thread);
            store.close().unwrap();
            let bytes = std::fs::read(&log).unwrap();
            assert_eq!(bytes.len() as u64, LOG_BYTES);
            assert!(bytes.iter().all(|byte| *byte == 0));
            assert_eq!(probe_completeness(&path).unwrap(), Completeness::Whole);
            drop(store);
            assert!(log.exists());
        }
        // The log does not come from another database.
        let store = Store::open(&path).unwrap();
        let fact = store.read().unwrap().fact("test").unwrap();
        assert_eq!(fact.as_deref(), Some("2"));
    }

    #[test]
    fn a_log_stays_short_without_and_with_pauses_and_readers() {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(Store::open(&dir.path().join("metadata.db")).unwrap());
        store.begin_use().unwrap();
        let _thread = store.start_checkpoints().unwrap();
        let frames = || store.log_frames.look(|frames| *frames);
        // If commits wait for no disk, many of them come before the thread runs.
        let mut most = 0;
        while frames() >= most {
            most = frames();
            change(&store, most);
            assert!(most < 100 * MOST_FRAMES, "the log only grows");
        }
        assert!(most >= MANY_FRAMES, "{most}");
        while frames() >= MANY_FRAMES {
            std::thread::sleep(PAUSE);
        }
        assert!(store.has_full_log());

        let reader = store.read().unwrap();
        let held = reader.connection().unchecked_transaction().unwrap();
        assert!(reader.fact("test").unwrap().is_some());
        let length = || std::fs::metadata(beside(&store.path, LOG)).unwrap().len();
        for round in 0.. {
            if length() > LOG_BYTES {
                break;
            }
            change(&store, round);
        }
        drop(held);
        drop(reader);
        for round in 0.. {
            if length() == LOG_BYTES {
                break;
            }
            assert!(round < 2000);
            change(&store, round);
            std::thread::sleep(4 * PAUSE);
        }
    }
}
