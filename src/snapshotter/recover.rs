//! Making rows and directories agree again, at start and where a removal was
//! cut short. Each finding is logged once, with what was done.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use rustix::fs::FileType;

use super::labels::IdMaps;
use super::{QuotaMode, Snapshotter};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::{MOST_TOGETHER, Place, Transaction};
use crate::tree;
use crate::types::{Kind, Quoted, SnapshotId, Volume};
use crate::volume::{Dirs, NewDirs, Owner, Shape, moving_id};

/// What the database says is on the disks.
pub(super) struct Inventory {
    snapshots: Vec<(Place, String)>,
    /// Layers whose old directory on the writable volume is still kept.
    retired: HashSet<SnapshotId>,
    /// The highest id that was ever given out.
    highest: u64,
}

impl Inventory {
    pub(super) fn read(transaction: &Transaction<'_>) -> Result<Inventory> {
        let retired = transaction.rows().retired()?;
        Ok(Inventory {
            snapshots: transaction.rows().inventory()?,
            highest: transaction.rows().highest_id()?,
            retired: retired.into_iter().map(|retired| retired.id).collect(),
        })
    }

    /// Refuses a database that has forgotten snapshots whose directories are there.
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

    /// The ids whose name belongs into `snapshots/` of that volume.
    fn known(&self, volume: Volume) -> HashSet<SnapshotId> {
        let belongs = |place: &Place| match volume {
            // As a directory, or as the link of a layer that is elsewhere.
            Volume::Image => {
                place.volume == Some(Volume::Image)
                    || place.volume == Some(Volume::Writable) && place.kind == Kind::Committed
            }
            Volume::Writable => place.volume == Some(Volume::Writable),
        };
        let snapshots = self.snapshots.iter().map(|(place, _)| place);
        let mut known: HashSet<_> = snapshots
            .filter(|place| belongs(place))
            .map(|place| place.id)
            .collect();
        if volume == Volume::Writable {
            known.extend(&self.retired);
        }
        known
    }
}

impl Snapshotter {
    /// After a start: finishes or drops moves, trashes directories that no row
    /// knows, makes missing uppers anew, sets links and project quotas right, and
    /// reports layers that are missing.
    ///
    /// # Errors
    ///
    /// As of the image volume's disk or the database;
    /// [`crate::error::ErrorKind::FailedPrecondition`] without quotas that have to
    /// be there. The writable volume may
    /// be missing: what concerns it is then left as it is.
    pub fn recover(&self) -> Result<()> {
        // Nobody is served yet; the transaction is for the rule that
        // directories change under the writer's lock.
        let mut transaction = self.store.write()?;
        self.recover_moves(&transaction)?;
        let inventory = Inventory::read(&transaction)?;

        let image = self.volumes.open(Volume::Image)?;
        // Both volumes before anything is taken for a stray.
        inventory.require_latest(Volume::Image, &image)?;
        let writable = self.volumes.open(Volume::Writable);
        if let Ok(writable) = &writable {
            inventory.require_latest(Volume::Writable, writable)?;
        }
        self.drop_unfinished_moves(&image)?;
        let on_image = trash_strays(&image, Volume::Image, &inventory)?;
        self.set_links(&inventory, &on_image)?;
        self.sweep_lower_links(&inventory)?;
        let mut lost = self.heal(&transaction, &image, Volume::Image, &inventory, &on_image);
        let mut uncharged = Vec::new();

        match writable {
            Ok(writable) => match trash_strays(&writable, Volume::Writable, &inventory) {
                Ok(found) => {
                    lost.extend(self.heal(
                        &transaction,
                        &writable,
                        Volume::Writable,
                        &inventory,
                        &found,
                    ));
                    uncharged = self.recover_quotas(&transaction, &writable)?;
                }
                // A disk that has become read-only, for one.
                Err(error) => {
                    self.note_stray(Volume::Writable);
                    log::warn!(
                        "the writable volume is not looked through: {}",
                        error.chain()
                    );
                }
            },
            Err(error) => {
                self.note_stray(Volume::Writable);
                log::warn!(
                    "containers cannot be started: {}; until it is back, only what does not \
                     need it is served",
                    error.chain()
                );
            }
        }
        // A start recovers once.
        let _ = self.lost.set(lost);
        transaction.commit()?;
        self.uncharged.add(&uncharged);
        Ok(())
    }

    /// Without quotas that have to be there nothing is served; for anything else
    /// about them the next Cleanup tries again. Returns whose trees are to be charged.
    fn recover_quotas(
        &self,
        transaction: &Transaction<'_>,
        writable: &Arc<Dirs>,
    ) -> Result<Vec<SnapshotId>> {
        match self.recover_projects(transaction, writable) {
            Err(error) if self.options.quota.mode != QuotaMode::Require => {
                self.note_stray(Volume::Writable);
                log::warn!("look at the project quotas: {}", error.chain());
                Ok(Vec::new())
            }
            recovered => recovered,
        }
    }

    /// What moves have left under their own names is not needed any more: copies
    /// that were not exchanged, and links that were. A directory may be all
    /// there is of a layer as long as the writable volume cannot be asked.
    fn drop_unfinished_moves(&self, image: &Arc<Dirs>) -> Result<()> {
        let can_ask = self.volumes.open(Volume::Writable).is_ok();
        for entry in image.entries()? {
            let Some(id) = moving_id(entry.name.to_bytes()) else {
                continue;
            };
            if entry.file_type == FileType::Symlink || can_ask {
                trash_entry(image, &entry.name.to_string_lossy())?;
                log::info!("what a move of layer {id} had left was dropped");
            }
        }
        Ok(())
    }

    /// Every layer whose bytes are on the writable volume is named by a link on
    /// the image volume; it is written anew where the writable directory moved.
    fn set_links(&self, inventory: &Inventory, found: &Found) -> Result<()> {
        for (snapshot, name) in &inventory.snapshots {
            let is_linked =
                snapshot.kind == Kind::Committed && snapshot.volume == Some(Volume::Writable);
            if !is_linked {
                continue;
            }
            let target = self.volumes.link_target(snapshot.id);
            let is_right = found.get(&snapshot.id) == Some(&FileType::Symlink)
                && self.volumes.image().links_to(snapshot.id, &target)?;
            if !is_right {
                self.volumes.link_home(snapshot.id)?;
                log::info!("layer {} is found at {target} from now on", Quoted(name));
            }
        }
        Ok(())
    }

    /// A caller may have been told the mounts of any snapshot that can still be
    /// mounted, and mount them only now: its links stay.
    fn sweep_lower_links(&self, inventory: &Inventory) -> Result<()> {
        let places = inventory.snapshots.iter().map(|(place, _)| place);
        let mountable: HashSet<_> = places
            .filter(|place| place.kind != Kind::Committed)
            .map(|place| place.id)
            .collect();
        let image = self.volumes.image();
        image.sweep_lower_links(|id| mountable.contains(&id))
    }

    /// Deals with rows whose directory is missing, or not whole: an active
    /// snapshot gets an empty one, as after a power cut before its directory
    /// reached the disk; a missing layer cannot be healed, is reported and
    /// returned.
    fn heal(
        &self,
        transaction: &Transaction<'_>,
        dirs: &Arc<Dirs>,
        volume: Volume,
        inventory: &Inventory,
        found: &Found,
    ) -> HashSet<SnapshotId> {
        let mut lost = HashSet::new();
        for (snapshot, name) in &inventory.snapshots {
            if snapshot.volume != Some(volume) {
                continue;
            }
            let is_there = found.get(&snapshot.id) == Some(&FileType::Directory);
            let shape = match snapshot.kind {
                Kind::Committed if is_there => continue,
                Kind::Committed => {
                    log::error!(
                        "layer {} is lost: {volume} volume: snapshots/{} is missing; remove the \
                         images that use it and pull them again",
                        Quoted(name),
                        snapshot.id
                    );
                    lost.insert(snapshot.id);
                    continue;
                }
                Kind::Active => Shape::UpperAndWork,
                Kind::View => Shape::UpperOnly,
            };
            let is_whole = is_there && dirs.is_whole(snapshot.id, shape);
            if is_whole {
                continue;
            }
            let made = self.owner_of(transaction, name).and_then(|owner| {
                if is_there {
                    dirs.complete(snapshot.id, shape, owner)
                } else {
                    dirs.create(snapshot.id, shape, owner).map(NewDirs::keep)
                }
            });
            match made {
                Ok(()) => log::warn!(
                    "snapshot {} had no whole directory on the {volume} volume: what was missing \
                     starts empty",
                    Quoted(name)
                ),
                Err(error) => log::error!(
                    "snapshot {} has no directory: {}",
                    Quoted(name),
                    error.chain()
                ),
            }
        }
        lost
    }

    fn owner_of(&self, transaction: &Transaction<'_>, name: &str) -> Result<Owner> {
        let snapshot = transaction.rows().stat(name)?;
        let maps = IdMaps::from_labels(&snapshot.info.labels)?;
        self.owner_for(maps.as_ref(), snapshot.parent_id)
    }
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
type Found = HashMap<SnapshotId, FileType>;

/// Moves to the trash what no row places on that volume, and returns the rest.
/// Names that are no ids are left alone: this program did not make them. Comes
/// after [`Inventory::require_latest`].
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
fn trash_entry(dirs: &Dirs, name: &str) -> Result<()> {
    match dirs.trash_entry(name) {
        Err(error) if error.kind() == ErrorKind::ResourceExhausted => {
            tree::remove_children(dirs.trash_fd()?)?;
            dirs.trash_entry(name).map(drop)
        }
        trashed => trashed.map(drop),
    }
}
