//! Making rows and directories agree again, at start and where a removal was
//! cut short. Each finding is logged once, with what was done.

use std::collections::HashSet;
use std::sync::Arc;

use rustix::fs::FileType;

use super::labels::IdMaps;
use super::prepare::shape_of;
use super::trash::{Found, GivenOut, Inventory, trash_entry};
use super::{QuotaMode, Snapshotter};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::Result;
use crate::types::{Content, Kind, Marks, Quoted, SnapshotId, Usage, Volume};
use crate::util::undo::Undo;
use crate::volume::{Dirs, Owner, moving_id};

impl Snapshotter {
    /// After a start: finishes or drops moves, clears away directories that no row
    /// knows, makes missing uppers again, sets links and project quotas right, and
    /// reports layers that are missing. The writable volume may be missing: what
    /// concerns it is then left as it is. From then on a volume of another history than
    /// the database's is refused.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if the database is an older state of itself;
    /// [`ErrorKind::FailedPrecondition`] without quotas that have to be there.
    pub fn recover(&self) -> Result<()> {
        let store = Arc::clone(&self.store);
        self.volumes
            .refuse_other_histories(move |volume, block| store.read()?.judge(volume, block));
        let image = self.volumes.open(Volume::Image)?;
        self.volumes.require_same_history(&image)?;
        let writable = self.volumes.open(Volume::Writable).ok();
        if let Some(writable) = &writable {
            self.volumes.require_same_history(writable)?;
        }
        self.relocator.recover_moves()?;
        let given_out = GivenOut::read(&*self.store.read()?)?;
        // Both volumes before anything is taken for a stray.
        given_out.require_latest(&image)?;
        if let Some(writable) = &writable {
            given_out.require_latest(writable)?;
        }
        self.mend()
    }

    /// The part of [`Snapshotter::recover`] that changes the volumes. The database is
    /// known to be the latest, or to be made do with.
    pub(super) fn mend(&self) -> Result<()> {
        let inventory = Inventory::read(&*self.store.read()?)?;
        let places: Vec<_> = inventory
            .snapshots
            .iter()
            .map(|(place, _)| *place)
            .collect();
        self.flusher.recall_failures(&places)?;
        let image = self.volumes.open(Volume::Image)?;
        warn_of(
            "drop what moves have left",
            self.drop_unfinished_moves(&image),
        );
        warn_of(
            "drop what checks have left",
            self.drop_leftovers_of_checks(&image),
        );
        let (on_image, _) = self.trash.sweep(&image)?;
        self.set_links(&inventory, &on_image);
        warn_of(
            "remove links that are not needed",
            self.sweep_lower_links(&inventory),
        );
        let mut lost = self.heal(&image, &inventory, &on_image);
        let mut swept = vec![image];
        let mut uncharged = Vec::new();
        match self.volumes.open(Volume::Writable) {
            Ok(writable) => match self.trash.sweep(&writable) {
                Ok((found, _)) => {
                    lost.extend(self.heal(&writable, &inventory, &found));
                    // Without quotas that have to be there nothing is served.
                    uncharged = match self.options.quota.mode {
                        QuotaMode::Require => self.projects.recover(&writable)?,
                        _ => self.trash.recover_projects(&writable),
                    };
                    swept.push(writable);
                }
                // A disk that has become read-only, for example.
                Err(error) => {
                    self.trash.note_stray(Volume::Writable);
                    log::warn!(
                        "directories without a snapshot stay on the writable volume, as it cannot \
                         be looked through: {}",
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
        if let Err(error) = self.ids.begin(&swept) {
            // Whoever makes a snapshot on a volume that cannot be written learns of it.
            log::warn!("prepare ids for new snapshots: {}", error.chain());
        }
        self.projects.recharge_later(&uncharged);
        Ok(())
    }

    /// What moves have left under their own names is not needed any more: copies
    /// that were not exchanged, and links that were. A directory may be all
    /// there is of a layer as long as the writable volume cannot be asked, or if the layer
    /// was renamed there and the database does not know it: such a directory stays.
    fn drop_unfinished_moves(&self, image: &Arc<Dirs>) -> Result<()> {
        let can_ask = self.volumes.open(Volume::Writable).is_ok();
        for entry in image.entries()? {
            let Some(id) = moving_id(entry.name.to_bytes()) else {
                continue;
            };
            let is_link = entry.file_type == FileType::Symlink;
            if !is_link && self.volumes.image().is_renamed_layer(id)? {
                log::warn!(
                    "image volume: {:?} in snapshots/ is a layer that no snapshot owns: it stays \
                     there; delete it if nobody needs it",
                    entry.name
                );
            } else if is_link || can_ask {
                trash_entry(image, &entry.name.to_string_lossy())?;
                log::info!("what a move of layer {id} had left was dropped");
            }
        }
        Ok(())
    }

    /// Every layer whose bytes are on the writable volume is named by a link on
    /// the image volume; it is written anew where the writable directory moved.
    fn set_links(&self, inventory: &Inventory, found: &Found) {
        for (snapshot, name) in &inventory.snapshots {
            if !snapshot.is_unmoved() {
                continue;
            }
            let target = self.volumes.link_target(snapshot.id);
            let is_link = found.get(&snapshot.id) == Some(&FileType::Symlink);
            let set = || match is_link && self.volumes.image().links_to(snapshot.id, &target)? {
                true => Ok(()),
                false => {
                    log::info!("layer {} is found at {target} from now on", Quoted(name));
                    self.volumes.link_home(snapshot.id)
                }
            };
            // Who mounts the layer has it tried again.
            if let Err(error) = set() {
                self.links.note_unlinked(snapshot.id);
                log::warn!("{}", error.chain());
            }
        }
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
    fn heal(&self, dirs: &Arc<Dirs>, inventory: &Inventory, found: &Found) -> HashSet<SnapshotId> {
        let volume = dirs.volume();
        let mut lost = HashSet::new();
        // Layers first: the others get the owner of the layer that they stand on.
        let mut snapshots: Vec<_> = inventory.snapshots.iter().collect();
        snapshots.sort_by_key(|(place, _)| (place.kind != Kind::Committed, place.id));
        for (snapshot, name) in snapshots {
            if snapshot.volume != Some(volume) {
                continue;
            }
            let is_there = found.get(&snapshot.id) == Some(&FileType::Directory);
            let shape = match snapshot.kind {
                Kind::Committed if is_there => continue,
                Kind::Committed if self.replace_hollow(dirs, name) => continue,
                Kind::Committed => {
                    log::error!(
                        "layer {} is lost: {volume} volume: snapshots/{} is missing; `check \
                         --heal` puts it back if containerd still has its content, else remove \
                         the images that use it and pull them again",
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
            let made = self.owner_of(name).and_then(|owner| {
                if is_there {
                    dirs.complete(snapshot.id, shape, owner)
                } else {
                    // Whatever else has the name.
                    dirs.clear_away(snapshot.id)?;
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

    /// Makes an empty layer in the place of a missing one that held nothing of its own, as
    /// Docker's between an image and its container. `false` if the layer held more, or it
    /// failed.
    fn replace_hollow(&self, dirs: &Arc<Dirs>, name: &str) -> bool {
        let replace = || -> Result<bool> {
            let snapshot = self.store.read()?.stat(name)?;
            if !snapshot.is_hollow() {
                return Ok(false);
            }
            let owner = self.owner_for(None, snapshot.parent_id)?;
            // Before it is there: cut off between the two, the next start does it again.
            let empty = Content {
                usage: Usage {
                    inodes: 1,
                    size_bytes: 0,
                },
                data_bytes: 0,
                marks: Some(Marks {
                    attributes: 0,
                    is_hollow: true,
                }),
            };
            self.store
                .together(|transaction| transaction.record_content(snapshot.id, &empty))?;
            dirs.create(snapshot.id, shape_of(Kind::Committed), owner)?
                .keep();
            log::warn!(
                "layer {} was missing from the {} volume; it held nothing but empty files and \
                 directories, and is empty now",
                Quoted(name),
                dirs.volume()
            );
            Ok(true)
        };
        replace().unwrap_or_else(|error| {
            log::warn!("replace layer {}: {}", Quoted(name), error.chain());
            false
        })
    }

    fn owner_of(&self, name: &str) -> Result<Owner> {
        let mut snapshot = self.store.read()?.stat(name)?;
        self.leave_out_ignored(&mut snapshot.info);
        let maps = IdMaps::from_labels(&snapshot.info.labels)?;
        self.owner_for(maps.as_ref(), snapshot.parent_id)
    }
}

/// A start goes on without what only tidies up, as on a full disk: removals make room.
fn warn_of(what: &str, done: Result<()>) {
    if let Err(error) = done {
        log::warn!("cannot {what}: {}", error.chain());
    }
}
