//! Recording the digests of unpacked layers (`--record-digests`).
//!
//! Owns: which layers still have no digest, and a thread that reads them. A digest is made
//! right after the commit, while the kernel still has what containerd wrote in memory: it
//! is then the digest of what was written, even where the disk has stored something else.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Context, ErrorKind, Result};
use crate::store::Store;
use crate::sys;
use crate::tree::{self, ReadFrom};
use crate::types::SnapshotId;
use crate::util::monitor::Monitor;
use crate::util::threads::Background;
use crate::volume::Volumes;

/// How many layers may wait. Further layers get no digest here: a deep check compares them
/// with containerd's content, and records theirs.
const MOST_WAITING: usize = 10_000;

pub(super) struct Recorder {
    store: Arc<Store>,
    volumes: Arc<Volumes>,
    waiting: Monitor<VecDeque<SnapshotId>>,
    is_stopping: AtomicBool,
}

impl Recorder {
    pub(super) fn new((store, volumes): (Arc<Store>, Arc<Volumes>)) -> Recorder {
        Recorder {
            store,
            volumes,
            waiting: Monitor::default(),
            is_stopping: AtomicBool::new(false),
        }
    }

    /// Starts the thread.
    pub(super) fn start(self: &Arc<Recorder>) -> Result<Background> {
        let stop = |recorder: &Recorder| {
            recorder.is_stopping.store(true, Ordering::Relaxed);
            recorder.waiting.stop();
        };
        Background::start("recorder", self, stop, Recorder::run)
    }

    /// Has the digest of a new layer on the image volume recorded in the background.
    pub(super) fn note_layer(&self, id: SnapshotId) {
        self.waiting.change(|waiting| {
            if waiting.len() < MOST_WAITING {
                waiting.push_back(id);
            }
        });
    }

    fn run(&self) {
        // Without the priority, reading takes time from other programs, but works.
        let _ = sys::lower_io_priority();
        while let Some(id) = self
            .waiting
            .wait_while(VecDeque::is_empty, VecDeque::pop_front)
        {
            let recorded = id.map_or(Ok(()), |id| self.record(id));
            match recorded.context(|| "record the digest of a layer") {
                Err(error) if error.kind() != ErrorKind::Cancelled => {
                    log::warn!("{}; check --deep will do it", error.chain());
                }
                _ => {}
            }
        }
    }

    fn record(&self, id: SnapshotId) -> Result<()> {
        let height = || Ok(self.store.read()?.chain(id)?.len());
        let is_lowest = match height()? {
            0 => return Ok(()),
            height => height == 1,
        };
        let top = self.volumes.image().dirs().open_upper(id);
        let digest = top.and_then(|top| {
            tree::digest_tree(top, is_lowest, ReadFrom::CacheFirst, &self.is_stopping)
        });
        // A layer that is being removed may not be readable to its end.
        if height()? == 0 {
            return Ok(());
        }
        let digest = digest?;
        self.store.together(|rows| match rows.place(id)? {
            Some(_) => rows.record_digest(id, &digest),
            None => Ok(()),
        })
    }
}
