//! The mounts of a snapshot: what the database records for them, what has to be done before
//! a snapshot is mounted, and how the mounts are composed.

use super::first_layers::is_stored_over_empty;
use super::labels::IdMaps;
use super::{Snapshotter, in_use};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Context, Error, Result};
use crate::mount::overlay::{Plan, plan_mounts};
use crate::store::{Ancestor, Snapshot};
use crate::types::{Kind, LABEL_LOWERS, Mount, Quoted, SnapshotId, Volume};
use crate::util::lock::lock;
use crate::waits::{self, Awaited};

/// A snapshot, with everything that its mounts are composed of.
pub(super) struct Mounted<'a> {
    pub kind: Kind,
    pub id: SnapshotId,
    pub volume: Option<Volume>,
    pub ancestors: &'a [Ancestor],
    pub extras: &'a [String],
    pub over_empty: bool,
    pub id_options: &'a [String],
}

/// What the database records of an existing snapshot.
pub(super) struct Stored {
    snapshot: Snapshot,
    ancestors: Vec<Ancestor>,
    /// The recorded host directories, as returned by [`crate::store::Rows::chosen_lowers`].
    chosen: Option<String>,
    over_empty: bool,
    /// Whether the snapshot has, or may have, limits that are enforced.
    is_limited: bool,
}

impl Stored {
    /// Whether the snapshot can be mounted only with the writable volume.
    fn needs_writable(&self) -> bool {
        self.snapshot.volume == Some(Volume::Writable) || stand_on_writable(&self.ancestors)
    }

    pub(super) fn may_have_host_directories(&self) -> bool {
        self.chosen.is_some() || self.snapshot.info.labels.contains_key(LABEL_LOWERS)
    }
}

impl Snapshotter {
    /// The mounts of an active snapshot or a view, the same as when it was
    /// created.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::FailedPrecondition`] for a committed snapshot,
    /// for one that a person has mounted to write to it, if the writable volume is needed
    /// and missing, or if the ids of the snapshot cannot be mapped; for its host
    /// directories the errors of [`crate::host_dirs::Policy::ensure`].
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        self.find_mounts(key)
            .context(|| format!("return the mounts of snapshot {}", Quoted(key)))
    }

    /// The mounts of an active snapshot or a view, if they can be returned without waiting
    /// for a disk other than the database's. Returns `None` if another disk has to be
    /// asked, or if something has to be done before the mount.
    pub fn mounts_at_once(&self, key: &str) -> Result<Option<Vec<Mount>>> {
        self.find_mounts_at_once(key)
            .context(|| format!("return the mounts of snapshot {}", Quoted(key)))
    }

    fn find_mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let stored = self.stored(key)?;
        let (id, info) = (stored.snapshot.id, &stored.snapshot.info);
        if stored.needs_writable() {
            waits::enter(Awaited::Volume(Volume::Writable))?;
            self.volumes.require_writable()?;
        }
        in_use::require_not_by_hand(&self.store, &self.volumes, id)?;
        self.links
            .require(stored.ancestors.iter().map(|layer| layer.id))?;
        self.require_not_lost(&stored.ancestors)?;
        let id_maps = IdMaps::from_labels(&info.labels)?;
        let chosen = stored.chosen.as_deref();
        let volume = stored.snapshot.volume;
        let id_options = self.id_options(id_maps.as_ref(), volume, &stored.ancestors)?;
        let extras = self.renew_lowers(&stored.snapshot, chosen, id_maps.as_ref())?;
        if stored.is_limited {
            self.projects.lend_room(id);
        }
        Ok(self.stored_mounts(&stored, &extras, &id_options))
    }

    fn find_mounts_at_once(&self, key: &str) -> Result<Option<Vec<Mount>>> {
        let stored = self.stored(key)?;
        let id_maps = IdMaps::from_labels(&stored.snapshot.info.labels)?;
        let is_plain = !stored.may_have_host_directories()
            && !stored.is_limited
            && id_maps.is_none()
            && self.links.are_made(&stored.ancestors)
            && lock(&self.lost).is_empty();
        let is_ready = is_plain
            && (!stored.needs_writable() || self.volumes.is_writable_there_for_sure())
            && self.volumes.image().is_plain_for_sure(stored.snapshot.id);
        Ok(is_ready.then(|| self.stored_mounts(&stored, &[], &[])))
    }

    pub(super) fn stored(&self, key: &str) -> Result<Stored> {
        let reader = self.store.read()?;
        reader.at_one_moment(|| {
            let mut snapshot = reader.stat(key)?;
            self.leave_out_ignored(&mut snapshot.info);
            if snapshot.info.kind == Kind::Committed {
                return Err(Error::refused(format!(
                    "snapshot {} is committed: prepare or view a snapshot on it",
                    Quoted(key)
                )));
            }
            let parent = snapshot.parent_id;
            Ok(Stored {
                ancestors: parent.map_or(Ok(Vec::new()), |parent| reader.chain(parent))?,
                chosen: reader.chosen_lowers(snapshot.id)?,
                is_limited: self.projects.is_limited(&reader, &snapshot),
                over_empty: is_stored_over_empty(&reader, &snapshot)?,
                snapshot,
            })
        })
    }

    /// Returns an error if a layer cannot be mounted: an unmoved layer while the writable
    /// volume is missing, or a lost layer that is still missing. Otherwise the mount would
    /// fail in another program, where the reason is hard to find.
    pub(super) fn require_present(&self, ancestors: &[Ancestor]) -> Result<()> {
        if stand_on_writable(ancestors) {
            waits::enter(Awaited::Volume(Volume::Writable))?;
            self.volumes.require_writable()?;
            self.links.require(ancestors.iter().map(|layer| layer.id))?;
        }
        self.require_not_lost(ancestors)
    }

    fn require_not_lost(&self, ancestors: &[Ancestor]) -> Result<()> {
        let lost = |id: &SnapshotId| lock(&self.lost).contains(id);
        for id in ancestors.iter().map(|layer| layer.id).filter(lost) {
            self.volumes.image().layer_owner(id)?;
        }
        Ok(())
    }

    fn stored_mounts(
        &self,
        stored: &Stored,
        extras: &[String],
        id_options: &[String],
    ) -> Vec<Mount> {
        let info = &stored.snapshot.info;
        self.mounts_of(&Mounted {
            kind: info.kind,
            id: stored.snapshot.id,
            volume: stored.snapshot.volume,
            ancestors: &stored.ancestors,
            extras,
            over_empty: stored.over_empty,
            id_options,
        })
    }

    pub(super) fn mounts_of(&self, mounted: &Mounted<'_>) -> Vec<Mount> {
        let layer_path = |layer: &Ancestor| self.volumes.image().layer_path(layer.id);
        let lowers: Vec<_> = mounted.ancestors.iter().map(layer_path).collect();
        let volume = mounted.volume.unwrap_or(Volume::Image);
        let has_host_dirs = !mounted.extras.is_empty();
        // BuildKit merges layers for `COPY --link` from views, and fails at a view with
        // an option that it does not know (util/overlay, `GetOverlayLayers`), such as
        // `xino=auto`.
        let options = if mounted.kind == Kind::View && !has_host_dirs {
            self.options.view_options()
        } else {
            self.overlay_options(mounted.volume, mounted.ancestors, has_host_dirs)
        };
        plan_mounts(&Plan {
            kind: mounted.kind,
            own: &self.volumes.snapshot_paths(volume, mounted.id),
            lowers: &lowers,
            host_dirs: mounted.extras,
            empty: &self.volumes.image().empty_path(),
            over_empty: mounted.over_empty,
            options: &options,
            id_options: mounted.id_options,
        })
    }

    /// The options of an overlay on these layers. `own` is the volume of its upper
    /// directory.
    pub(super) fn overlay_options(
        &self,
        own: Option<Volume>,
        layers: &[Ancestor],
        has_host_dirs: bool,
    ) -> Vec<String> {
        let mut lowers = layers.iter().map(|layer| layer.volume);
        // Without layers, the lower directory is the empty one, which is on the
        // image volume.
        let first = lowers.next().unwrap_or(Volume::Image);
        let is_split = lowers.chain(own).any(|volume| volume != first);
        let spans = has_host_dirs || (is_split && self.volumes.are_on_two_file_systems());
        self.options.overlay_options(spans)
    }
}

fn stand_on_writable(ancestors: &[Ancestor]) -> bool {
    let mut volumes = ancestors.iter().map(|ancestor| ancestor.volume);
    volumes.any(|volume| volume == Volume::Writable)
}
