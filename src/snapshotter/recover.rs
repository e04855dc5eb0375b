//! Making rows and directories agree again, at start and where a removal was
//! cut short. Each finding is logged once, with what was done.

use std::collections::HashSet;
use std::sync::Arc;

use rustix::fs::FileType;

use super::labels::IdMaps;
use super::prepare::shape_of;
use super::trash::{Found, Inventory, trash_entry, trash_strays};
use super::{QuotaMode, Snapshotter};
use crate::error::Result;
use crate::store::Transaction;
use crate::types::{Kind, Quoted, SnapshotId, Volume};
use crate::util::undo::Undo;
use crate::volume::{Dirs, Owner, moving_id};

impl Snapshotter {
    /// After a start: finishes or drops moves, trashes directories that no row
    /// knows, makes missing uppers again, sets links and project quotas right, and
    /// reports layers that are missing. The writable volume may be missing: what
    /// concerns it is then left as it is.
    ///
    /// # Errors
    ///
    /// [`crate::error::ErrorKind::FailedPrecondition`] without quotas that have to be
    /// there.
    pub fn recover(&self) -> Result<()> {
        // Nobody is served yet; the transaction is for the rule that
        // directories change under the writer's lock.
        let mut transaction = self.store.write()?;
        self.relocator.recover_moves(&transaction)?;
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
                    // Without quotas that have to be there nothing is served.
                    uncharged = match self.options.quota.mode {
                        QuotaMode::Require => self.projects.recover(&transaction, &writable)?,
                        _ => self.trash.recover_projects(&transaction, &writable),
                    };
                }
                // A disk that has become read-only, for one.
                Err(error) => {
                    self.trash.note_stray(Volume::Writable);
                    log::warn!(
                        "the writable volume is not looked through: {}",
                        error.chain()
                    );
                }
            },
            Err(error) => {
                self.trash.note_stray(Volume::Writable);
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
        self.projects.recharge_later(&uncharged);
        Ok(())
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
            if !snapshot.is_unmoved() {
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
        image.sweep_host_dir_links(|id| mountable.contains(&id))
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
                kind => shape_of(kind),
            };
            let is_whole = is_there && dirs.is_whole(snapshot.id, shape);
            if is_whole {
                continue;
            }
            let made = self.owner_of(transaction, name).and_then(|owner| {
                if is_there {
                    dirs.complete(snapshot.id, shape, owner)
                } else {
                    dirs.create(snapshot.id, shape, owner).map(Undo::keep)
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
        let snapshot = transaction.stat(name)?;
        let maps = IdMaps::from_labels(&snapshot.info.labels)?;
        self.owner_for(maps.as_ref(), snapshot.parent_id)
    }
}
