//! Making a snapshot: Prepare and View.

use super::Snapshotter;
use super::first_layers::is_over_empty;
use super::labels::IdMaps;
use super::mounting::Mounted;
use super::new_snapshot::{NewSnapshot, Purpose};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Context, Result};
use crate::store::{Ancestor, Created};
use crate::types::{Kind, Labels, Mount, Quoted, SnapshotId, Volume};
use crate::util::undo::Undo;
use crate::volume::{Dirs, Owner, Shape};

impl Snapshotter {
    /// Makes an active snapshot on a committed parent, or on nothing.
    ///
    /// # Errors
    ///
    /// See [`crate::store::Transaction::create`]; [`ErrorKind::InvalidArgument`] for a
    /// bad key, label, host directory or id mapping; [`ErrorKind::FailedPrecondition`] if the
    /// writable volume is needed and not there, or cannot keep the limit that is
    /// asked for; [`ErrorKind::ResourceExhausted`] if a disk is full, or has less room than the reserve. No trace is left of a refused one.
    pub fn prepare(&self, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>> {
        self.create(Kind::Active, key, parent, labels)
            .context(|| format!("prepare snapshot {}", Quoted(key)))
    }

    /// Makes a read-only view of a committed parent, or of nothing.
    pub fn view(&self, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>> {
        self.create(Kind::View, key, parent, labels)
            .context(|| format!("make view {}", Quoted(key)))
    }

    fn create(&self, kind: Kind, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>> {
        let parent_labels = || {
            let parent = self.store.read()?.find(parent)?;
            Ok(parent.map(|layer| layer.info.labels))
        };
        let new = NewSnapshot::plan(kind, key, parent, labels, &self.options, parent_labels)?;
        log::debug!(
            "new {}: for {:?}, labels from {:?}",
            Quoted(key),
            new.purpose,
            new.label_source
        );
        let dirs = new.volume.map(|volume| self.volumes.open(volume));
        let dirs = dirs.transpose()?;
        if let (Some(Volume::Writable), Some(dirs)) = (new.volume, &dirs) {
            dirs.require_room(self.options.reserve)?;
        }
        let project = match dirs.as_deref().zip(new.limits) {
            Some((dirs, limits)) => self.projects.plan(dirs, limits)?,
            None => None,
        };
        let layers = match new.id_maps {
            Some(_) => self.ancestors_of(parent)?,
            None => Vec::new(),
        };
        let id_options = self.id_options(new.id_maps.as_ref(), new.volume, &layers)?;
        if !id_options.is_empty() {
            self.relocator.bring_home(&layers)?;
        }
        // Before the writer's lock: the disk they are on may be slow, or gone.
        let host_dirs = self.options.lowers.ensure(&new.host_dirs.all())?;

        let image = self.volumes.image();
        let is_unpack = new.purpose == Purpose::Unpack;
        let made = self.store.together(|transaction| {
            let created = transaction.create(&new.row())?;
            self.require_present(&created.ancestors)?;
            let new_dirs = match &dirs {
                Some(dirs) => Some(self.make_directory(dirs, &new, &created)?),
                None => None,
            };
            let new_project = match &project {
                Some(planned) => self.projects.give(transaction, planned, created.id)?,
                None => None,
            };
            let new_links = image.link_host_dirs(created.id, host_dirs.targets())?;
            transaction.record_lowers(created.id, &new.host_dirs.chosen)?;
            let over_empty = is_unpack
                && parent.is_empty()
                && is_over_empty(transaction, created.id, &new.labels)?;
            Ok((new_links, new_project, new_dirs, created, over_empty))
        })?;
        let (new_links, new_project, new_dirs, created, over_empty) = made;
        new_links.keep();
        new_project.into_iter().for_each(Undo::keep);
        new_dirs.into_iter().for_each(Undo::keep);
        let extras = image.host_dir_paths(created.id, host_dirs.targets().len());
        host_dirs.keep();
        if is_unpack && new.volume == Some(Volume::Image) {
            self.flusher.begin_unpack(created.id);
        }
        Ok(self.mounts_of(&Mounted {
            kind,
            id: created.id,
            volume: new.volume,
            ancestors: &created.ancestors,
            extras: &extras,
            over_empty,
            id_options: &id_options,
        }))
    }

    fn make_directory<'a>(
        &self,
        dirs: &'a Dirs,
        new: &NewSnapshot<'_>,
        created: &Created,
    ) -> Result<Undo<impl FnOnce() -> Result<()> + use<'a>>> {
        let parent = created.ancestors.first().map(|parent| parent.id);
        let owner = self.owner_for(new.id_maps.as_ref(), parent)?;
        dirs.create(created.id, shape_of(new.kind), owner)
    }

    /// The owner of a new snapshot's `fs`: the container's root where its ids are
    /// mapped, else the owner of the parent's.
    pub(super) fn owner_for(
        &self,
        maps: Option<&IdMaps>,
        parent: Option<SnapshotId>,
    ) -> Result<Owner> {
        match (maps, parent) {
            (Some(maps), _) => maps.root(),
            (None, Some(parent)) => self.volumes.image().layer_owner(parent),
            (None, None) => Ok(Owner { uid: 0, gid: 0 }),
        }
    }

    /// The layers from that one downwards; none if there is no such layer,
    /// which the store then refuses.
    fn ancestors_of(&self, parent: &str) -> Result<Vec<Ancestor>> {
        let reader = self.store.read()?;
        match reader.find(parent)? {
            Some(layer) if layer.info.kind == Kind::Committed => reader.chain(layer.id),
            _ => Ok(Vec::new()),
        }
    }
}

/// What the directory of a snapshot that is no layer holds.
pub(super) fn shape_of(kind: Kind) -> Shape {
    match kind {
        Kind::View => Shape::UpperOnly,
        Kind::Active | Kind::Committed => Shape::UpperAndWork,
    }
}
