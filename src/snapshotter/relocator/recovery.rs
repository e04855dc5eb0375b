//! Layers that the database records on the writable volume, although the image volume has a
//! directory with their id.
//!
//! A directory with a layer's id is not proof that the layer has moved: the disk may have
//! been used with another database, which has given out the same ids. The proof is the link
//! that the exchange leaves under another name. Without that link, or if a volume has
//! another history than the database, the directory counts as the layer only if the layer
//! is nowhere else and the directory holds as much as was recorded at the commit. In that
//! case nothing is deleted. Every other directory is set aside.

use std::sync::Arc;

use rustix::fs::FileType;

use super::{Relocator, boot_id};
use crate::error::{ErrorKind, Result};
use crate::snapshotter::inspect::inspect_layer;
use crate::snapshotter::problem::Problem;
use crate::store::{DataBytes, Snapshot};
use crate::types::{History, Quoted, SnapshotId, Volume};
use crate::volume::Dirs;

/// The kinds of directories on the image volume that have the id of an unmoved layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::snapshotter) enum Namesake {
    /// The directory is the layer: a move or a healing has put it there.
    Moved,
    /// The directory counts as the layer: it holds as much as was recorded, and the layer
    /// is nowhere else.
    OnlyOne,
    /// The directory is not the layer.
    Other,
}

impl Relocator {
    /// At a start, before strays are looked for: records moves whose exchange has happened,
    /// and forgets leftover directories of an earlier boot, which nothing has mounted any
    /// more.
    pub(in crate::snapshotter) fn recover_moves(&self) -> Result<()> {
        let image = self.volumes.image();
        for away in self.store.read()?.away()? {
            let is_there = match image.layer_entry(away.id)? {
                Some(FileType::Directory) => true,
                _ => self.finish_rename(away.id)?,
            };
            if !is_there {
                continue;
            }
            // If the writable volume answers late, requests are served by now, and may
            // remove the layer.
            let _claim = self.ids.claim(away.id);
            if !self.is_unmoved(away.id)? {
                continue;
            }
            let layer = self.store.read()?.stat(&away.name)?;
            match self.judge_namesake(&layer)? {
                Namesake::Moved => self.record_exchanged(away.id)?,
                Namesake::OnlyOne => {
                    image.dirs().settle_names()?;
                    self.store
                        .together(|transaction| transaction.record_home(away.id))?;
                }
                Namesake::Other => {
                    self.set_aside(&layer)?;
                    continue;
                }
            }
            log::info!(
                "recorded that layer {} has moved to the image volume before this start",
                Quoted(&away.name)
            );
        }
        self.forget_earlier_boots()
    }

    /// Judges the directory on the image volume that has the id of this unmoved layer.
    pub(in crate::snapshotter) fn judge_namesake(&self, layer: &Snapshot) -> Result<Namesake> {
        let image = self.volumes.image();
        if image.has_exchanged_link(layer.id)? && self.has_same_history()? {
            return Ok(Namesake::Moved);
        }
        let Ok(writable) = self.volumes.open(Volume::Writable) else {
            return Ok(Namesake::Other);
        };
        let find = |dirs: &Arc<Dirs>| inspect_layer(dirs, layer, true, false);
        let is_lost = matches!(
            find(&writable)?,
            Some(
                Problem::LayerMissing | Problem::HollowLayerMissing | Problem::LayerDamaged { .. }
            )
        );
        let is_counted = matches!(layer.data_bytes, DataBytes::Counted(_));
        match is_lost && is_counted && find(image.dirs())?.is_none() {
            true => Ok(Namesake::OnlyOne),
            false => Ok(Namesake::Other),
        }
    }

    /// Whether both volumes were last used with this database. A missing volume does not
    /// count.
    fn has_same_history(&self) -> Result<bool> {
        for volume in [Volume::Image, Volume::Writable] {
            let Ok(dirs) = self.volumes.open(volume) else {
                continue;
            };
            let block = match dirs.newest_block() {
                Err(error) if error.kind() == ErrorKind::DataLoss => return Ok(false),
                block => block?,
            };
            if self.store.read()?.judge(volume, block.as_ref())? != History::Same {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Sets aside a directory that has the id of a layer but is not the layer, and links
    /// the layer again.
    fn set_aside(&self, layer: &Snapshot) -> Result<()> {
        if let Some(path) = self.volumes.image().dirs().clear_away(layer.id)? {
            log::warn!(
                "image volume: snapshots/{} has the id of layer {}, which is on the writable \
                 volume, and is not that layer: it is set aside as {path}; delete it there if you \
                 do not need it",
                layer.id,
                Quoted(&layer.info.name)
            );
        }
        self.volumes.link_home(layer.id)
    }

    fn forget_earlier_boots(&self) -> Result<()> {
        let boot_id = boot_id()?;
        let mut leftover = self.store.read()?.retired()?;
        leftover.retain(|leftover| leftover.boot_id != boot_id);
        if leftover.is_empty() {
            return Ok(());
        }
        self.store.together(|transaction| {
            leftover
                .iter()
                .try_for_each(|leftover| transaction.forget_retired(leftover.id))
        })
    }

    /// Finishes a move by [`Relocator::rename_home`] after a crash between its two renames,
    /// when the layer exists only as `.moving-<id>`.
    fn finish_rename(&self, id: SnapshotId) -> Result<bool> {
        let image = self.volumes.image();
        let Ok(writable) = self.volumes.open(Volume::Writable) else {
            return Ok(false);
        };
        match writable.open_snapshot(id) {
            Ok(_) => return Ok(false),
            Err(error) if error.kind() == ErrorKind::DataLoss => {}
            Err(error) => return Err(error),
        }
        if !image.is_renamed_layer(id)? {
            return Ok(false);
        }
        // The layer's id is the name of a link, or of nothing after a power cut. In both
        // cases a link is created first, so that there is an entry to exchange.
        self.volumes.link_home(id)?;
        image.exchange(id)?;
        Ok(true)
    }
}
