//! Putting an unpacked layer into the place of a damaged or missing one, while no daemon
//! runs.
//!
//! The row, the name, the id and what stands on the layer stay. What a container may have
//! mounted is never changed: the damaged directory is kept, as `.replaced-<id>`, as long as
//! it may be mounted. After a crash the layer is whole or as it was; the next start deletes
//! the other one.

use std::sync::Arc;

use super::Snapshotter;
use super::compare::Unpacking;
use super::in_use::Mounts;
use super::trash::trash_entry;
use crate::error::{Context, Error, Result};
use crate::store::{Snapshot, Transaction};
use crate::tree;
use crate::types::{Quoted, SnapshotId};
use crate::util::fault_point::fault_point;
use crate::volume::{Dirs, is_unpacked, replaced_id};

impl Unpacking<'_> {
    /// Puts the layer that was unpacked last, by [`Unpacking::compare`], into the place of
    /// what is there, durably. Returns the keys of the snapshots upon it that are mounted:
    /// they go on with what they have mounted.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`](crate::error::ErrorKind::FailedPrecondition) if an
    /// earlier directory of the layer is still mounted, or if the file system cannot
    /// exchange two names. The layer is then as it was.
    pub fn heal(&self, layer: &Snapshot) -> Result<Vec<String>> {
        let healing = || format!("heal layer {}", Quoted(&layer.info.name));
        self.put_into_place(layer).context(healing)
    }

    fn put_into_place(&self, layer: &Snapshot) -> Result<Vec<String>> {
        let snapshotter = self.snapshotter;
        let dirs = snapshotter.volumes.image().dirs();
        fault_point("heal-unpacked");
        let counted = tree::count(self.dir()?.open()?)?;
        dirs.sync()?;
        fault_point("heal-durable");
        if !snapshotter.drop_replaced(dirs, layer.id)? {
            return Err(Error::refused(
                "a directory that has been replaced before is still mounted: restart the \
                 containers upon it",
            ));
        }
        if let Err(error) = self.dir()?.put_in_place_of(layer.id) {
            if let Some(copy) = dirs.trash_replaced(layer.id)? {
                snapshotter.trash.delete(dirs, &copy);
            }
            return Err(error);
        }
        fault_point("heal-exchanged");
        snapshotter.relocator.recover_moves()?;
        let record = |rows: &Transaction<'_>| rows.record_content(layer.id, &counted);
        snapshotter.store.together(record)?;
        fault_point("heal-recorded");
        let upon = snapshotter.mounted_upon(layer.id)?;
        snapshotter.drop_replaced(dirs, layer.id)?;
        Ok(upon)
    }

    /// Records what a sound layer holds, if something else is recorded.
    pub fn record_sound(&self, layer: &Snapshot) -> Result<()> {
        let counted = tree::count(self.dir()?.open()?)?;
        let store = &self.snapshotter.store;
        store.together(|rows| rows.record_content(layer.id, &counted))
    }
}

impl Snapshotter {
    /// The keys of the snapshots that are mounted to be written to and stand on a layer.
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

    /// Deletes what has changed places with a layer. `false` if it may be mounted.
    fn drop_replaced(&self, dirs: &Arc<Dirs>, layer: SnapshotId) -> Result<bool> {
        let entries = dirs.entries()?;
        let mut names = entries.iter().map(|entry| entry.name.to_bytes());
        if !names.any(|name| replaced_id(name) == Some(layer)) {
            return Ok(true);
        }
        if Mounts::read(&self.store, &self.volumes)?.may_show_layer(layer) {
            return Ok(false);
        }
        if let Some(name) = dirs.trash_replaced(layer)? {
            self.trash.delete(dirs, &name);
        }
        Ok(true)
    }

    /// At a start: what checks and healing have left goes to the trash, but for damaged
    /// directories that may be mounted, and what a check is working on.
    pub(super) fn drop_leftovers_of_checks(&self, image: &Arc<Dirs>) -> Result<()> {
        for entry in image.entries()? {
            let name = entry.name.to_bytes();
            if is_unpacked(name) {
                if self.volumes.image().trash_abandoned_unpack()? {
                    log::info!("what a check had unpacked was dropped");
                }
            } else if let Some(id) = replaced_id(name) {
                if Mounts::read(&self.store, &self.volumes)?.may_show_layer(id) {
                    log::info!("the damaged directory of layer {id} may be mounted, and is kept");
                } else {
                    trash_entry(image, &entry.name.to_string_lossy())?;
                    log::info!("the damaged directory of layer {id} was dropped");
                }
            }
        }
        Ok(())
    }
}
