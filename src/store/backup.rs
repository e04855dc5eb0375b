//! Copying the database to a file beside it, in case the database gets damaged.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::Connection;
use rusqlite::backup::{Backup, StepResult};

use super::files::{COPY, JOURNAL, NEW_COPY, beside, remove_file};
use super::sql::sql_error;
use super::{Store, completeness, schema};
use crate::error::{Context, Error, ErrorKind, Result};

impl Store {
    /// Records that the database has changed since the last copy. Only the first change after
    /// a copy wakes the thread that makes copies.
    pub(super) fn note_change(&self) {
        if !self.is_changed.look(|is_changed| *is_changed) {
            self.is_changed.change(|is_changed| *is_changed = true);
        }
    }

    /// Waits until the database has changed since the last copy, and then until `not_before`,
    /// but for at least `settling`, so that changes in quick succession share a copy. Returns
    /// `false` if the store was closed meanwhile.
    pub fn await_change(&self, not_before: Instant, settling: Duration) -> bool {
        let changed = self.is_changed.wait_while(|is_changed| !is_changed, |_| ());
        let left = || settling.max(not_before.saturating_duration_since(Instant::now()));
        changed.is_some() && self.is_changed.pause(left())
    }

    /// Ends [`Store::await_change`] now and each time it is called later.
    pub fn end_waiting(&self) {
        self.is_changed.stop();
    }

    /// Copies the present state of the database to `<database>.copy`, if it has
    /// changed since the last copy of this process. The copy is checked for
    /// damage before it replaces the last one. Readers and the writer go on
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ResourceExhausted`] if the disk is full, [`ErrorKind::DataLoss`]
    /// if the database is damaged. In both cases, the last copy stays.
    pub fn copy(&self) -> Result<()> {
        if !self.is_changed.look(std::mem::take) {
            return Ok(());
        }
        let target = beside(&self.path, COPY);
        let new = beside(&self.path, NEW_COPY);
        self.copy_to(&new, &target).map_err(|error| {
            self.is_changed.look(|is_changed| *is_changed = true);
            let _ = fs::remove_file(&new);
            error.while_doing(format!("copy the database to {}", target.display()))
        })
    }

    fn copy_to(&self, new: &Path, target: &Path) -> Result<()> {
        let writing = || format!("write {}", new.display());
        for stale in [new.to_owned(), beside(new, JOURNAL)] {
            remove_file(&stale).context(writing)?;
        }
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(new)
            .context(writing)?;

        let reader = self.read()?;
        let mut copy = Connection::open(new).map_err(|error| sql_error(error, "open the copy"))?;
        let copied = Backup::new(reader.connection(), &mut copy).and_then(|backup| backup.step(-1));
        drop(reader);
        let copied = copied.map_err(|error| sql_error(error, "read the database"))?;
        let is_done = copied == StepResult::Done;
        if !is_done {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "the database is busy; the copy will be tried again",
            ));
        }
        copy.pragma_update(None, "journal_mode", "DELETE")
            // A copy has no log, so that one file is all there is to put back.
            .and_then(|()| completeness::mark_copied(&copy))
            .map_err(|error| sql_error(error, "write the copy"))?;
        schema::require_sound(&copy)?;
        copy.close()
            .map_err(|(_, error)| sql_error(error, "close the copy"))?;

        let directory = target.parent().unwrap_or(Path::new("/"));
        fs::rename(new, target)
            .and_then(|()| File::open(directory)?.sync_all())
            .context(writing)
    }
}
