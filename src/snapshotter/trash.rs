//! Removed snapshots: the trash of each volume, and directories without a row.
//!
//! Owns: when a volume has to be searched for directories without a row, what happens
//! to them, and that only one cleanup runs at a time. Never: rows of snapshots.
//!
//! A directory without a row is deleted only if a tombstone proves that it was a
//! snapshot's, or if nothing was ever written into it. Any other directory is set aside in
//! `left-out/`, where only a person deletes it.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::FileType;

use super::ids::Ids;
use super::in_use::require_not_by_hand;
use super::quotas::Projects;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::{Place, Rows, Store};
use crate::tree;
use crate::types::{SnapshotId, Volume};
use crate::util::lock::lock;
use crate::volume::{Dirs, Volumes, is_handed_over, is_unpacked, moving_id, replaced_id};

pub(super) struct Trash {
    store: Arc<Store>,
    volumes: Arc<Volumes>,
    projects: Arc<Projects>,
    ids: Arc<Ids>,
    /// Locked during the cleanup of a volume: a second cleanup must not answer before the
    /// first one has deleted everything. In order: image, writable volume.
    cleaning: [Mutex<()>; 2],
    /// Set when a directory without a row may be on a volume, so that the next Cleanup
    /// searches for it. In order: image, writable volume.
    strays: [AtomicBool; 2],
    /// Directories that are in the trash, perhaps not durably, and still have a
    /// tombstone.
    trashed: Mutex<Vec<(SnapshotId, Volume)>>,
    /// Directories that are durably in the trash, so that their tombstones can
    /// be deleted.
    settled: Mutex<Vec<(SnapshotId, Volume)>>,
}

impl Trash {
    pub(super) fn new(
        (store, volumes): (Arc<Store>, Arc<Volumes>),
        projects: Arc<Projects>,
        ids: Arc<Ids>,
    ) -> Trash {
        Trash {
            store,
            volumes,
            projects,
            ids,
            cleaning: Default::default(),
            strays: Default::default(),
            trashed: Mutex::default(),
            settled: Mutex::default(),
        }
    }

    /// Notes that a directory without a row may be on that volume, for the next Cleanup.
    pub(super) fn note_stray(&self, volume: Volume) {
        self.strays[volume as usize].store(true, Ordering::Release);
    }

    /// Notes that the directory of a removed snapshot or a moved layer is in the trash.
    pub(super) fn note_trashed(&self, id: SnapshotId, volume: Volume) {
        lock(&self.trashed).push((id, volume));
    }

    /// Returns the directories whose tombstones are not needed any more. The caller
    /// deletes the tombstones with the next change of the database.
    pub(super) fn take_settled(&self) -> Vec<(SnapshotId, Volume)> {
        std::mem::take(&mut *lock(&self.settled))
    }

    /// Makes the renames into the trash durable. Until then the tombstones stay, because
    /// after a power cut a directory may be back in `snapshots/`.
    fn settle(&self, dirs: &Dirs) -> Result<()> {
        let volume = dirs.volume();
        let on_volume = |entry: &mut (SnapshotId, Volume)| entry.1 == volume;
        let trashed: Vec<_> = lock(&self.trashed).extract_if(.., on_volume).collect();
        if !trashed.is_empty() {
            dirs.settle_names()?;
            lock(&self.settled).extend(trashed);
        }
        Ok(())
    }

    /// Deletes everything that was removed from a volume before this call, and clears away
    /// directories without a row.
    pub(super) fn empty(&self, volume: Volume) -> Result<()> {
        let _cleaning = lock(&self.cleaning[volume as usize]);
        let dirs = self.volumes.open(volume)?;
        if self.strays[volume as usize].swap(false, Ordering::AcqRel) {
            self.sweep_late(&dirs)
                .inspect_err(|_| self.note_stray(volume))?;
        }
        let emptied = tree::remove_children(dirs.trash_fd()?)
            .context(|| format!("empty the trash of the {volume} volume"));
        self.settle(&dirs)?;
        // The deleted files may have been the last ones of a project. Both volumes may be
        // on one file system, so this is checked after a Cleanup of either one.
        if let Err(error) = self.projects.free_unused() {
            log::warn!(
                "the project ids of removed containers stay in use until containerd's next \
                 garbage collection: {}",
                error.chain()
            );
        }
        emptied
    }

    /// Deletes the entry `name` from the trash of a volume. A failure is only logged,
    /// because the next Cleanup deletes the rest.
    pub(super) fn delete(&self, dirs: &Dirs, name: &str) {
        let deleted = dirs
            .trash_fd()
            .and_then(|trash| tree::remove_entry(trash, name))
            .context(|| format!("delete from the trash of {}", dirs.path()))
            .and_then(|()| self.projects.free_unused());
        if let Err(error) = deleted {
            log::warn!(
                "removed files take room until containerd's next garbage collection: {}",
                error.chain()
            );
        }
    }

    /// Searches a volume for directories without a row while requests are served,
    /// because a removal has failed there, or the volume was missing at the start.
    fn sweep_late(&self, dirs: &Arc<Dirs>) -> Result<()> {
        if let (_, Some(error)) = self.sweep(dirs)? {
            return Err(error);
        }
        if dirs.volume() == Volume::Writable {
            let uncharged = self.recover_projects(dirs);
            self.projects.recharge_later(&uncharged);
        }
        Ok(())
    }

    /// Calls [`Projects::recover`]. A failure is only logged, and the next Cleanup tries
    /// again, because removed files have to be deleted even if quotas do not work.
    pub(super) fn recover_projects(&self, dirs: &Arc<Dirs>) -> Vec<SnapshotId> {
        let recovered = self.projects.recover(dirs);
        recovered.unwrap_or_else(|error| {
            self.note_stray(Volume::Writable);
            log::warn!(
                "the limits of containers were not checked; the check is tried again at \
                 containerd's next garbage collection: {}",
                error.chain()
            );
            Vec::new()
        })
    }

    /// Moves the entries without a row out of `snapshots/`, and returns the entries with
    /// one. Entries whose names are not ids are left alone. If some entries cannot be
    /// moved, for example on a full disk, the last error is also returned, and the start
    /// goes on.
    pub(super) fn sweep(&self, dirs: &Arc<Dirs>) -> Result<(Found, Option<Error>)> {
        let volume = dirs.volume();
        let mut failed = None;
        let mut found = Found::new();
        let mut claimed = HashSet::new();
        for entry in dirs.entries()? {
            let name = entry.name.to_bytes();
            match SnapshotId::from_directory_name(name) {
                Some(id) => {
                    found.insert(id, entry.file_type);
                    if self.ids.is_claimed(id) {
                        claimed.insert(id);
                    }
                }
                // The relocator or a check may be using these entries.
                None if volume == Volume::Image && is_worked_on(name) => {}
                None => log::warn!(
                    "{volume} volume: {:?} in snapshots/ was not made by this program, and is left \
                     alone",
                    entry.name
                ),
            }
        }
        // The database is read after the claims. A directory that had no claim then and has
        // no row now will get no row.
        let inventory = Inventory::read(&*self.store.read()?)?;
        let known = inventory.known(volume);
        let mut buried = self.store.read()?.tombstones(volume)?;
        for id in found.keys().copied().collect::<Vec<_>>() {
            if known.contains(&id) || claimed.contains(&id) {
                continue;
            }
            found.remove(&id);
            if let Err(error) = self.clear_stray(dirs, id, buried.contains(&id)) {
                self.note_stray(volume);
                buried.remove(&id);
                log::warn!(
                    "snapshots/{id} of the {volume} volume, which no snapshot owns, stays until \
                     containerd's next garbage collection: {}",
                    error.chain()
                );
                failed = Some(error);
            }
        }
        let is_gone = |id: &SnapshotId| !claimed.contains(id);
        let gone = buried.into_iter().filter(is_gone);
        let gone: Vec<_> = gone.map(|id| (id, volume)).collect();
        if !gone.is_empty() {
            dirs.settle_names()?;
            let forget = self.store.together(|rows| rows.forget_tombstones(&gone));
            forget.context(|| "record that removed directories are in the trash")?;
        }
        Ok((found, failed))
    }

    fn clear_stray(&self, dirs: &Dirs, id: SnapshotId, is_buried: bool) -> Result<()> {
        let volume = dirs.volume();
        require_not_by_hand(&self.store, &self.volumes, id)?;
        let is_link = volume == Volume::Image && self.volumes.image().is_layer_link(id)?;
        if is_buried || is_link {
            log::info!(
                "{volume} volume: moved snapshots/{id} to the trash: its snapshot was removed \
                 before the daemon stopped"
            );
            return trash_entry(dirs, &id.to_string());
        }
        match dirs.clear_away(id)? {
            None => log::info!(
                "{volume} volume: moved snapshots/{id} to the trash: it is empty and belongs to no \
                 snapshot"
            ),
            Some(path) => log::warn!(
                "{volume} volume: snapshots/{id} belongs to no snapshot, and holds files: it is \
                 set aside as {path}; delete it there if you do not need it"
            ),
        }
        Ok(())
    }
}

/// The directories and links that should be on the volumes, according to the database.
pub(super) struct Inventory {
    pub snapshots: Vec<(Place, String)>,
    /// Layers that have a leftover directory on the writable volume.
    leftover: HashSet<SnapshotId>,
}

/// The ids that a database has given out.
#[derive(Clone, Copy)]
pub(super) struct GivenOut {
    /// The highest id of a snapshot that was ever entered.
    pub entered: u64,
    /// The highest reserved id. An interrupted request may have used it for a directory
    /// without a row.
    pub reserved: u64,
}

impl GivenOut {
    pub(super) fn read(rows: &Rows) -> Result<GivenOut> {
        Ok(GivenOut {
            entered: rows.highest_id()?,
            reserved: rows.highest_reserved()?,
        })
    }

    /// The first of these ids that the database must have forgotten: its id was never
    /// reserved, or its directory is filled although no snapshot of so high an id was
    /// entered.
    pub(super) fn first_forgotten(
        self,
        dirs: &Dirs,
        ids: impl Iterator<Item = SnapshotId>,
    ) -> Result<Option<SnapshotId>> {
        for id in ids {
            let number = id.number();
            if number > self.reserved || number > self.entered && !dirs.is_unfilled(id)? {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    /// Returns [`ErrorKind::DataLoss`] if the volume has directories of snapshots that the
    /// database has forgotten.
    pub(super) fn require_latest(self, dirs: &Dirs) -> Result<()> {
        let entries = dirs.entries()?;
        let ids = entries
            .iter()
            .filter_map(|entry| SnapshotId::from_directory_name(entry.name.to_bytes()));
        let Some(forgotten) = self.first_forgotten(dirs, ids)? else {
            return Ok(());
        };
        Err(Error::data_loss(format!(
            "the {} volume has snapshots/{forgotten}, but the database has given out ids up to {} \
             only: the database is an old copy, unless a person has made that directory by \
             hand. Put the latest database back, or run `check --repair`, which sets the unknown \
             directories aside",
            dirs.volume(),
            self.entered
        )))
    }
}

impl Inventory {
    pub(super) fn read(rows: &Rows) -> Result<Inventory> {
        rows.at_one_moment(|| {
            let leftover = rows.retired()?;
            Ok(Inventory {
                snapshots: rows.inventory()?,
                leftover: leftover.into_iter().map(|leftover| leftover.id).collect(),
            })
        })
    }

    fn known(&self, volume: Volume) -> HashSet<SnapshotId> {
        let places = self.snapshots.iter().map(|(place, _)| *place);
        known_on(volume, places, &self.leftover)
    }
}

/// The ids that `snapshots/` of a volume should contain: those of the snapshots on that
/// volume; on the image volume also those of unmoved layers, as links; and on the
/// writable volume also those of `leftover` directories.
pub(super) fn known_on(
    volume: Volume,
    places: impl Iterator<Item = Place>,
    leftover: &HashSet<SnapshotId>,
) -> HashSet<SnapshotId> {
    let belongs = |place: &Place| place.volumes().any(|on| on == volume);
    let mut known: HashSet<_> = places.filter(belongs).map(|place| place.id).collect();
    if volume == Volume::Writable {
        known.extend(leftover);
    }
    known
}

/// Whether an entry of `snapshots/` on the image volume belongs to a layer that is
/// being moved, compared or healed.
fn is_worked_on(name: &[u8]) -> bool {
    moving_id(name).is_some()
        || replaced_id(name).is_some()
        || is_unpacked(name)
        || is_handed_over(name)
}

/// Entries of `snapshots/` on a volume, by their ids.
pub(super) type Found = HashMap<SnapshotId, FileType>;

/// All entries of `snapshots/` on a volume whose names are ids.
pub(super) fn entries_of(dirs: &Dirs) -> Result<Found> {
    let entries = dirs.entries()?.into_iter();
    let numbered = entries.filter_map(|entry| {
        let id = SnapshotId::from_directory_name(entry.name.to_bytes())?;
        Some((id, entry.file_type))
    });
    Ok(numbered.collect())
}

/// Moves an entry of `snapshots/` to the trash. On a full disk, even a rename may fail,
/// because the directory of the trash has to grow. In that case, the trash is emptied
/// first.
pub(super) fn trash_entry(dirs: &Dirs, name: &str) -> Result<()> {
    match dirs.trash_entry(name) {
        Err(error) if error.kind() == ErrorKind::ResourceExhausted => {
            tree::remove_children(dirs.trash_fd()?)?;
            dirs.trash_entry(name).map(drop)
        }
        trashed => trashed.map(drop),
    }
}
