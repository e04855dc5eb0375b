//! Bringing rows and directories into agreement, at a start and after an interrupted
//! removal. Each discrepancy is logged once, with what was done about it.

use std::collections::HashSet;
use std::sync::Arc;

use rustix::fs::FileType;

use super::labels::IdMaps;
use super::prepare::shape_of;
use super::trash::{Found, GivenOut, Inventory, entries_of, trash_entry};
use super::{QuotaMode, Snapshotter};
use crate::error::{ErrorKind, Result};
use crate::store::Place;
use crate::types::{Content, Kind, Marks, Quoted, Usage, Volume};
use crate::util::lock::lock;
use crate::util::undo::Undo;
use crate::volume::{Dirs, Owner, moving_id};

impl Snapshotter {
    /// The first step of a start: returns an error if the image volume does not belong to
    /// the database. From then on, every volume with another history than the database's is
    /// refused.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if the database is an old copy.
    pub fn judge_image(&self) -> Result<()> {
        let store = Arc::clone(&self.store);
        self.volumes
            .refuse_other_histories(move |volume, block| store.read()?.judge(volume, block));
        self.judge(self.volumes.image().dirs())
    }

    /// The second step of a start: returns an error if the writable volume is there, but
    /// does not belong to the database. This step and [`Snapshotter::judge_image`] come
    /// before any directory without a row is moved away.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::DataLoss`] if the database is an old copy.
    pub fn judge_writable(&self) -> Result<()> {
        match self.volumes.open(Volume::Writable) {
            Ok(writable) => self.judge(&writable),
            // A volume with another history is an error; a missing one is none.
            Err(error) if error.kind() == ErrorKind::DataLoss => Err(error),
            Err(_) => Ok(()),
        }
    }

    fn judge(&self, dirs: &Dirs) -> Result<()> {
        self.volumes.require_same_history(dirs)?;
        GivenOut::read(&*self.store.read()?)?.require_latest(dirs)
    }

    /// The third step of a start: records in the database the moves of layers that a crash
    /// has interrupted just before they were recorded. Without the writable volume, only
    /// the moves that the image volume alone proves are recorded.
    ///
    /// # Errors
    ///
    /// Those of the database and the volumes.
    pub fn recover_moves(&self) -> Result<()> {
        self.relocator.recover_moves()
    }

    /// Makes both volumes agree with the database. The caller knows that the database is in
    /// its latest state, or accepts an older state.
    pub(super) fn mend(&self) -> Result<()> {
        self.mend_image()?;
        self.mend_writable()
    }

    /// The fourth step of a start: moves directories without a row away from the image
    /// volume, creates missing upper directories and links again, and reports missing
    /// layers. Does not access the writable volume.
    ///
    /// # Errors
    ///
    /// Those of the database and the volume.
    pub fn mend_image(&self) -> Result<()> {
        let inventory = Inventory::read(&*self.store.read()?)?;
        let places: Vec<_> = inventory
            .snapshots
            .iter()
            .map(|(place, _)| *place)
            .collect();
        self.flusher.recall_failures(&places)?;
        let image = self.volumes.open(Volume::Image)?;
        warn_of(
            "delete the leftovers of checks",
            self.drop_leftovers_of_checks(&image),
        );
        let (on_image, _) = self.trash.sweep(&image)?;
        self.set_links(&inventory, &on_image);
        warn_of(
            "remove links to host directories that no snapshot needs",
            self.sweep_lower_links(&inventory),
        );
        self.find_lost(&image, &inventory, &on_image);
        self.make_missing(&image, &inventory, &on_image);
        // The start goes on: the first request that creates a snapshot reports the same
        // error.
        warn_of("prepare ids for new snapshots", self.ids.begin(&image));
        Ok(())
    }

    /// The last step of a start. Deletes what unfinished moves have left on the image volume.
    /// On the writable volume, moves directories without a row to the trash or to `left-out/`,
    /// creates missing directories again, reports missing layers, and sets up project quotas.
    /// A missing writable volume is only reported. Requests that do not need it may be served
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if quotas are required and not available.
    pub fn mend_writable(&self) -> Result<()> {
        warn_of(
            "delete the leftovers of moves",
            self.drop_unfinished_moves(self.volumes.image().dirs()),
        );
        match self.volumes.open(Volume::Writable) {
            Ok(writable) => match self.trash.sweep(&writable) {
                Ok((found, _)) => {
                    let inventory = Inventory::read(&*self.store.read()?)?;
                    self.find_lost(&writable, &inventory, &found);
                    self.make_missing(&writable, &inventory, &found);
                    warn_of(
                        "create missing directories on the image volume",
                        self.make_missing_on_image(&inventory),
                    );
                    // If quotas are required and not available, the start fails, so that
                    // nothing is served.
                    let uncharged = match self.options.quota.mode {
                        QuotaMode::Require => self.projects.recover(&writable)?,
                        _ => self.trash.recover_projects(&writable),
                    };
                    warn_of(
                        "prepare ids for new snapshots",
                        self.ids.begin_on(&writable),
                    );
                    self.projects.recharge_later(&uncharged);
                }
                // The volume cannot be searched, for example because the disk has become
                // read-only.
                Err(error) => {
                    self.trash.note_stray(Volume::Writable);
                    log::warn!(
                        "the writable volume cannot be searched for directories without a \
                         snapshot, which stay there: {}",
                        error.chain()
                    );
                }
            },
            Err(error) => {
                self.trash.note_stray(Volume::Writable);
                log::warn!(
                    "containers cannot be started: {}; requests that do not need the writable \
                     volume are served",
                    error.chain()
                );
            }
        }
        Ok(())
    }

    /// Permits access to a writable volume that has answered only after the start, and
    /// moves of layers from it. `is_mended` says whether the volume agrees with the
    /// database.
    pub fn begin_with_writable(&self, is_mended: bool) {
        self.volumes.release_writable();
        if !is_mended {
            self.trash.note_stray(Volume::Writable);
        }
        self.relocator.wake();
    }

    /// Moves to the trash the entries `.moving-<id>` that unfinished moves have left:
    /// copies before the exchange, and links after it. A directory stays if it may be the
    /// only copy of a layer: while the writable volume is missing, or if the layer was
    /// renamed there and the database does not know it.
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
                     there; delete it if you do not need it",
                    entry.name
                );
            } else if is_link || can_ask {
                trash_entry(image, &entry.name.to_string_lossy())?;
                log::info!("layer {id}: dropped the leftovers of an unfinished move");
            }
        }
        Ok(())
    }

    /// Creates missing links on the image volume to unmoved layers, and replaces those that
    /// lead to an earlier path of the writable directory.
    fn set_links(&self, inventory: &Inventory, found: &Found) {
        for (snapshot, name) in &inventory.snapshots {
            if !snapshot.is_unmoved() {
                continue;
            }
            let target = self.volumes.link_target(snapshot.id);
            let is_link = found.get(&snapshot.id) == Some(&FileType::Symlink);
            let set = || -> Result<()> {
                if is_link && self.volumes.image().links_to(snapshot.id, &target)? {
                    return Ok(());
                }
                self.volumes.link_home(snapshot.id)?;
                log::info!(
                    "layer {}: created its link on the image volume, to {target}",
                    Quoted(name)
                );
                Ok(())
            };
            // A request that mounts the layer tries to create the link again.
            if let Err(error) = set() {
                self.links.note_unlinked(snapshot.id);
                log::warn!(
                    "layer {}: its files are on the writable volume, and the link to them on the \
                     image volume could not be created; the next request that mounts the layer \
                     tries again: {}",
                    Quoted(name),
                    error.chain()
                );
            }
        }
    }

    /// Removes links to host directories that no snapshot needs. The links of
    /// every snapshot that can be mounted stay, because a caller may have asked
    /// for its mounts before the start and mount them only now.
    fn sweep_lower_links(&self, inventory: &Inventory) -> Result<()> {
        let places = inventory.snapshots.iter().map(|(place, _)| place);
        let mountable: HashSet<_> = places
            .filter(|place| place.kind != Kind::Committed)
            .map(|place| place.id)
            .collect();
        let image = self.volumes.image();
        image.sweep_host_dir_links(|id| mountable.contains(&id))
    }

    /// Reports the layers on a volume whose directory is missing. A hollow layer is not
    /// reported, but replaced by an empty one.
    fn find_lost(&self, dirs: &Arc<Dirs>, inventory: &Inventory, found: &Found) {
        let volume = dirs.volume();
        for (layer, name) in &inventory.snapshots {
            let is_there = found.get(&layer.id) == Some(&FileType::Directory);
            if layer.volume != Some(volume)
                || layer.kind != Kind::Committed
                || is_there
                || self.replace_hollow(dirs, name)
            {
                continue;
            }
            log::error!(
                "layer {} is lost: snapshots/{} is missing on the {volume} volume; `check --heal` \
                 puts it back if containerd still has its content, else remove the containers on \
                 it, remove the images that use it, and pull them again",
                Quoted(name),
                layer.id
            );
            lock(&self.lost).insert(layer.id);
        }
    }

    /// Creates the directories on the image volume that [`Snapshotter::mend_image`] could
    /// not create: the owner of a directory is that of the layer below, which may be on the
    /// writable volume.
    fn make_missing_on_image(&self, inventory: &Inventory) -> Result<()> {
        let mut places = inventory.snapshots.iter().map(|(place, _)| place);
        let is_open =
            |place: &Place| place.volume == Some(Volume::Image) && place.kind != Kind::Committed;
        if places.any(is_open) {
            let image = self.volumes.image().dirs();
            self.make_missing(image, inventory, &entries_of(image)?);
        }
        Ok(())
    }

    /// Creates the missing directories of active snapshots and views, or the missing parts
    /// of them, as after a power cut before they reached the disk.
    fn make_missing(&self, dirs: &Arc<Dirs>, inventory: &Inventory, found: &Found) {
        let volume = dirs.volume();
        for (snapshot, name) in &inventory.snapshots {
            if snapshot.volume != Some(volume) || snapshot.kind == Kind::Committed {
                continue;
            }
            let is_there = found.get(&snapshot.id) == Some(&FileType::Directory);
            let shape = shape_of(snapshot.kind);
            let is_whole = is_there && dirs.is_whole(snapshot.id, shape);
            if is_whole {
                continue;
            }
            // The claim is needed because requests are served by now if the writable volume
            // has answered late.
            let Ok(claim) = self.claim(name) else {
                continue;
            };
            if claim.id != snapshot.id {
                continue;
            }
            let made = self.owner_of(name).and_then(|owner| {
                if is_there {
                    dirs.complete(snapshot.id, shape, owner)
                } else {
                    // A file or a link may have the id as its name.
                    dirs.clear_away(snapshot.id)?;
                    dirs.create(snapshot.id, shape, owner).map(Undo::keep)
                }
            });
            match made {
                Ok(()) => log::warn!(
                    "snapshot {} had no whole directory on the {volume} volume, as after a power \
                     cut: the missing part is empty now",
                    Quoted(name)
                ),
                // The layer below is on the writable volume, which is opened later. The
                // directory is created then.
                Err(error) if error.kind() == ErrorKind::Unavailable => {
                    log::debug!("snapshot {}: {}", Quoted(name), error.chain());
                }
                Err(error) => log::error!(
                    "snapshot {} has no directory, so its container cannot start until a restart \
                     of the daemon has created one: {}",
                    Quoted(name),
                    error.chain()
                ),
            }
        }
    }

    /// Creates an empty layer in place of a missing hollow one, such as Docker's layer
    /// between an image and its container. Returns `false` if the layer was not hollow, or
    /// if this failed.
    fn replace_hollow(&self, dirs: &Arc<Dirs>, name: &str) -> bool {
        let replace = || -> Result<bool> {
            let snapshot = self.store.read()?.stat(name)?;
            if !snapshot.is_hollow() {
                return Ok(false);
            }
            let owner = self.owner_for(None, snapshot.parent_id)?;
            // The content is recorded before the directory is created: after a crash in
            // between, the next start repeats this.
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
            log::warn!(
                "cannot create an empty layer in place of the missing layer {}: {}",
                Quoted(name),
                error.chain()
            );
            false
        })
    }

    fn owner_of(&self, name: &str) -> Result<Owner> {
        let mut snapshot = self.store.read()?.stat(name)?;
        self.leave_out_ignored(&mut snapshot.info);
        let maps = IdMaps::from_labels(&snapshot.info.labels)?;
        if let Some(parent) = snapshot.parent_id
            && let Some(place) = self.store.read()?.place(parent)?
            && place.is_unmoved()
        {
            // The directory of an unmoved layer is reached through a link to the writable
            // volume.
            self.volumes.require_writable()?;
        }
        self.owner_for(maps.as_ref(), snapshot.parent_id)
    }
}

/// Logs the failure of a step that only tidies up. The start has to go on, for example on a
/// full disk, because removals make room.
fn warn_of(what: &str, done: Result<()>) {
    if let Err(error) = done {
        log::warn!(
            "cannot {what}; the next start tries again: {}",
            error.chain()
        );
    }
}
