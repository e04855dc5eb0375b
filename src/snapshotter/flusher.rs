//! Making data durable: before a commit, and meanwhile.
//!
//! Owns: which snapshots may have lost data to a failing disk, and a thread that
//! flushes the image volume while layers are unpacked, so that little is left to be
//! flushed when they are committed: containerd holds a lock of its own during a
//! Commit. Commit flushes again what the thread has flushed; a failure that the thread
//! meets is recorded, because the kernel does not report it a second time.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::store::{Place, Store, Transaction};
use crate::types::{Kind, SnapshotId, Volume};
use crate::util::lock::lock;
use crate::util::monitor::Monitor;
use crate::util::threads::Background;
use crate::volume::{Dirs, Flush};
use crate::waits::{self, Awaited};

/// How much unpacking, in time, a Commit finds unflushed at most.
const INTERVAL: Duration = Duration::from_secs(1);
/// An unpack that writes nothing for so long has been given up by its client.
const GIVEN_UP: Duration = Duration::from_secs(600);

/// The fact that says up to which id snapshots may have lost data.
fn suspect_fact(volume: Volume) -> &'static str {
    match volume {
        Volume::Image => "suspect_on_image",
        Volume::Writable => "suspect_on_writable",
    }
}

pub(super) struct Flusher {
    store: Arc<Store>,
    /// Snapshots up to these ids may have lost data to a failing disk. In order:
    /// image, writable volume.
    suspect_up_to: [AtomicU64; 2],
    syncing: [Mutex<()>; 2],
    unpacks: Monitor<Unpacks>,
}

/// The snapshots on the image volume that layers are being unpacked into, since the
/// start.
#[derive(Default)]
struct Unpacks {
    ids: HashSet<SnapshotId>,
    last_begin: Option<Instant>,
}

impl Flusher {
    pub(super) fn new(store: Arc<Store>) -> Flusher {
        Flusher {
            store,
            suspect_up_to: Default::default(),
            syncing: Default::default(),
            unpacks: Monitor::default(),
        }
    }

    /// Makes everything on a volume durable. The kernel reports a failed write once, to
    /// the first who asks: the data of every snapshot that was there then may be what
    /// the disk has lost.
    pub(super) fn flush(&self, dirs: &Dirs, volume: Volume) -> Result<()> {
        waits::note(Awaited::Volume(volume));
        // One after another: the second caller must learn of a failure that the kernel
        // has reported to the first.
        let _syncing = lock(&self.syncing[volume as usize]);
        let flushed = dirs.sync();
        self.note_failure(&flushed, volume);
        flushed
    }

    /// Records that a disk has failed to write data, if `flushed` says so. Every part of this
    /// program that flushes has to call it: the kernel reports such a failure once, and a
    /// restart must not forget it.
    pub(super) fn note_failure(&self, flushed: &Result<()>, volume: Volume) {
        let is_failure = |error: &Error| error.kind() == ErrorKind::DataLoss;
        if !flushed.as_ref().is_err_and(is_failure) {
            return;
        }
        let highest = self.store.read().and_then(|reader| reader.highest_id());
        let highest = highest.unwrap_or(u64::MAX);
        self.suspect_up_to[volume as usize].fetch_max(highest, Ordering::AcqRel);
        let recorded = self.store.together(|transaction| {
            let suspect = self.suspect_up_to[volume as usize].load(Ordering::Acquire);
            transaction.record_fact(suspect_fact(volume), &suspect.to_string())
        });
        if let Err(error) = recorded {
            log::error!("{}", error.chain());
        }
        log::error!("the {volume} volume has failed to write data: look at its disk");
    }

    /// Whether a failure of a volume is recorded.
    pub(super) fn has_recorded_failure(&self, volume: Volume) -> Result<bool> {
        Ok(self.store.read()?.fact(suspect_fact(volume))?.is_some())
    }

    /// Forgets all recorded failures.
    pub(super) fn forget_failures(&self, transaction: &Transaction<'_>) -> Result<()> {
        for volume in [Volume::Image, Volume::Writable] {
            transaction.forget_fact(suspect_fact(volume))?;
        }
        Ok(())
    }

    /// At a start: which snapshots may have lost data before it. The failure of a disk is
    /// forgotten when none of them is left to be committed.
    pub(super) fn recall_failures(&self, active: &[Place]) -> Result<()> {
        for volume in [Volume::Image, Volume::Writable] {
            let fact = suspect_fact(volume);
            let Some(recorded) = self.store.read()?.fact(fact)? else {
                continue;
            };
            let suspect: u64 = recorded.parse().unwrap_or(u64::MAX);
            let is_suspect = |place: &Place| {
                let is_active = place.kind == Kind::Active;
                is_active && place.volume == Some(volume) && place.id.number() <= suspect
            };
            if active.iter().any(is_suspect) {
                self.suspect_up_to[volume as usize].store(suspect, Ordering::Release);
                log::warn!(
                    "the {volume} volume has failed to write data before this start: snapshots \
                     that were being filled then cannot be committed"
                );
            } else {
                self.store
                    .together(|transaction| transaction.forget_fact(fact))?;
            }
        }
        Ok(())
    }

    /// Whether a volume has failed to write data, and a snapshot from then is left.
    pub(super) fn has_failed(&self, volume: Volume) -> bool {
        self.suspect_up_to[volume as usize].load(Ordering::Acquire) > 0
    }

    /// Refuses, as [`ErrorKind::DataLoss`], a snapshot that was there when its volume
    /// failed to write data.
    pub(super) fn refuse_suspect(&self, id: SnapshotId, volume: Volume) -> Result<()> {
        if id.number() > self.suspect_up_to[volume as usize].load(Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::data_loss(format!(
            "the {volume} volume has failed to write data while this snapshot was being \
             filled: remove it, look at the disk, and fill it anew"
        )))
    }

    /// A layer is being unpacked on the image volume.
    pub(super) fn begin_unpack(&self, id: SnapshotId) {
        self.unpacks.change(|unpacks| {
            unpacks.ids.insert(id);
            unpacks.last_begin = Some(Instant::now());
        });
    }

    /// The snapshot is committed or removed, if it was one that a layer was unpacked
    /// into.
    pub(super) fn end_unpack(&self, id: SnapshotId) {
        self.unpacks.look(|unpacks| unpacks.ids.remove(&id));
    }

    /// Starts the thread. `flush` is for the image volume.
    pub(super) fn start(self: &Arc<Flusher>, flush: Flush) -> Result<Background> {
        let stop = |flusher: &Flusher| flusher.unpacks.stop();
        Background::start("flusher", self, stop, move |flusher| flusher.run(&flush))
    }

    fn run(&self, flush: &Flush) {
        let mut free_before = None;
        let mut last_change = Instant::now();
        while self.await_unpack() {
            // A flush of nothing would still wake a sleeping disk.
            let free = flush.free_blocks().ok();
            if free != free_before {
                free_before = free;
                last_change = Instant::now();
                let flushed = flush.run();
                self.note_failure(&flushed, Volume::Image);
                if let Err(error) = flushed {
                    log::warn!("flush while unpacking: {}", error.chain());
                }
            } else if last_change.elapsed() > GIVEN_UP {
                self.unpacks.look(|unpacks| {
                    if unpacks.last_begin.is_none_or(|at| at.elapsed() > GIVEN_UP) {
                        unpacks.ids.clear();
                    }
                });
            }
        }
    }

    /// Waits until a layer is unpacked, and then a moment. `false` at the stop.
    fn await_unpack(&self) -> bool {
        let is_idle = |unpacks: &Unpacks| unpacks.ids.is_empty();
        self.unpacks.wait_while(is_idle, |_| ()).is_some() && self.unpacks.pause(INTERVAL)
    }
}
