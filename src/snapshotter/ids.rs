//! Which id the next snapshot gets, and which snapshots are being worked on.
//!
//! Owns: the block of ids that is in use, and the claims. A snapshot gets its id before
//! its row is entered, so that its directories are made while nothing is locked. An id is
//! given out once. After a crash, ids of the block may have empty directories and no row.
//!
//! What changes the directories of a snapshot has a claim on its id for that time. So no
//! two requests change the same directories, and a sweep knows that a directory without
//! a row is not a stray but on its way.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use crate::error::Result;
use crate::store::Store;
use crate::types::{Block, SnapshotId};
use crate::util::lock::lock;
use crate::util::monitor::Monitor;
use crate::volume::Dirs;

pub(super) struct Ids {
    store: Arc<Store>,
    /// `None` before the first id since the start, and when the block is used up.
    next: Mutex<Option<Next>>,
    /// The first id of the newest block that is recorded on a volume. In order: image,
    /// writable volume. Each mutex is held while its own disk is written.
    recorded: [Mutex<u64>; 2],
    claimed: Monitor<HashSet<SnapshotId>>,
}

struct Next {
    block: Block,
    id: u64,
}

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
    pub(super) fn new(store: Arc<Store>) -> Ids {
        Ids {
            store,
            next: Mutex::new(None),
            recorded: Default::default(),
            claimed: Monitor::default(),
        }
    }

    /// At a start: reserves a block, and records it on the volumes that are there, so that the
    /// first request need not. Each start has a block of its own: a database and a volume
    /// that have been through other starts since are known to be apart.
    pub(super) fn begin(&self, volumes: &[Arc<Dirs>]) -> Result<()> {
        let block = self.reserve()?;
        for dirs in volumes {
            self.record(dirs, &block)?;
        }
        let id = block.first;
        *lock(&self.next) = Some(Next { block, id });
        Ok(())
    }

    fn reserve(&self) -> Result<Block> {
        self.store.together(|transaction| {
            let first = transaction.highest_reserved()? + 1;
            transaction.reserve_block(first)
        })
    }

    /// Gives out an id for a snapshot that will have directories in `dirs`, or none.
    pub(super) fn take(&self, dirs: Option<&Dirs>) -> Result<Claim<'_>> {
        let (block, id) = {
            let mut next = lock(&self.next);
            if next.as_ref().is_none_or(|next| next.id > next.block.last()) {
                let block = self.reserve()?;
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
        Ok(self.claim(id))
    }

    /// Records on a volume that ids of this block are used there, unless a newer one is
    /// recorded.
    fn record(&self, dirs: &Dirs, block: &Block) -> Result<()> {
        let mut recorded = lock(&self.recorded[dirs.volume() as usize]);
        if *recorded >= block.first {
            return Ok(());
        }
        let volume = dirs.volume();
        // A damaged one was accepted by a repair.
        let before = dirs.newest_block().ok().flatten();
        self.store
            .together(|transaction| transaction.record_block(volume, block, before.as_ref()))?;
        dirs.record_block(block)?;
        *recorded = block.first;
        Ok(())
    }

    /// Waits until no other request works on that snapshot.
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
