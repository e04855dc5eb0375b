//! Write transactions, and how those of callers who come at once become durable
//! together.
//!
//! What makes a transaction durable takes longer than all else in it, and one
//! flush serves any number. So who commits while others wait for the writer leaves
//! SQLite's transaction open for them, and waits: the work of each is a savepoint
//! in it, and the one behind whom nobody waits commits for all. That is a batch.
//! It is durable as a whole or not at all, and nobody is told before it is.

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rusqlite::Connection;

use super::rows::Rows;
use super::{Store, not_writable, sql_error};
use crate::error::{Error, ErrorKind, Result};
use crate::util::lock::lock;

/// How many become durable together at most: after a crash, so many snapshots may
/// have a directory and no row.
pub const MOST_TOGETHER: usize = 16;

/// The one connection that writes, and who is around it.
pub(super) struct Writer {
    state: Mutex<State>,
    /// Callers of [`Store::write`] and [`Store::together`] who do not have it yet: each
    /// ends a batch that is left open, or leaves it to one that comes later.
    coming: AtomicUsize,
    /// Members of a batch that has failed who may still have something to undo on a
    /// disk.
    undoing: Mutex<usize>,
    undone: Condvar,
}

pub(super) struct State {
    /// `None` once closed.
    connection: Option<Connection>,
    /// Whose work the open transaction holds.
    batch: Option<Batch>,
    /// Rows changed by the connection before the transaction.
    changes_before: u64,
}

struct Batch {
    members: usize,
    end: Arc<End>,
}

/// How a batch has ended.
#[derive(Default)]
struct End {
    told: Mutex<Option<std::result::Result<(), Failure>>>,
    changed: Condvar,
}

/// An error to be told to several.
#[derive(Clone)]
struct Failure {
    kind: ErrorKind,
    text: String,
}

/// A write transaction; see [`Rows`] for what can be asked and changed.
pub struct Transaction<'a> {
    store: &'a Store,
    sharing: Sharing,
    /// `None` while, and after, others of its batch go on.
    writer: Option<MutexGuard<'a, State>>,
    progress: Progress,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sharing {
    Alone,
    /// May be the first of a batch, or the only one.
    First,
    /// Within a savepoint: what others have done before stays, whatever comes.
    Joined,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Begun,
    Committed,
    /// With its batch.
    Failed,
}

impl Writer {
    pub(super) fn new(connection: Option<Connection>) -> Writer {
        Writer {
            state: Mutex::new(State {
                connection,
                batch: None,
                changes_before: 0,
            }),
            coming: AtomicUsize::new(0),
            undoing: Mutex::new(0),
            undone: Condvar::new(),
        }
    }

    /// Waits for the connection, and for those who undo: what they have left on a
    /// disk has the ids that are given out next.
    fn acquire(&self) -> MutexGuard<'_, State> {
        self.coming.fetch_add(1, Ordering::SeqCst);
        let state = lock(&self.state);
        self.coming.fetch_sub(1, Ordering::SeqCst);
        self.await_undone();
        state
    }

    fn await_undone(&self) {
        let undoing = lock(&self.undoing);
        let undone = self.undone.wait_while(undoing, |members| *members > 0);
        drop(undone.unwrap_or_else(PoisonError::into_inner));
    }

    fn is_awaited(&self) -> bool {
        self.coming.load(Ordering::SeqCst) > 0
    }
}

impl State {
    pub(super) fn connection(&self) -> Result<&Connection> {
        self.connection.as_ref().ok_or_else(not_writable)
    }

    pub(super) fn close(&mut self) -> Option<Connection> {
        self.connection.take()
    }

    fn execute(&self, statement: &str) -> rusqlite::Result<()> {
        let Some(connection) = &self.connection else {
            return Err(rusqlite::Error::InvalidQuery);
        };
        connection.prepare_cached(statement)?.execute([]).map(drop)
    }

    fn has_transaction(&self) -> bool {
        self.connection
            .as_ref()
            .is_some_and(|connection| !connection.is_autocommit())
    }

    fn roll_back(&self) {
        if self.has_transaction()
            && let Err(error) = self.execute("ROLLBACK")
        {
            log::error!("cannot roll a database transaction back: {error}");
        }
    }
}

impl Store {
    /// Begins a transaction of its own; waits for those under way. The writer is
    /// the caller's until the value is dropped, also after the commit. Dropped
    /// without [`Transaction::commit`], it leaves no trace.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unavailable`] once it is closed, or was opened to be read
    /// only; [`ErrorKind::Internal`] if SQLite cannot begin.
    pub fn write(&self) -> Result<Transaction<'_>> {
        let writer = self.alone();
        self.begin(writer, Sharing::Alone)
    }

    /// Makes what `work` does durable, perhaps together with what others do at the
    /// same time. `work` may see what has been done before it and is not durable
    /// yet, which no reader sees. What it returns is dropped before anybody is given
    /// the same ids if it cannot be made durable, and so can undo what it stands
    /// for.
    ///
    /// # Errors
    ///
    /// As of [`Store::write`] and [`Transaction::commit`]; those of `work`, once what
    /// it may have been refused for is durable.
    pub fn together<T>(&self, work: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
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

    /// Waits for the connection, with no transaction under way.
    pub(super) fn alone(&self) -> MutexGuard<'_, State> {
        let mut writer = self.writer.acquire();
        self.end_batch(&mut writer);
        self.writer.await_undone();
        writer
    }

    fn begin<'a>(
        &'a self,
        mut writer: MutexGuard<'a, State>,
        sharing: Sharing,
    ) -> Result<Transaction<'a>> {
        let begun = writer.connection().and_then(|connection| {
            let changes = connection.total_changes();
            let begun = writer.execute(match sharing {
                Sharing::Alone | Sharing::First => "BEGIN IMMEDIATE",
                Sharing::Joined => "SAVEPOINT member",
            });
            begun
                .map(|()| changes)
                .map_err(|error| sql_error(error, format!("begin to change {}", self.shown())))
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
            progress: Progress::Begun,
        })
    }

    /// Lets go of the writer. A batch is left open only to somebody who comes.
    fn leave(&self, mut writer: MutexGuard<'_, State>) {
        let members = writer.batch.as_ref().map_or(0, |batch| batch.members);
        if members == MOST_TOGETHER || !self.writer.is_awaited() {
            self.end_batch(&mut writer);
        }
    }

    fn end_batch(&self, writer: &mut State) {
        let Some(batch) = writer.batch.take() else {
            return;
        };
        let ended = self.make_durable(writer).map_err(|error| Failure {
            kind: error.kind(),
            text: error.chain(),
        });
        if ended.is_err() {
            writer.roll_back();
            *lock(&self.writer.undoing) += batch.members;
        }
        batch.end.tell(ended);
    }

    fn make_durable(&self, writer: &State) -> Result<()> {
        let connection = writer.connection()?;
        if connection.is_autocommit() {
            return Err(taken_back());
        }
        writer
            .execute("COMMIT")
            .map_err(|error| sql_error(error, format!("commit to {}", self.shown())))?;
        if connection.total_changes() != writer.changes_before {
            self.changes.note();
        }
        Ok(())
    }
}

impl End {
    fn tell(&self, ended: std::result::Result<(), Failure>) {
        *lock(&self.told) = Some(ended);
        self.changed.notify_all();
    }

    fn wait(&self) -> Result<()> {
        let waited = self
            .changed
            .wait_while(lock(&self.told), |told| told.is_none());
        match &*waited.unwrap_or_else(PoisonError::into_inner) {
            Some(Err(failure)) => Err(Error::new(failure.kind, failure.text.clone())),
            Some(Ok(())) | None => Ok(()),
        }
    }
}

impl Transaction<'_> {
    /// The rows as this transaction sees and changes them, until its commit.
    pub fn rows(&self) -> Rows<&Connection> {
        let connection = self
            .writer
            .as_ref()
            .and_then(|writer| writer.connection.as_ref());
        Rows::new(connection.expect("a transaction has begun, and its guard keeps it"))
    }

    /// Makes everything done in it durable. Nobody is given the same ids before the
    /// value is dropped, so that what a failure leaves on a disk can be undone.
    ///
    /// # Errors
    ///
    /// As of the database's disk; nothing of the transaction remains then.
    pub fn commit(&mut self) -> Result<()> {
        if self.sharing == Sharing::Alone {
            let writer = self.writer.as_ref().ok_or_else(not_writable)?;
            self.store.make_durable(writer)?;
            self.progress = Progress::Committed;
            return Ok(());
        }
        let end = self.join_batch()?;
        let ended = end.wait();
        self.progress = match &ended {
            Ok(()) => Progress::Committed,
            Err(_) => Progress::Failed,
        };
        ended
    }

    /// Takes everything back. What it was refused for may be the work of others of its
    /// batch: told before that is durable, it would be told too early.
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
                    "refused ({}) for a change that has failed: try again",
                    error.chain()
                ),
                failed,
            ),
        }
    }

    /// Leaves what it has done to its batch, and ends that if nobody else will.
    fn join_batch(&mut self) -> Result<Arc<End>> {
        let writer = self.writer.as_mut().ok_or_else(not_writable)?;
        if !writer.has_transaction() {
            return Err(taken_back());
        }
        if self.sharing == Sharing::Joined {
            writer.execute("RELEASE member").map_err(|error| {
                sql_error(error, format!("add a change to {}", self.store.shown()))
            })?;
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

    /// Takes back what is not committed, and lets go of the writer.
    fn roll_back(&mut self) {
        let Some(mut writer) = self.writer.take() else {
            return;
        };
        match self.sharing {
            _ if self.progress != Progress::Begun => {}
            Sharing::Alone | Sharing::First => writer.roll_back(),
            Sharing::Joined => {
                let undone = writer
                    .execute("ROLLBACK TO member")
                    .and_then(|()| writer.execute("RELEASE member"));
                if undone.is_err() {
                    // After some failures, as of a full disk, SQLite has rolled
                    // everything back already.
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
        if self.progress == Progress::Failed {
            *lock(&self.store.writer.undoing) -= 1;
            self.store.writer.undone.notify_all();
        }
        self.roll_back();
    }
}

fn taken_back() -> Error {
    Error::new(
        ErrorKind::Unavailable,
        "SQLite has taken back what was begun, as it does when a disk is full or fails: try again",
    )
}
