//! Write transactions, and how simultaneous transactions become durable together.
//!
//! Making a transaction durable takes longer than everything else in it, and one flush
//! serves any number of transactions. Therefore, a caller that commits while others
//! wait for the writer leaves SQLite's transaction open for them, and waits. The work
//! of each caller is a savepoint in it, and the last waiting caller commits for all.
//! These callers are the members of a batch. The batch becomes durable as a whole or not
//! at all, and no member returns before that.

#[cfg(test)]
mod tests;

use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use rusqlite::Connection;

use super::completeness::MEANINGLESS_CHANGE;
use super::sql::Rows;
use super::{Store, not_writable};
use crate::error::{Error, ErrorKind, Result};
use crate::util::lock::lock;
use crate::util::monitor::Monitor;
use crate::waits::{self, Awaited};

/// How many transactions can be in one batch.
const MOST_TOGETHER: usize = 16;

/// The one connection that writes, and the callers that wait for it.
pub(super) struct Writer {
    state: Mutex<State>,
    /// How many callers of [`Store::write`] and [`Store::together`] wait for the
    /// connection. Each of them either ends a batch that is left open, or leaves the
    /// batch to a later caller.
    coming: AtomicUsize,
}

pub(super) struct State {
    /// The connection; `None` once the database is closed.
    rows: Option<Rows>,
    /// The batch that the open transaction belongs to.
    batch: Option<Batch>,
    /// How many rows the connection had changed before the transaction.
    changes_before: u64,
    /// Set if a commit has failed and SQLite's log may still contain all of its changes.
    /// After a power cut, a reader of the log would take these changes for committed.
    has_remains: bool,
}

struct Batch {
    members: usize,
    end: Arc<End>,
}

/// The result of a batch, which its members wait for. If the batch fails, all members
/// return the same error.
#[derive(Default)]
struct End(Monitor<Option<std::result::Result<(), Arc<Error>>>>);

/// A write transaction. [`Rows`] has the queries and changes.
pub struct Transaction<'a> {
    store: &'a Store,
    sharing: Sharing,
    /// The locked connection; `None` after this member has left its batch to later members.
    writer: Option<MutexGuard<'a, State>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sharing {
    Alone,
    /// The transaction may be the first of a batch, or the only one.
    First,
    /// The transaction is a savepoint. If it fails, the work of earlier members
    /// stays.
    Joined,
}

impl Writer {
    pub(super) fn new(rows: Option<Rows>) -> Writer {
        Writer {
            state: Mutex::new(State {
                rows,
                batch: None,
                changes_before: 0,
                has_remains: false,
            }),
            coming: AtomicUsize::new(0),
        }
    }

    /// Waits for the connection that writes, and locks it.
    fn acquire(&self) -> MutexGuard<'_, State> {
        self.coming.fetch_add(1, Ordering::SeqCst);
        let state = lock(&self.state);
        self.coming.fetch_sub(1, Ordering::SeqCst);
        state
    }
}

impl State {
    pub(super) fn rows(&self) -> Result<&Rows> {
        self.rows.as_ref().ok_or_else(not_writable)
    }

    pub(super) fn connection(&mut self) -> Result<&mut Connection> {
        let rows = self.rows.as_mut().ok_or_else(not_writable)?;
        Ok(rows.connection_mut())
    }

    pub(super) fn close(&mut self) -> Option<Rows> {
        self.rows.take()
    }

    fn has_transaction(&self) -> bool {
        self.rows
            .as_ref()
            .is_some_and(|rows| !rows.connection().is_autocommit())
    }

    /// Overwrites the remains of a failed commit in the log, by a change without meaning.
    fn overwrite_remains(&mut self) -> Result<()> {
        if !self.has_remains {
            return Ok(());
        }
        let overwriting = "overwrite the remains of a failed change in the database's log";
        self.rows()?.execute(MEANINGLESS_CHANGE, [], overwriting)?;
        self.has_remains = false;
        Ok(())
    }

    /// Handles a failed commit. The caller will undo the change on the disks, so the change
    /// must not become valid again. Therefore its remains in the log are overwritten now, or
    /// if this fails, before the next change.
    fn note_failure(&mut self) {
        self.roll_back();
        self.has_remains = true;
        if let Err(error) = self.overwrite_remains() {
            log::error!(
                "the remains of a failed change are still in the log of the database; the next \
                 change overwrites them: {}",
                error.chain()
            );
        }
    }

    fn roll_back(&self) {
        let Some(rows) = self.rows.as_ref().filter(|_| self.has_transaction()) else {
            return;
        };
        let doing = "roll back a transaction of the database";
        if let Err(error) = rows.execute("ROLLBACK", [], doing) {
            log::error!("a failed change may still be open: {}", error.chain());
        }
    }
}

impl Store {
    /// Begins a transaction that shares no batch, after the running transactions have
    /// ended. The caller keeps the writer until the returned value is dropped, even after
    /// the commit. Without [`Transaction::commit`], the drop rolls all changes back.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] once the store is closed, or if it was opened
    /// read-only.
    pub fn write(&self) -> Result<Transaction<'_>> {
        waits::enter(Awaited::Database)?;
        let writer = self.alone();
        self.begin(writer, Sharing::Alone)
    }

    /// Makes the changes of `work` durable, possibly together with those of
    /// simultaneous callers. `work` runs SQL and waits for nothing else, because every
    /// change of the database waits for it. It sees the uncommitted changes of earlier
    /// members of its batch; readers do not. An error of `work` is returned only once
    /// the changes that may have caused it are durable.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] as in [`Store::write`], or if uncommitted changes that
    /// `work` has seen cannot be made durable.
    pub fn together<T>(&self, work: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        waits::enter(Awaited::Database)?;
        let writer = self.writer.acquire();
        let sharing = match writer.batch {
            None => Sharing::First,
            Some(_) => Sharing::Joined,
        };
        let mut transaction = self.begin(writer, sharing)?;
        match work(&transaction) {
            Ok(done) => transaction.commit().map(|()| done),
            Err(error) => Err(transaction.refuse(error)),
        }
    }

    /// Waits for the connection, and ends an open batch, so that no transaction is open.
    pub(super) fn alone(&self) -> MutexGuard<'_, State> {
        let mut writer = self.writer.acquire();
        self.end_batch(&mut writer);
        writer
    }

    fn begin<'a>(
        &'a self,
        mut writer: MutexGuard<'a, State>,
        sharing: Sharing,
    ) -> Result<Transaction<'a>> {
        let cleared = match sharing {
            Sharing::Joined => Ok(()),
            Sharing::Alone | Sharing::First => writer.overwrite_remains(),
        };
        let begun = cleared.and_then(|()| {
            let rows = writer.rows()?;
            let changes = rows.connection().total_changes();
            let sql = match sharing {
                Sharing::Alone | Sharing::First => "BEGIN IMMEDIATE",
                Sharing::Joined => "SAVEPOINT member",
            };
            rows.execute(sql, [], format_args!("begin to change {}", self.shown()))?;
            Ok(changes)
        });
        match begun {
            Ok(_) if sharing == Sharing::Joined => {}
            Ok(changes) => writer.changes_before = changes,
            Err(error) => {
                self.leave(writer);
                return Err(error);
            }
        }
        Ok(Transaction {
            store: self,
            sharing,
            writer: Some(writer),
        })
    }

    /// Releases the writer. A batch stays open only if another caller waits.
    fn leave(&self, mut writer: MutexGuard<'_, State>) {
        let members = writer.batch.as_ref().map_or(0, |batch| batch.members);
        let is_awaited = self.writer.coming.load(Ordering::SeqCst) > 0;
        if members == MOST_TOGETHER || !is_awaited {
            self.end_batch(&mut writer);
        }
    }

    fn end_batch(&self, writer: &mut State) {
        self.end_batch_by(writer, |writer| self.make_durable(writer));
    }

    fn end_batch_by(&self, writer: &mut State, end: impl FnOnce(&State) -> Result<()>) {
        let Some(batch) = writer.batch.take() else {
            return;
        };
        let mut ending = Ending {
            writer,
            batch,
            ended: Err(Arc::new(Error::new(
                ErrorKind::Internal,
                "changes of the database were lost because of a bug in this program; its log shows \
                 where",
            ))),
        };
        ending.ended = end(ending.writer).map_err(Arc::new);
    }

    fn make_durable(&self, writer: &State) -> Result<()> {
        let rows = writer.rows()?;
        if !writer.has_transaction() {
            return Err(taken_back());
        }
        rows.execute("COMMIT", [], format_args!("commit to {}", self.shown()))?;
        if rows.connection().total_changes() != writer.changes_before {
            self.note_change();
        }
        Ok(())
    }
}

/// Ends a batch when dropped, also after a panic, because the members of the batch wait
/// for its end.
struct Ending<'a> {
    writer: &'a mut State,
    batch: Batch,
    ended: std::result::Result<(), Arc<Error>>,
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if self.ended.is_err() {
            self.writer.note_failure();
        }
        self.batch
            .end
            .0
            .change(|end| *end = Some(self.ended.clone()));
    }
}

impl End {
    fn wait(&self) -> Result<()> {
        let ended = self.0.wait_while(|end| end.is_none(), |end| end.clone());
        let ended = ended.flatten().unwrap_or(Ok(()));
        ended.map_err(|error| Error::new(error.kind(), error.chain()))
    }
}

/// A transaction has all queries of [`Rows`], which see its uncommitted changes.
impl Deref for Transaction<'_> {
    type Target = Rows;

    fn deref(&self) -> &Rows {
        let rows = self.writer.as_ref().and_then(|writer| writer.rows.as_ref());
        rows.expect("a transaction has begun, and its guard keeps it")
    }
}

impl Transaction<'_> {
    /// Makes all changes of the transaction durable. If that fails, none of them
    /// remains.
    pub fn commit(&mut self) -> Result<()> {
        if self.sharing == Sharing::Alone {
            let writer = self.writer.as_mut().ok_or_else(not_writable)?;
            return self
                .store
                .make_durable(writer)
                .inspect_err(|_| writer.note_failure());
        }
        self.join_batch()?.wait()
    }

    /// Rolls this member back. Its error may be caused by another member's uncommitted
    /// change (a key that exists, say), so it is returned only after the batch is durable.
    fn refuse(&mut self, error: Error) -> Error {
        let batch = self
            .writer
            .as_ref()
            .and_then(|writer| writer.batch.as_ref());
        let end = batch.map(|batch| Arc::clone(&batch.end));
        self.roll_back();
        match end.map_or(Ok(()), |end| end.wait()) {
            Ok(()) => error,
            Err(failed) => Error::caused(
                ErrorKind::Unavailable,
                format!(
                    "refused ({}) because another change in the same batch has failed: try again",
                    error.chain()
                ),
                failed,
            ),
        }
    }

    /// Adds this member's work to the open batch, and ends the batch if no other caller waits.
    fn join_batch(&mut self) -> Result<Arc<End>> {
        let writer = self.writer.as_mut().ok_or_else(not_writable)?;
        if !writer.has_transaction() {
            return Err(taken_back());
        }
        if self.sharing == Sharing::Joined {
            let doing = format_args!("add a change to {}", self.store.shown());
            writer.rows()?.execute("RELEASE member", [], doing)?;
        }
        let batch = writer.batch.get_or_insert_with(|| Batch {
            members: 0,
            end: Arc::default(),
        });
        batch.members += 1;
        let end = Arc::clone(&batch.end);
        if let Some(writer) = self.writer.take() {
            self.store.leave(writer);
        }
        Ok(end)
    }

    /// Rolls back the changes that are not committed, and releases the writer.
    fn roll_back(&mut self) {
        let Some(mut writer) = self.writer.take() else {
            return;
        };
        match self.sharing {
            Sharing::Alone | Sharing::First => writer.roll_back(),
            Sharing::Joined => {
                let undone = writer.rows().and_then(|rows| {
                    let doing = "roll back one change in a batch";
                    rows.execute("ROLLBACK TO member", [], doing)?;
                    rows.execute("RELEASE member", [], doing)
                });
                if undone.is_err() {
                    // After some errors, for example on a full disk, SQLite has
                    // rolled back everything already.
                    writer.roll_back();
                    self.store.end_batch(&mut writer);
                }
            }
        }
        self.store.leave(writer);
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        self.roll_back();
    }
}

fn taken_back() -> Error {
    Error::new(
        ErrorKind::Unavailable,
        "SQLite has rolled the change back, because a disk is full or has failed: try again",
    )
}
