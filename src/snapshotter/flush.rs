//! Flushing the image volume while layers are unpacked, so that little is left
//! to be flushed when they are committed: containerd holds a lock of its own
//! during a Commit.
//!
//! Only for speed: what this thread has flushed, or failed to flush, Commit asks
//! for again.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Snapshotter, SyncMode};
use crate::error::Result;
use crate::types::SnapshotId;
use crate::util::monitor::Monitor;
use crate::util::threads::Background;
use crate::volume::Flush;

/// How much unpacking, in time, a Commit finds unflushed at most.
const INTERVAL: Duration = Duration::from_secs(1);
/// An unpack that writes nothing for so long has been given up by its client.
const GIVEN_UP: Duration = Duration::from_secs(600);

/// The snapshots that layers are being unpacked into.
#[derive(Default)]
pub(super) struct Unpacks(Monitor<UnderWay>);

#[derive(Default)]
struct UnderWay {
    ids: HashSet<SnapshotId>,
    last_begin: Option<Instant>,
}

impl Unpacks {
    pub(super) fn begin(&self, id: SnapshotId) {
        self.0.change(|unpacks| {
            unpacks.ids.insert(id);
            unpacks.last_begin = Some(Instant::now());
        });
    }

    pub(super) fn end(&self, id: SnapshotId) {
        self.0.look(|unpacks| unpacks.ids.remove(&id));
    }

    /// Forgets those under way if none has begun for that long.
    fn give_up_after(&self, idle: Duration) {
        self.0.look(|unpacks| {
            if unpacks
                .last_begin
                .is_none_or(|begun| begun.elapsed() > idle)
            {
                unpacks.ids.clear();
            }
        });
    }

    /// Waits until something is unpacked, and then a moment. `false` at the stop.
    fn await_any(&self) -> bool {
        let waited = self.0.wait_while(|unpacks| unpacks.ids.is_empty(), |_| ());
        waited.is_some() && self.0.pause(INTERVAL)
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
            move || told.unpacks.0.stop(),
            move || run(&flushed.unpacks, &flush),
        )
        .map(Some)
    }
}

fn run(unpacks: &Unpacks, flush: &Flush) {
    let mut free_before = None;
    let mut last_change = Instant::now();
    while unpacks.await_any() {
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
