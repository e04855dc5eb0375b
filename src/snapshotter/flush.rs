//! Flushing the image volume while layers are unpacked, so that little is left
//! to be flushed when they are committed: containerd holds a lock of its own
//! during a Commit.
//!
//! Only for speed: what this thread has flushed, or failed to flush, Commit asks
//! for again.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Snapshotter, SyncMode};
use crate::error::Result;
use crate::types::SnapshotId;
use crate::util::lock::lock;
use crate::util::threads::Background;
use crate::volume::Flush;

/// How much unpacking, in time, a Commit finds unflushed at most.
const INTERVAL: Duration = Duration::from_secs(1);
/// An unpack that writes nothing for so long has been given up by its client.
const GIVEN_UP: Duration = Duration::from_secs(600);

/// The snapshots that layers are being unpacked into.
#[derive(Default)]
pub(super) struct Unpacks {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ids: HashSet<SnapshotId>,
    last_begin: Option<Instant>,
    is_stopping: bool,
}

impl Unpacks {
    pub(super) fn begin(&self, id: SnapshotId) {
        let mut state = lock(&self.state);
        state.ids.insert(id);
        state.last_begin = Some(Instant::now());
        self.changed.notify_all();
    }

    pub(super) fn end(&self, id: SnapshotId) {
        lock(&self.state).ids.remove(&id);
    }

    /// Forgets those under way if none has begun for that long.
    fn give_up_after(&self, idle: Duration) {
        let mut state = lock(&self.state);
        if state.last_begin.is_none_or(|begun| begun.elapsed() > idle) {
            state.ids.clear();
        }
    }

    fn stop(&self) {
        lock(&self.state).is_stopping = true;
        self.changed.notify_all();
    }

    /// Waits while nothing is unpacked. `false` at the stop.
    fn await_any(&self) -> bool {
        let waited = self.changed.wait_while(lock(&self.state), |state| {
            state.ids.is_empty() && !state.is_stopping
        });
        !waited.unwrap_or_else(PoisonError::into_inner).is_stopping
    }

    /// `false` at the stop.
    fn pause(&self) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(lock(&self.state), INTERVAL, |state| !state.is_stopping);
        !waited.unwrap_or_else(PoisonError::into_inner).0.is_stopping
    }
}

impl Snapshotter {
    /// Starts the thread, unless commits do not flush either.
    ///
    /// # Errors
    ///
    /// [`crate::error::ErrorKind::Internal`] if the system gives no thread, or as
    /// of the image volume's disk.
    pub fn start_flusher(self: &Arc<Snapshotter>) -> Result<Option<Background>> {
        if self.options.sync == SyncMode::Never {
            return Ok(None);
        }
        let flush = self.volumes.image().flush()?;
        let (told, flushed) = (Arc::clone(self), Arc::clone(self));
        Background::start(
            "flusher",
            move || told.unpacks.stop(),
            move || run(&flushed.unpacks, &flush),
        )
        .map(Some)
    }
}

fn run(unpacks: &Unpacks, flush: &Flush) {
    let mut free_before = None;
    let mut last_change = Instant::now();
    while unpacks.await_any() && unpacks.pause() {
        // A flush of nothing would still wake a sleeping disk.
        let free = flush.free_blocks().ok();
        if free != free_before {
            free_before = free;
            last_change = Instant::now();
            if let Err(error) = flush.run() {
                log::warn!("flush while unpacking: {}", error.chain());
            }
        } else if last_change.elapsed() > GIVEN_UP {
            unpacks.give_up_after(GIVEN_UP);
        }
    }
}
