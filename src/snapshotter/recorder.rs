//! Recording the digests of unpacked layers (`--record-digests`).
//!
//! Owns: the list of layers whose digest is still to be recorded, and a thread that reads
//! their files. The thread reads a layer right after its commit, while the kernel still has
//! the data in memory that containerd wrote. The digest is then that of the written data,
//! even if the disk has stored something else.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{ErrorKind, Result};
use crate::store::Store;
use crate::tree::{self, ReadFrom};
use crate::types::SnapshotId;
use crate::util::monitor::Monitor;
use crate::util::threads::{Background, lower_io_priority};
use crate::volume::Volumes;

/// How many layers may wait for the thread. Further layers get no digest at their commit: a
/// deep check compares them with containerd's content, and records their digests then.
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

    /// Starts the thread that records digests.
    pub(super) fn start(self: &Arc<Recorder>) -> Result<Background> {
        let stop = |recorder: &Recorder| {
            recorder.is_stopping.store(true, Ordering::Relaxed);
            recorder.waiting.stop();
        };
        Background::start("recorder", self, stop, Recorder::run)
    }

    /// Asks the thread to record the digest of a new layer on the image volume.
    pub(super) fn note_layer(&self, id: SnapshotId) {
        self.waiting.change(|waiting| {
            if waiting.len() < MOST_WAITING {
                waiting.push_back(id);
            }
        });
    }

    fn run(&self) {
        lower_io_priority("the recorder's thread");
        let next = || {
            self.waiting
                .wait_while(VecDeque::is_empty, VecDeque::pop_front)
        };
        while let Some(id) = next().flatten() {
            match self.record(id) {
                Err(error) if error.kind() != ErrorKind::Cancelled => log::warn!(
                    "cannot record the digest of layer {id}; the next `check --deep` compares the \
                     layer and records the digest: {}",
                    error.chain()
                ),
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
        // If the layer is gone, an error while it was read does not matter.
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
