//! Making data durable: before a commit, and while layers are unpacked.
//!
//! Owns: the record of which snapshots may have lost data to a failing disk, and a thread
//! that flushes the image volume while layers are unpacked. Little is then left to be
//! flushed at a Commit, during which containerd holds a lock of its own. Commit flushes the
//! layer once more. A failure that the thread meets is recorded, because the kernel does
//! not report it a second time.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::fd::AsFd;

use crate::error::{Error, ErrorKind, Result};
use crate::store::{Place, Store, Transaction};
use crate::types::{Kind, SnapshotId, Volume};
use crate::util::lock::lock;
use crate::util::monitor::Monitor;
use crate::util::threads::Background;
use crate::volume::{Dirs, Flush};
use crate::waits::{self, Awaited};

/// How often the thread flushes. A Commit then finds at most this much time of unpacking
/// unflushed.
const INTERVAL: Duration = Duration::from_secs(1);
/// Unpacks count as given up by their clients if nothing is written to the image volume for
/// this long.
const GIVEN_UP: Duration = Duration::from_secs(600);

/// The name of the fact that records the highest id of the snapshots on a volume that may
/// have lost data.
fn suspect_fact(volume: Volume) -> &'static str {
    match volume {
        Volume::Image => "suspect_on_image",
        Volume::Writable => "suspect_on_writable",
    }
}

pub(super) struct Flusher {
    store: Arc<Store>,
    /// For each volume, the highest id of the snapshots that may have lost data to a
    /// failing disk. In order: image, writable volume.
    suspect_up_to: [AtomicU64; 2],
    syncing: [Mutex<()>; 2],
    unpacks: Monitor<Unpacks>,
}

/// The unpacks on the image volume that have begun since the start, and have not ended.
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

    /// Makes the files of a snapshot durable: only these files if possible, otherwise
    /// everything on the volume.
    pub(super) fn flush_snapshot(
        &self,
        dirs: &Dirs,
        id: SnapshotId,
        upper: impl AsFd,
    ) -> Result<()> {
        waits::note(Awaited::Volume(dirs.volume()));
        let alone = dirs.sync_alone(id, upper);
        match alone {
            Ok(true) => Ok(()),
            Err(error) if error.kind() == ErrorKind::DataLoss => {
                let flushed = Err(error);
                self.note_failure(&flushed, dirs.volume());
                flushed
            }
            // Files that cannot be read can still be flushed with everything else on the
            // volume.
            Ok(false) | Err(_) => self.flush(dirs),
        }
    }

    /// Makes everything on a volume durable. The kernel reports a failed write only once,
    /// to the first caller, and does not report whose data was lost. So every snapshot that
    /// exists then may have lost data.
    pub(super) fn flush(&self, dirs: &Dirs) -> Result<()> {
        let volume = dirs.volume();
        waits::note(Awaited::Volume(volume));
        // Callers flush one after another, because each has to learn of a failure that the
        // kernel has reported only to an earlier caller.
        let _syncing = lock(&self.syncing[volume as usize]);
        let flushed = dirs.sync();
        self.note_failure(&flushed, volume);
        flushed
    }

    /// Records that a disk has failed to write data, if `flushed` is such an error. Every
    /// part of this program that flushes has to call this, because the kernel reports the
    /// failure only once, and it must be known after a restart, too.
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
            log::error!(
                "cannot record that the {volume} volume has failed to write data, so after a \
                 restart of the daemon, layers that may be damaged can be committed: {}",
                error.chain()
            );
        }
        log::error!(
            "the {volume} volume has failed to write data, and the kernel does not report whose: \
             check the disk. Pulls, builds and commits that have begun are refused: repeat them. \
             Files that containers have written there may be damaged"
        );
    }

    /// Whether the database records that a volume has failed to write data.
    pub(super) fn has_recorded_failure(&self, volume: Volume) -> Result<bool> {
        Ok(self.store.read()?.fact(suspect_fact(volume))?.is_some())
    }

    /// Deletes the records of volumes that have failed to write data.
    pub(super) fn forget_failures(&self, transaction: &Transaction<'_>) -> Result<()> {
        for volume in [Volume::Image, Volume::Writable] {
            transaction.forget_fact(suspect_fact(volume))?;
        }
        Ok(())
    }

    /// At a start, reads which snapshots may have lost data before. The record of a failing
    /// disk is deleted if no such snapshot is left that could be committed.
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
                    "the {volume} volume has failed to write data before this start: check the \
                     disk. Pulls, builds and commits that had begun then are refused: repeat them"
                );
            } else {
                self.store
                    .together(|transaction| transaction.forget_fact(fact))?;
            }
        }
        Ok(())
    }

    /// Whether a volume has failed to write data since the start, or failed before and
    /// still has a snapshot from that time.
    pub(super) fn has_failed(&self, volume: Volume) -> bool {
        self.suspect_up_to[volume as usize].load(Ordering::Acquire) > 0
    }

    /// Returns [`ErrorKind::DataLoss`] for a snapshot that existed when its volume
    /// failed to write data.
    pub(super) fn refuse_suspect(&self, id: SnapshotId, volume: Volume) -> Result<()> {
        if id.number() > self.suspect_up_to[volume as usize].load(Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::data_loss(format!(
            "the {volume} volume has failed to write data while this snapshot was being filled: \
             check the disk, then repeat the pull or build, or remove the snapshot and create it \
             again"
        )))
    }

    /// Notes that a layer is being unpacked on the image volume.
    pub(super) fn begin_unpack(&self, id: SnapshotId) {
        self.unpacks.change(|unpacks| {
            unpacks.ids.insert(id);
            unpacks.last_begin = Some(Instant::now());
        });
    }

    /// Notes that a snapshot was committed or removed, which ends its unpack if it was one.
    pub(super) fn end_unpack(&self, id: SnapshotId) {
        self.unpacks.look(|unpacks| unpacks.ids.remove(&id));
    }

    /// Starts the thread that flushes the image volume with `flush` while layers are
    /// unpacked.
    pub(super) fn start(self: &Arc<Flusher>, flush: Flush) -> Result<Background> {
        let stop = |flusher: &Flusher| flusher.unpacks.stop();
        Background::start("flusher", self, stop, move |flusher| flusher.run(&flush))
    }

    fn run(&self, flush: &Flush) {
        while self.await_unpack() {
            self.flush_while_unpacking(flush);
        }
    }

    /// Waits until a layer is being unpacked. Returns `false` once the daemon stops.
    fn await_unpack(&self) -> bool {
        let is_idle = |unpacks: &Unpacks| unpacks.ids.is_empty();
        self.unpacks.wait_while(is_idle, |_| ()).is_some()
    }

    fn flush_while_unpacking(&self, flush: &Flush) {
        let mut free_at_flush = flush.free_bytes().ok();
        let mut free_before = free_at_flush;
        let mut last_change = Instant::now();
        while self.unpacks.pause(INTERVAL) && self.unpacks.look(|unpacks| !unpacks.ids.is_empty()) {
            let free = flush.free_bytes().ok();
            // A flush without new data would still wake a sleeping disk.
            if free != free_before {
                free_before = free;
                last_change = Instant::now();
                let written = free_at_flush
                    .zip(free)
                    .map_or(0, |(before, now)| before.saturating_sub(now));
                // A flush of the volume would mostly write the data of other programs,
                // while the commit can flush the layer alone.
                if flush.is_for_others(written) {
                    continue;
                }
                free_at_flush = free;
                let flushed = flush.run();
                self.note_failure(&flushed, Volume::Image);
                if let Err(error) = flushed {
                    log::warn!(
                        "cannot flush the image volume while a layer is unpacked, so its commit \
                         may take longer: {}",
                        error.chain()
                    );
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
}
