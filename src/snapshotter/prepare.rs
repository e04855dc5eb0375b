//! Creating snapshots: Prepare and View.

use std::sync::Arc;

use super::Snapshotter;
use super::first_layers::is_over_empty;
use super::ids::Claim;
use super::label_source::LabelSource;
use super::labels::IdMaps;
use super::mounting::Mounted;
use super::new_snapshot::{NewSnapshot, Purpose};
use super::quotas::{GivenProject, PlannedProject};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::Ancestor;
use crate::types::{Kind, Labels, Limits, Mount, Quoted, SnapshotId, Volume};
use crate::util::undo::Undo;
use crate::volume::{Dirs, Owner, Shape};
use crate::waits::{self, Awaited};

/// How many ids are tried for a new snapshot, if unknown directories have these ids as
/// their names.
const MOST_TAKEN: u32 = 16;

impl Snapshotter {
    /// Creates an active snapshot on a committed parent, or without a parent.
    ///
    /// # Errors
    ///
    /// The errors of [`crate::store::Transaction::create`]; [`ErrorKind::InvalidArgument`]
    /// for a bad key, label, host directory or id mapping;
    /// [`ErrorKind::FailedPrecondition`] if the writable volume is needed and missing, or
    /// cannot enforce the limit; [`ErrorKind::ResourceExhausted`] if a disk is full, or has
    /// less room than the reserve. A refused request leaves no trace.
    pub fn prepare(&self, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>> {
        self.create(Kind::Active, key, parent, labels)
            .context(|| format!("prepare snapshot {}", Quoted(key)))
    }

    /// Creates a read-only view of a committed parent, or of an empty
    /// directory.
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
        self.ignored_labels
            .note(new.label_source, key, &new.ignored);
        let dirs = new.volume.map(|volume| self.open_for_new(volume));
        let dirs = dirs.transpose()?;
        let project = match dirs.as_deref().zip(new.limits) {
            Some((dirs, limits)) => self.plan_project(dirs, limits, new.label_source)?,
            None => None,
        };
        let ancestors = self.ancestors_of(&new)?;
        let id_options = self.id_options(new.id_maps.as_ref(), new.volume, &ancestors)?;
        if !id_options.is_empty() {
            self.relocator.bring_home(&ancestors)?;
        }
        self.require_present(&ancestors)?;
        let host_dirs = self.ensure_host_dirs(key, &new.host_dirs)?;

        let parent_id = ancestors.first().map(|parent| parent.id);
        let owner = match &dirs {
            Some(_) => self.owner_for(new.id_maps.as_ref(), parent_id)?,
            None => Owner { uid: 0, gid: 0 },
        };
        let claim = self.take_id(dirs.as_deref())?;
        let id = claim.id;
        let new_dirs = dirs
            .as_deref()
            .map(|dirs| dirs.create(id, shape_of(kind), owner))
            .transpose()?;
        let new_project = match &project {
            Some(planned) => self.projects.give(planned, id)?,
            None => None,
        };
        let image = self.volumes.image();
        let targets = host_dirs.targets();
        let new_links = match targets.is_empty() {
            true => None,
            false => Some(image.link_host_dirs(id, targets)?),
        };
        let is_unpack = new.purpose == Purpose::Unpack;
        let (created, over_empty) = self.store.together(|transaction| {
            let created = transaction.create(id, &new.row())?;
            if created.ancestors.first().map(|layer| layer.id) != parent_id {
                let what = "another layer has the parent's name by now: try again";
                return Err(Error::new(ErrorKind::Unavailable, what));
            }
            if let Some(given) = &new_project {
                given.record(transaction)?;
            }
            transaction.record_lowers(id, &new.host_dirs.chosen)?;
            let over_empty = is_unpack
                && created.ancestors.is_empty()
                && is_over_empty(transaction, id, &new.labels)?;
            Ok((created, over_empty))
        })?;
        new_links.into_iter().for_each(Undo::keep);
        new_project.into_iter().for_each(GivenProject::keep);
        new_dirs.into_iter().for_each(Undo::keep);
        let extras = image.host_dir_paths(id, targets.len());
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

    /// Opens the volume of a new snapshot.
    fn open_for_new(&self, volume: Volume) -> Result<Arc<Dirs>> {
        waits::enter(Awaited::Volume(volume))?;
        let dirs = self.volumes.open(volume)?;
        if volume == Volume::Writable {
            dirs.require_room(self.options.reserve)?;
        }
        Ok(dirs)
    }

    /// Plans the project of a new snapshot. If limits are not supported, a limit that only
    /// a pod asks for is ignored.
    fn plan_project<'a>(
        &self,
        dirs: &'a Dirs,
        limits: Limits,
        source: LabelSource,
    ) -> Result<Option<PlannedProject<'a>>> {
        match self.projects.plan(dirs, limits) {
            Err(error)
                if source == LabelSource::Pod && error.kind() == ErrorKind::FailedPrecondition =>
            {
                self.projects.plan(dirs, self.options.quota.default)
            }
            planned => planned,
        }
    }

    /// Takes the next id. An id is skipped if the disk already has an entry of that name,
    /// which the next Cleanup sets aside.
    fn take_id(&self, dirs: Option<&Dirs>) -> Result<Claim<'_>> {
        for _ in 0..MOST_TAKEN {
            let claim = self.ids.take(dirs)?;
            let Some(dirs) = dirs else {
                return Ok(claim);
            };
            if !dirs.is_taken(claim.id)? {
                return Ok(claim);
            }
            self.trash.note_stray(dirs.volume());
        }
        Err(Error::refused(format!(
            "directories that no snapshot owns have the {MOST_TAKEN} ids that were to be used \
             next: restart the daemon, which sets them aside"
        )))
    }

    /// The owner of a new snapshot's `fs`: the container's root if its ids are
    /// mapped, otherwise the owner of the parent's `fs`.
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

    /// The layers below a new snapshot, nearest first, before the snapshot is entered.
    fn ancestors_of(&self, new: &NewSnapshot<'_>) -> Result<Vec<Ancestor>> {
        let reader = self.store.read()?;
        reader.at_one_moment(|| reader.ancestors_of_new(&new.row()))
    }
}

/// The parts of the directory of a snapshot that is not a layer.
pub(super) fn shape_of(kind: Kind) -> Shape {
    match kind {
        Kind::View => Shape::UpperOnly,
        Kind::Active | Kind::Committed => Shape::UpperAndWork,
    }
}
