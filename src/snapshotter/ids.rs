//! Which id the next snapshot gets, and which snapshots are being worked on.
//!
//! Owns: the block of ids that is in use, the following block, and the claims. A snapshot
//! gets its id before its row is entered, so that its directories are created while nothing
//! is locked. Each id is given out once. A crash may leave empty directories for ids of the
//! block that have no row yet.
//!
//! A thread that changes the directories of a snapshot holds a claim on the snapshot's id.
//! So no two requests change the same directories, and a search for directories without a
//! row leaves alone those that are about to get one.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use crate::error::Result;
use crate::store::Store;
use crate::types::{Block, SnapshotId, Volume};
use crate::util::lock::lock;
use crate::util::monitor::Monitor;
use crate::util::threads::Background;
use crate::volume::{Dirs, Volumes};
use crate::waits::{self, Awaited};

pub(super) struct Ids {
    store: Arc<Store>,
    volumes: Arc<Volumes>,
    /// The block in use, and the next id in it; `None` until the first id after the start.
    next: Mutex<Option<Next>>,
    /// The block after the one in use, once that following block is reserved.
    following: Mutex<Option<Block>>,
    ahead: Monitor<Ahead>,
    /// The first id of the newest block that is recorded on a volume. In order: image,
    /// writable volume. The mutex of a volume is held while its disk is written.
    recorded: [Mutex<u64>; 2],
    claimed: Monitor<HashSet<SnapshotId>>,
}

struct Next {
    block: Block,
    id: u64,
}

/// Work for the background thread, so that no later request has to do it.
#[derive(Default)]
struct Ahead {
    reserves: bool,
    /// Volumes on which the following block is to be recorded: only those that requests
    /// use, so that no disk is woken for it.
    records: Vec<Volume>,
}

/// The number of ids left in a block when the following block is reserved.
const FEW: u64 = 128;

/// The right to change the directories of a snapshot, until it is dropped.
pub(super) struct Claim<'a> {
    ids: &'a Ids,
    pub id: SnapshotId,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.ids.claimed.change(|claimed| claimed.remove(&self.id));
    }
}

impl Ids {
    pub(super) fn new((store, volumes): (Arc<Store>, Arc<Volumes>)) -> Ids {
        Ids {
            store,
            volumes,
            next: Mutex::new(None),
            following: Mutex::new(None),
            ahead: Monitor::default(),
            recorded: Default::default(),
            claimed: Monitor::default(),
        }
    }

    /// At a start, reserves a block and records it on the image volume, so that the first
    /// request need not do it. Each start gets a block of its own: if the database and a
    /// volume are later used separately, their blocks differ and show it.
    pub(super) fn begin(&self, image: &Dirs) -> Result<()> {
        let block = self.reserve()?;
        self.record(image, &block)?;
        let id = block.first;
        *lock(&self.next) = Some(Next { block, id });
        Ok(())
    }

    /// Records the block in use on a volume that is there: at a start on the writable volume,
    /// and on the image volume before a layer moves there. The layer's id may be from a block
    /// that is recorded on the writable volume only.
    pub(super) fn begin_on(&self, dirs: &Dirs) -> Result<()> {
        let block = lock(&self.next).as_ref().map(|next| next.block.clone());
        block.map_or(Ok(()), |block| self.record(dirs, &block))
    }

    fn reserve(&self) -> Result<Block> {
        self.store.together(|transaction| {
            let first = transaction.highest_reserved()? + 1;
            transaction.reserve_block(first)
        })
    }

    /// Gives out an id for a snapshot that will have directories in `dirs`, or no
    /// directories.
    pub(super) fn take(&self, dirs: Option<&Dirs>) -> Result<Claim<'_>> {
        // The lock may be held by another request, for which the database reserves a block.
        waits::enter(Awaited::Database)?;
        let (block, id) = {
            let mut next = lock(&self.next);
            if next.as_ref().is_none_or(|next| next.id > next.block.last()) {
                let following = lock(&self.following).take();
                let block = following.map_or_else(|| self.reserve(), Ok)?;
                let id = block.first;
                *next = Some(Next { block, id });
            }
            let next = next.as_mut().expect("a block was just reserved");
            next.id += 1;
            (next.block.clone(), SnapshotId::new(next.id - 1))
        };
        if let Some(dirs) = dirs {
            self.record(dirs, &block)?;
        }
        if id.number() + FEW > block.last() {
            self.prepare_following(dirs);
        }
        Ok(self.claim(id))
    }

    /// Asks the background thread to reserve the following block, and to record it on the
    /// volume of `dirs`.
    fn prepare_following(&self, dirs: Option<&Dirs>) {
        let following = lock(&self.following).clone();
        let Some(following) = following else {
            if !self.ahead.look(|ahead| ahead.reserves) {
                self.ahead.change(|ahead| ahead.reserves = true);
            }
            return;
        };
        // If the lock is held, a block is being recorded on this volume.
        let lacks = |dirs: &&Dirs| {
            let recorded = self.recorded[dirs.volume() as usize].try_lock();
            recorded.is_ok_and(|recorded| *recorded < following.first)
        };
        if let Some(dirs) = dirs.filter(lacks) {
            self.ahead.change(|ahead| ahead.records.push(dirs.volume()));
        }
    }

    /// Starts the background thread.
    pub(super) fn start(self: &Arc<Ids>) -> Result<Background> {
        let ids = Arc::downgrade(self);
        self.volumes.on_return(move |dirs| match ids.upgrade() {
            Some(ids) => ids.mark_return(dirs),
            None => Ok(()),
        });
        let stop = |ids: &Ids| ids.ahead.stop();
        Background::start("reserver", self, stop, Ids::run)
    }

    /// Records a new block on a volume that has come back. From then on, an older copy of
    /// the volume is recognised, because it lacks this block.
    fn mark_return(&self, dirs: &Dirs) -> Result<()> {
        let block = self.reserve()?;
        self.record(dirs, &block)
    }

    fn run(&self) {
        let is_idle = |ahead: &Ahead| !ahead.reserves && ahead.records.is_empty();
        while let Some(records) = self
            .ahead
            .wait_while(is_idle, |ahead| std::mem::take(&mut ahead.records))
        {
            let done = self.work_ahead(&records);
            self.ahead.look(|ahead| ahead.reserves = false);
            if let Err(error) = done {
                // The request that needs the block reserves or records it
                // itself.
                log::debug!("cannot prepare ids ahead of requests: {}", error.chain());
            }
        }
    }

    fn work_ahead(&self, records: &[Volume]) -> Result<()> {
        let reserved = lock(&self.following).clone();
        let Some(following) = reserved else {
            let block = self.reserve()?;
            let next = lock(&self.next);
            // A request may have reserved a later block meanwhile.
            if next
                .as_ref()
                .is_none_or(|next| next.block.first < block.first)
            {
                *lock(&self.following) = Some(block);
            }
            return Ok(());
        };
        for volume in records {
            self.record(&*self.volumes.open(*volume)?, &following)?;
        }
        Ok(())
    }

    /// Records on a volume that ids of this block are used there, unless a newer block
    /// is recorded.
    fn record(&self, dirs: &Dirs, block: &Block) -> Result<()> {
        waits::note(Awaited::Volume(dirs.volume()));
        let mut recorded = lock(&self.recorded[dirs.volume() as usize]);
        if *recorded >= block.first {
            return Ok(());
        }
        let volume = dirs.volume();
        // A damaged file of blocks counts as an empty one: a start refuses it unless a
        // repair has accepted the damage.
        let before = dirs.newest_block().ok().flatten();
        self.store
            .together(|transaction| transaction.record_block(volume, block, before.as_ref()))?;
        waits::note(Awaited::Volume(volume));
        self.volumes.record_block(dirs, block)?;
        *recorded = block.first;
        self.store
            .together(|transaction| transaction.confirm_block(volume, block))
    }

    /// Waits until no other request works on that snapshot, then claims it.
    pub(super) fn claim(&self, id: SnapshotId) -> Claim<'_> {
        let is_taken = |claimed: &HashSet<SnapshotId>| claimed.contains(&id);
        self.claimed
            .wait_while(is_taken, |claimed| claimed.insert(id));
        Claim { ids: self, id }
    }

    /// Whether a request works on that snapshot.
    pub(super) fn is_claimed(&self, id: SnapshotId) -> bool {
        self.claimed.look(|claimed| claimed.contains(&id))
    }
}
