//! Mount options for containers whose ids are mapped.

use std::path::Path;
use std::sync::OnceLock;

use super::Snapshotter;
use super::labels::IdMaps;
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Context, Result};
use crate::mount::{self, mountinfo};
use crate::store::Ancestor;
use crate::types::Volume;

/// Remembers for each volume that the kernel can map the ids of mounts there. The kernel is
/// asked at the first use, because few containers need this, and the answer takes longer
/// than everything else at a start.
#[derive(Default)]
pub(super) struct MappedIds {
    image: OnceLock<()>,
    writable: OnceLock<()>,
}

impl Snapshotter {
    /// Returns the options `uidmap=` and `gidmap=` for a snapshot on these layers, whose
    /// own directory is on `volume`. There are none for a snapshot whose ids are not
    /// mapped, or for one on a layer whose files containerd has given the mapped owners
    /// already: their ids would be mapped twice.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if the kernel cannot map ids on the volume that is
    /// to be mapped.
    pub(super) fn id_options(
        &self,
        maps: Option<&IdMaps>,
        volume: Option<Volume>,
        layers: &[Ancestor],
    ) -> Result<Vec<String>> {
        let Some(maps) = maps else {
            return Ok(Vec::new());
        };
        if layers.iter().any(|layer| layer.is_remapped) {
            return Ok(Vec::new());
        }
        // Layers are mapped through their paths on the image volume. Without layers,
        // the snapshot's own directory is mapped.
        let mapped = match (layers, volume) {
            ([], Some(volume)) => volume,
            _ => Volume::Image,
        };
        self.require_mapped_ids(mapped)?;
        Ok(maps.options())
    }

    /// Returns an error if the kernel cannot map ids on that volume. Only success is
    /// remembered, because the next try after a failure may succeed.
    fn require_mapped_ids(&self, volume: Volume) -> Result<()> {
        let known = match volume {
            Volume::Image => &self.mapped_ids.image,
            Volume::Writable => &self.mapped_ids.writable,
        };
        if known.get().is_some() {
            return Ok(());
        }
        let path = self.volumes.snapshots_path(volume);
        mount::probe_idmapped_mounts(Path::new(&path)).context(|| {
            let mounted = mountinfo::of_path(&path).ok().flatten();
            let file_system = mounted.map_or_else(String::new, |mounted| mounted.file_system);
            format!(
                "the snapshot's labels ask for mapped ids, but Linux {} could not map ids on the \
                 {volume} volume {path} ({file_system}). Mapped ids need Linux 5.19 or later with \
                 ext4, XFS, btrfs or tmpfs there; on a machine without these, leave \"remap-ids\" \
                 out of the capabilities of the proxy plugin",
                mount::kernel_release()
            )
        })?;
        let _ = known.set(());
        Ok(())
    }
}
