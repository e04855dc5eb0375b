//! Copies of the database beside itself, for the day when it is damaged.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};

use super::{Store, beside, completeness, schema, sql_error};
use crate::error::{Error, ErrorKind, Result};
use crate::util::lock::lock;

/// Whether there is anything that the last copy does not have.
#[derive(Default)]
pub(super) struct Changes {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    is_changed: bool,
    is_stopped: bool,
}

impl Changes {
    pub(super) fn note(&self) {
        let mut state = lock(&self.state);
        if !std::mem::replace(&mut state.is_changed, true) {
            self.changed.notify_all();
        }
    }

    pub(super) fn stop(&self) {
        lock(&self.state).is_stopped = true;
        self.changed.notify_all();
    }
}

impl Store {
    /// Waits until there is something to copy, and then until `not_before`, but
    /// at least `settling`, for the changes that come together. `false` if the
    /// store was closed meanwhile.
    pub fn await_change(&self, not_before: Instant, settling: Duration) -> bool {
        let state = lock(&self.changes.state);
        let waited = self
            .changes
            .changed
            .wait_while(state, |state| !state.is_changed && !state.is_stopped);
        let state = waited.unwrap_or_else(PoisonError::into_inner);
        let left = settling.max(not_before.saturating_duration_since(Instant::now()));
        let waited = self
            .changes
            .changed
            .wait_timeout_while(state, left, |state| !state.is_stopped);
        !waited.unwrap_or_else(PoisonError::into_inner).0.is_stopped
    }

    /// Wakes whoever waits in [`Store::await_change`], for good.
    pub fn end_waiting(&self) {
        self.changes.stop();
    }

    /// Copies the database, as of this moment and found sound, to
    /// `<database>.copy`, if it has changed since the last copy of this process.
    /// Readers and the writer go on meanwhile.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ResourceExhausted`] if the disk is full,
    /// [`ErrorKind::DataLoss`] if the database is damaged, or as of the disk;
    /// the last copy stays then.
    pub fn copy(&self) -> Result<()> {
        if !std::mem::replace(&mut lock(&self.changes.state).is_changed, false) {
            return Ok(());
        }
        let target = beside(&self.path, ".copy");
        let new = beside(&self.path, ".copy.new");
        self.copy_to(&new, &target).map_err(|error| {
            lock(&self.changes.state).is_changed = true;
            let _ = fs::remove_file(&new);
            error.while_doing(format!("copy the database to {}", target.display()))
        })
    }

    fn copy_to(&self, new: &Path, target: &Path) -> Result<()> {
        let file_error = |error: std::io::Error| {
            let kind = match error.kind() {
                std::io::ErrorKind::StorageFull => ErrorKind::ResourceExhausted,
                _ => ErrorKind::Internal,
            };
            Error::caused(kind, format!("write {}", new.display()), error)
        };
        for stale in [new.to_owned(), beside(new, "-journal")] {
            match fs::remove_file(stale) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(file_error(error));
                }
                _ => {}
            }
        }
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(new)
            .map_err(file_error)?;

        let reader = self.read()?;
        let mut copy = Connection::open(new).map_err(|error| sql_error(error, "open it"))?;
        let copied = Backup::new(reader.connection(), &mut copy).and_then(|backup| backup.step(-1));
        drop(reader);
        let is_done = copied.map_err(|error| sql_error(error, "read it"))? == StepResult::Done;
        if !is_done {
            return Err(Error::new(ErrorKind::Unavailable, "it is busy"));
        }
        copy.pragma_update(None, "journal_mode", "DELETE")
            // One file is all there is to put back, without a log of its own.
            .and_then(|()| completeness::mark_copied(&copy))
            .map_err(|error| sql_error(error, "write it"))?;
        schema::require_sound(&copy)?;
        copy.close()
            .map_err(|(_, error)| sql_error(error, "close it"))?;

        let directory = target.parent().unwrap_or(Path::new("/"));
        fs::rename(new, target)
            .and_then(|()| File::open(directory)?.sync_all())
            .map_err(file_error)
    }
}
