//! Replacing a damaged or missing layer by one that was unpacked again. The `check` command
//! does this while no daemon runs; otherwise the daemon does.
//!
//! The row, the name and the id of the layer stay, and so does everything that stands on
//! it. Files that a container may have mounted are never changed: the damaged directory is
//! kept, as `.replaced-<id>`, as long as it may be mounted. After a crash, the layer is
//! either healed or as it was, and the next start deletes the other directory.

use std::sync::Arc;

use super::Snapshotter;
use super::compare::Unpacking;
use super::in_use::Mounts;
use super::trash::trash_entry;
use crate::error::{Context, Error, Result};
use crate::store::{Snapshot, Transaction};
use crate::tree;
use crate::types::{Kind, Quoted, SnapshotId, Volume};
use crate::util::fault_point::{fault_point, is_left_out};
use crate::util::lock::lock;
use crate::volume::{Dirs, is_handed_over, is_unpacked, replaced_id};

impl Unpacking<'_> {
    /// Renames the layer that [`Unpacking::compare`] has unpacked last, for
    /// [`Snapshotter::heal_layer`]. Returns the new name.
    pub fn hand_over(&self) -> Result<String> {
        fault_point("heal-unpacked");
        let name = self.dir()?.hand_over()?;
        fault_point("heal-handed-over");
        Ok(name)
    }
}

impl Snapshotter {
    /// Replaces the layer `name` durably by the directory `unpacked`, a name from
    /// [`Unpacking::hand_over`]. Returns the keys of the mounted snapshots on the layer:
    /// their containers see the damaged files until they are restarted.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`](crate::error::ErrorKind::FailedPrecondition) if
    /// the layer has healed before, and the directory that was replaced then is still
    /// mounted, or if the file system cannot exchange two names. The layer is then as it
    /// was, and the unpacked one is deleted.
    pub fn heal_layer(&self, name: &str, id: SnapshotId, unpacked: &str) -> Result<Vec<String>> {
        let healed = self.put_into_place(name, id, unpacked);
        if healed.is_err() && is_handed_over(unpacked.as_bytes()) {
            let dirs = self.volumes.image().dirs();
            if let Some(copy) = dirs.trash_entry(unpacked)? {
                self.trash.delete(dirs, &copy);
            }
        }
        healed.context(|| format!("heal layer {}", Quoted(name)))
    }

    fn put_into_place(&self, name: &str, id: SnapshotId, unpacked: &str) -> Result<Vec<String>> {
        let image = self.volumes.image();
        let dirs = image.dirs();
        let counted = tree::count_layer(image.open_handed_over(unpacked)?)?;
        if !is_left_out("heal") {
            self.flusher.flush(dirs)?;
        }
        fault_point("heal-durable");
        let layer = self.require_layer(name, id)?;
        let moving = layer
            .place()
            .is_unmoved()
            .then(|| self.relocator.stop_moves());
        self.ids.begin_on(dirs)?;
        let claim = self.ids.claim(id);
        let layer = self.require_layer(name, id)?;
        if !self.drop_replaced(dirs, id)? {
            return Err(Error::refused(
                "the layer has healed before, and the directory that was replaced then is still \
                 mounted: restart the containers on this layer, then run `check --heal` again",
            ));
        }
        image.put_in_place(unpacked, id)?;
        fault_point("heal-exchanged");
        if layer.place().is_unmoved() {
            self.relocator.record_exchanged(id)?;
        }
        let record = |rows: &Transaction<'_>| rows.record_content(id, &counted);
        self.store.together(record)?;
        fault_point("heal-recorded");
        lock(&self.lost).remove(&id);
        self.relocator.note_replaced(id);
        drop((claim, moving));
        log::info!(
            "layer {} has healed: it was unpacked again from containerd's content",
            Quoted(name)
        );
        self.mounted_upon(id)
    }

    /// Deletes the damaged directories that healed layers have replaced, unless they may
    /// be mounted. In the daemon, the relocator's thread does this.
    pub fn drop_damaged(&self) -> Result<()> {
        let dirs = self.volumes.image().dirs();
        for entry in dirs.entries()? {
            if let Some(id) = replaced_id(entry.name.to_bytes()) {
                self.drop_replaced(dirs, id)?;
            }
        }
        Ok(())
    }

    /// Records how much a sound layer holds, and its digest.
    pub fn record_sound(&self, name: &str, id: SnapshotId, digest: &str) -> Result<()> {
        let layer = self.require_layer(name, id)?;
        let volume = layer.volume.unwrap_or(Volume::Image);
        let counted = tree::count_layer(self.volumes.open(volume)?.open_upper(id)?)?;
        self.store.together(|rows| {
            rows.record_content(id, &counted)?;
            rows.record_digest(id, digest)
        })
    }

    fn require_layer(&self, name: &str, id: SnapshotId) -> Result<Snapshot> {
        let layer = self.store.read()?.stat(name)?;
        match layer.id == id && layer.info.kind == Kind::Committed {
            true => Ok(layer),
            false => Err(Error::refused(
                "the layer was removed, and another snapshot has its name now: check again",
            )),
        }
    }

    /// The keys of the snapshots that stand on a layer and are mounted for writing.
    fn mounted_upon(&self, layer: SnapshotId) -> Result<Vec<String>> {
        let writers = Mounts::read(&self.store, &self.volumes)?.writers();
        let reader = self.store.read()?;
        let mut upon = Vec::new();
        for snapshot in self.all_snapshots()? {
            if writers.contains(&snapshot.id)
                && reader
                    .chain(snapshot.id)?
                    .iter()
                    .any(|below| below.id == layer)
            {
                upon.push(snapshot.info.name);
            }
        }
        Ok(upon)
    }

    /// Deletes the damaged directory that a layer has replaced. Returns `false` if
    /// it may be mounted.
    fn drop_replaced(&self, dirs: &Arc<Dirs>, layer: SnapshotId) -> Result<bool> {
        if !self.volumes.image().has_replaced(layer)? {
            return Ok(true);
        }
        if Mounts::read(&self.store, &self.volumes)?.may_show_replaced(layer) {
            return Ok(false);
        }
        if let Some(name) = dirs.trash_replaced(layer)? {
            self.trash.delete(dirs, &name);
        }
        Ok(true)
    }

    /// At a start, moves to the trash what checks and healing have left in `snapshots/`.
    /// Damaged directories that may be mounted stay, and so do directories of a check that
    /// is running.
    pub(super) fn drop_leftovers_of_checks(&self, image: &Arc<Dirs>) -> Result<()> {
        for entry in image.entries()? {
            let name = entry.name.to_bytes();
            if is_unpacked(name) {
                if self.volumes.image().trash_abandoned_unpack()? {
                    log::info!(
                        "image volume: moved to the trash what an interrupted check had unpacked"
                    );
                }
            } else if is_handed_over(name) {
                trash_entry(image, &entry.name.to_string_lossy())?;
                log::info!(
                    "image volume: moved to the trash a layer that an interrupted `check --heal` \
                     had unpacked, and not put into place"
                );
            } else if let Some(id) = replaced_id(name) {
                if Mounts::read(&self.store, &self.volumes)?.may_show_replaced(id) {
                    self.relocator.note_replaced(id);
                    log::info!(
                        "image volume: layer {id} has healed; its former, damaged directory stays \
                         as long as it may be mounted"
                    );
                } else {
                    trash_entry(image, &entry.name.to_string_lossy())?;
                    log::info!(
                        "image volume: layer {id} has healed; moved its former, damaged directory \
                         to the trash"
                    );
                }
            }
        }
        Ok(())
    }
}
