//! What is removed: the trash of each volume, and directories that no row knows.
//!
//! Owns: when a volume has to be looked through for such directories, and that one
//! cleanup runs at a time. Never: rows of snapshots.
//! A crash leaves directories that no row knows; the next start, or the next Cleanup
//! after a failed removal, trashes them.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::FileType;

use super::quotas::Projects;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::{MOST_TOGETHER, Place, Store, Transaction};
use crate::tree;
use crate::types::{SnapshotId, Volume};
use crate::util::lock::lock;
use crate::volume::{Dirs, Volumes, moving_id};

pub(super) struct Trash {
    store: Arc<Store>,
    volumes: Arc<Volumes>,
    projects: Arc<Projects>,
    /// One cleanup at a time: the second must not answer before what the first is still
    /// deleting is gone.
    cleaning: Mutex<()>,
    /// Set when a directory without a row may be on a volume: the next Cleanup looks for
    /// it. In order: image, writable volume.
    strays: [AtomicBool; 2],
}

impl Trash {
    pub(super) fn new(
        (store, volumes): (Arc<Store>, Arc<Volumes>),
        projects: Arc<Projects>,
    ) -> Trash {
        Trash {
            store,
            volumes,
            projects,
            cleaning: Mutex::new(()),
            strays: Default::default(),
        }
    }

    /// A directory without a row may be on that volume.
    pub(super) fn note_stray(&self, volume: Volume) {
        self.strays[volume as usize].store(true, Ordering::Release);
    }

    /// Deletes everything that was removed from a volume before this call, with what is
    /// there without a row.
    pub(super) fn empty(&self, volume: Volume) -> Result<()> {
        let _cleaning = lock(&self.cleaning);
        let dirs = self.volumes.open(volume)?;
        if self.strays[volume as usize].swap(false, Ordering::AcqRel) {
            self.sweep(&dirs, volume)
                .inspect_err(|_| self.note_stray(volume))?;
        }
        let emptied = tree::remove_children(dirs.trash_fd()?)
            .context(|| format!("empty the trash of the {volume} volume"));
        // What could be deleted may have been the last of a project; where both
        // volumes are one file system, on either.
        if let Err(error) = self.projects.free_unused() {
            log::warn!("give project ids back: {}", error.chain());
        }
        emptied
    }

    /// Deletes what has just been moved to the trash of a volume under this name, and
    /// nothing else: no other caller waits for it. What cannot be deleted stays there
    /// for the next Cleanup.
    pub(super) fn delete(&self, dirs: &Dirs, name: &str) {
        let deleted = dirs
            .trash_fd()
            .and_then(|trash| tree::remove_entry(trash, name))
            .context(|| format!("delete from the trash of {}", dirs.path()))
            .and_then(|()| self.projects.free_unused());
        if let Err(error) = deleted {
            log::warn!("{}", error.chain());
        }
    }

    fn sweep(&self, dirs: &Arc<Dirs>, volume: Volume) -> Result<()> {
        let mut transaction = self.store.write()?;
        let inventory = Inventory::read(&transaction)?;
        inventory.require_latest(volume, dirs)?;
        trash_strays(dirs, volume, &inventory)?;
        let uncharged = match volume {
            Volume::Image => Vec::new(),
            Volume::Writable => self.recover_projects(&transaction, dirs),
        };
        transaction.commit()?;
        self.projects.recharge_later(&uncharged);
        Ok(())
    }

    /// As [`Projects::recover`]; if that fails, the next Cleanup tries again. Whatever is
    /// wrong with quotas, what was removed is deleted.
    pub(super) fn recover_projects(
        &self,
        transaction: &Transaction<'_>,
        dirs: &Arc<Dirs>,
    ) -> Vec<SnapshotId> {
        let recovered = self.projects.recover(transaction, dirs);
        recovered.unwrap_or_else(|error| {
            self.note_stray(Volume::Writable);
            log::warn!("look at the project quotas: {}", error.chain());
            Vec::new()
        })
    }
}

/// What the database says is on the disks.
pub(super) struct Inventory {
    pub snapshots: Vec<(Place, String)>,
    /// Layers whose leftover directory on the writable volume is still kept.
    leftover: HashSet<SnapshotId>,
    /// The highest id that was ever given out.
    highest: u64,
}

impl Inventory {
    pub(super) fn read(transaction: &Transaction<'_>) -> Result<Inventory> {
        let leftover = transaction.retired()?;
        Ok(Inventory {
            snapshots: transaction.inventory()?,
            highest: transaction.highest_id()?,
            leftover: leftover.into_iter().map(|leftover| leftover.id).collect(),
        })
    }

    /// Refuses, as [`ErrorKind::DataLoss`], a database that has forgotten snapshots
    /// whose directories are there.
    pub(super) fn require_latest(&self, volume: Volume, dirs: &Dirs) -> Result<()> {
        let entries = dirs.entries()?;
        let ids = entries
            .iter()
            .filter_map(|entry| SnapshotId::from_directory_name(entry.name.to_bytes()));
        let Some(forgotten) = first_forgotten(dirs, ids, self.highest)? else {
            return Ok(());
        };
        Err(Error::data_loss(format!(
            "the {volume} volume has snapshots/{forgotten}, but the database has given out \
             numbers up to {} only: it is an older state of itself, unless somebody has made \
             that directory by hand. Put the latest one back, or run `check --repair`, which \
             removes what it does not know",
            self.highest
        )))
    }

    fn known(&self, volume: Volume) -> HashSet<SnapshotId> {
        let places = self.snapshots.iter().map(|(place, _)| *place);
        known_on(volume, places, &self.leftover)
    }
}

/// The ids whose name belongs into `snapshots/` of a volume: those of the snapshots that
/// are there, on the image volume also of layers that have not moved there yet, by their
/// links, and on the writable volume also of `leftover` directories.
pub(super) fn known_on(
    volume: Volume,
    places: impl Iterator<Item = Place>,
    leftover: &HashSet<SnapshotId>,
) -> HashSet<SnapshotId> {
    let belongs = |place: &Place| {
        place.volume == Some(volume) || volume == Volume::Image && place.is_unmoved()
    };
    let mut known: HashSet<_> = places.filter(belongs).map(|place| place.id).collect();
    if volume == Volume::Writable {
        known.extend(leftover);
    }
    known
}

/// The first of these entries that a database must have forgotten which has given
/// out ids up to `highest`. Requests that were cut off before they were answered
/// leave empty directories, as many as become durable together.
pub(super) fn first_forgotten(
    dirs: &Dirs,
    ids: impl Iterator<Item = SnapshotId>,
    highest: u64,
) -> Result<Option<SnapshotId>> {
    for id in ids {
        let beyond = id.number().saturating_sub(highest);
        if beyond > MOST_TOGETHER as u64 || beyond > 0 && !dirs.is_unfilled(id)? {
            return Ok(Some(id));
        }
    }
    Ok(None)
}

/// What `snapshots/` of a volume holds under ids that rows know.
pub(super) type Found = HashMap<SnapshotId, FileType>;

/// Moves to the trash what no row places on that volume, and returns the rest. Names
/// that are no ids are left alone: this program did not make them. Call
/// [`Inventory::require_latest`] first.
pub(super) fn trash_strays(
    dirs: &Arc<Dirs>,
    volume: Volume,
    inventory: &Inventory,
) -> Result<Found> {
    let known = inventory.known(volume);
    let mut found = Found::new();
    for entry in dirs.entries()? {
        let name = entry.name.to_bytes();
        match SnapshotId::from_directory_name(name) {
            Some(id) if known.contains(&id) => {
                found.insert(id, entry.file_type);
            }
            Some(id) => {
                trash_entry(dirs, &id.to_string()).context(|| "move a stray directory away")?;
                log::warn!("{volume} volume: snapshots/{id} belongs to no snapshot: trashed");
            }
            // The relocator's, and perhaps in use.
            None if volume == Volume::Image && moving_id(name).is_some() => {}
            None => log::warn!(
                "{volume} volume: {:?} in snapshots/ was not made by this program: left alone",
                entry.name
            ),
        }
    }
    Ok(found)
}

/// Moves an entry of `snapshots/` to the trash. On a full disk even a rename may
/// lack a block, that of a directory that has to grow: what is in the trash
/// already goes first then.
pub(super) fn trash_entry(dirs: &Dirs, name: &str) -> Result<()> {
    match dirs.trash_entry(name) {
        Err(error) if error.kind() == ErrorKind::ResourceExhausted => {
            tree::remove_children(dirs.trash_fd()?)?;
            dirs.trash_entry(name).map(drop)
        }
        trashed => trashed.map(drop),
    }
}
