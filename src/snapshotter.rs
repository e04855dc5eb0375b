//! What each operation does, in which order, and how it is undone.
//!
//! Owns: the order of steps. Never: SQL, system calls, protobuf.
//!
//! The order that holds everywhere: a row speaks only of directories that are
//! there, so directories are made before the row is committed and go to the
//! trash after it has been struck out. A crash in between leaves a directory
//! that no row knows, and [`Snapshotter::recover`] trashes it.

mod labels;
mod place;
mod recover;
mod relocate;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::filter::Filters;
use crate::overlay::{Layout, Plan, plan_mounts};
use crate::store::{Ancestor, Commit, New, Place, Snapshot, Store};
use crate::tree;
use crate::types::{Info, Kind, LABEL_UPPERDIR, Labels, Mount, Quoted, SnapshotId, Usage, Volume};
use crate::volume::{Dirs, Owner, Shape, Volumes};
use labels::IdMaps;
use place::{choose_volume, is_unpack};
pub use relocate::Relocator;

/// When deleted bytes are given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RemovalMode {
    /// By Cleanup; Remove only moves to the trash.
    OnCleanup,
    /// Before Remove answers.
    AtOnce,
}

/// When a layer's data is made durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncMode {
    /// Before its Commit is answered.
    AtCommit,
    /// When the kernel sees fit.
    Never,
}

/// What becomes of layers that were committed on the writable volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Relocation {
    /// They move to the image volume, that long after their commit or later.
    Background {
        /// How long most layers of a build or of Docker's are kept.
        after: Duration,
    },
    /// They stay.
    Never,
}

/// Whether answers carry [`LABEL_UPPERDIR`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UpperdirLabel {
    /// They do.
    Shown,
    /// They do not.
    Hidden,
}

/// What the kernel does with mounts whose ids are to be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdMappedMounts {
    /// It maps them: mounts carry `uidmap=` and `gidmap=`.
    Supported,
    /// It cannot; only a snapshot's own top directory is given its owner.
    Unsupported,
}

/// How a [`Snapshotter`] is to behave.
#[derive(Clone, Debug)]
pub struct Options {
    /// Options of every overlay mount, in order.
    pub mount_options: Vec<String>,
    /// See [`RemovalMode`].
    pub removal: RemovalMode,
    /// See [`SyncMode`].
    pub sync: SyncMode,
    /// See [`Relocation`].
    pub relocation: Relocation,
    /// See [`UpperdirLabel`].
    pub upperdir_label: UpperdirLabel,
    /// See [`IdMappedMounts`].
    pub id_mapped_mounts: IdMappedMounts,
}

/// The ten operations of containerd's snapshots API.
pub struct Snapshotter {
    store: Store,
    volumes: Volumes,
    layout: Layout,
    options: Options,
    /// One cleanup at a time: whoever comes second must not answer before what
    /// the first is still deleting is gone.
    cleaning: Mutex<()>,
    /// Set when a directory without a row may be on a volume: the next Cleanup
    /// looks for it. In order: image, writable.
    strays: [AtomicBool; 2],
    /// One layer moves at a time.
    relocating: Mutex<()>,
    relocator: relocate::Signal,
}

impl Snapshotter {
    /// Puts the parts together. Touches no disk.
    pub fn new(store: Store, volumes: Volumes, options: Options) -> Snapshotter {
        let layout = Layout {
            lowers: volumes.snapshots_path(Volume::Image),
            empty: volumes.image().empty_path(),
            options: options.mount_options.clone(),
        };
        Snapshotter {
            store,
            volumes,
            layout,
            options,
            cleaning: Mutex::new(()),
            strays: [AtomicBool::new(false), AtomicBool::new(false)],
            relocating: Mutex::new(()),
            relocator: relocate::Signal::default(),
        }
    }

    /// The database, for what the daemon does with it at start and stop.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Makes an active snapshot on a committed parent, or on nothing.
    ///
    /// # Errors
    ///
    /// See [`crate::store::Rows::create`]; [`ErrorKind::InvalidArgument`] for a
    /// bad key, label or id mapping; [`ErrorKind::FailedPrecondition`] if the
    /// writable volume is needed and not there; [`ErrorKind::ResourceExhausted`]
    /// if a disk is full. No trace is left of a refused one.
    pub fn prepare(&self, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>> {
        self.create(Kind::Active, key, parent, labels)
            .context(|| format!("prepare snapshot {}", Quoted(key)))
    }

    /// Makes a read-only view of a committed parent, or of nothing.
    ///
    /// # Errors
    ///
    /// As of [`Snapshotter::prepare`].
    pub fn view(&self, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>> {
        self.create(Kind::View, key, parent, labels)
            .context(|| format!("make view {}", Quoted(key)))
    }

    fn create(&self, kind: Kind, key: &str, parent: &str, labels: Labels) -> Result<Vec<Mount>> {
        labels::check_key("key", key)?;
        let labels = labels::check_labels(labels)?;
        let id_maps = IdMaps::from_labels(&labels)?;
        if let Some(maps) = &id_maps {
            maps.root()?;
        }
        let volume = choose_volume(kind, key, &labels)?;
        // A view of a parent is that parent's directories.
        let volume = (kind == Kind::Active || parent.is_empty()).then_some(volume);
        let dirs = volume.map(|volume| self.volumes.open(volume)).transpose()?;
        let needs_home =
            id_maps.is_some() && self.options.id_mapped_mounts == IdMappedMounts::Supported;
        if needs_home && !parent.is_empty() {
            self.bring_home(&self.ancestors_of(parent)?)?;
        }

        let transaction = self.store.write()?;
        let created = transaction.rows().create(&New {
            kind,
            key,
            parent,
            labels: &labels,
            volume,
        })?;
        self.require_present(&created.ancestors)?;
        let new_dirs = match &dirs {
            None => None,
            Some(dirs) => {
                let parent = created.ancestors.first().map(|parent| parent.id);
                let owner = self.owner_for(id_maps.as_ref(), parent)?;
                let shape = match kind {
                    Kind::View => Shape::UpperOnly,
                    Kind::Active | Kind::Committed => Shape::UpperAndWork,
                };
                Some(dirs.create(created.id, shape, owner)?)
            }
        };
        transaction.commit()?;
        if let Some(new_dirs) = new_dirs {
            new_dirs.keep();
        }
        Ok(self.mounts_of(&Mounted {
            kind,
            id: created.id,
            volume,
            ancestors: &created.ancestors,
            over_empty: kind == Kind::Active && is_unpack(key, &labels),
            id_maps,
        }))
    }

    /// Whom a new snapshot's `fs` belongs to: the container's root where its
    /// ids are mapped, else whom the parent's belongs to.
    fn owner_for(&self, maps: Option<&IdMaps>, parent: Option<SnapshotId>) -> Result<Owner> {
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

    /// The mounts of an active snapshot or a view, as when it was made.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::FailedPrecondition`] for a
    /// committed one, or if the writable volume is needed and not there.
    pub fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        self.find_mounts(key)
            .context(|| format!("tell the mounts of snapshot {}", Quoted(key)))
    }

    fn find_mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let reader = self.store.read()?;
        let snapshot = reader.stat(key)?;
        let info = &snapshot.info;
        if info.kind == Kind::Committed {
            return Err(Error::new(
                ErrorKind::FailedPrecondition,
                format!(
                    "snapshot {} is committed: prepare or view a snapshot on it",
                    Quoted(key)
                ),
            ));
        }
        let ancestors = match snapshot.parent_id {
            Some(parent) => reader.chain(parent)?,
            None => Vec::new(),
        };
        if snapshot.volume == Some(Volume::Writable) {
            self.volumes.open(Volume::Writable)?;
        }
        self.require_present(&ancestors)?;
        Ok(self.mounts_of(&Mounted {
            kind: info.kind,
            id: snapshot.id,
            volume: snapshot.volume,
            ancestors: &ancestors,
            over_empty: info.kind == Kind::Active && is_unpack(key, &info.labels),
            id_maps: IdMaps::from_labels(&info.labels)?,
        }))
    }

    /// A layer whose bytes are on the writable volume is reached through a
    /// link; without that volume a mount of it would fail far from here.
    fn require_present(&self, ancestors: &[Ancestor]) -> Result<()> {
        if ancestors
            .iter()
            .any(|ancestor| ancestor.volume == Volume::Writable)
        {
            self.volumes.open(Volume::Writable)?;
        }
        Ok(())
    }

    fn mounts_of(&self, mounted: &Mounted<'_>) -> Vec<Mount> {
        let id_options = match (&mounted.id_maps, self.options.id_mapped_mounts) {
            (Some(maps), IdMappedMounts::Supported) => maps.options(),
            (Some(_), IdMappedMounts::Unsupported) => {
                log::warn!(
                    "snapshot {} asks for mapped ids, which this kernel or file system cannot \
                     give: remove \"remap-ids\" from the capabilities of the proxy plugin",
                    mounted.id
                );
                Vec::new()
            }
            (None, _) => Vec::new(),
        };
        let lowers: Vec<SnapshotId> = mounted.ancestors.iter().map(|layer| layer.id).collect();
        let volume = mounted.volume.unwrap_or(Volume::Image);
        plan_mounts(
            &self.layout,
            &Plan {
                kind: mounted.kind,
                own: &format!("{}/{}", self.volumes.snapshots_path(volume), mounted.id),
                lowers: &lowers,
                over_empty: mounted.over_empty,
                id_options: &id_options,
            },
        )
    }

    /// Turns the active snapshot `key` into the layer `name`; with `parent`,
    /// onto a parent named only now. What it takes does not depend on how many
    /// bytes the snapshot holds, only on how many of them the disk still has to
    /// write: containerd calls this within a transaction of its own.
    ///
    /// # Errors
    ///
    /// See [`crate::store::Rows::committable`];
    /// [`ErrorKind::InvalidArgument`] for a bad name or label;
    /// [`ErrorKind::FailedPrecondition`] if the writable volume is needed and
    /// not there. The snapshot stays as it was then.
    pub fn commit(&self, key: &str, name: &str, parent: &str, labels: Labels) -> Result<()> {
        self.commit_layer(key, name, parent, labels)
            .context(|| format!("commit snapshot {} as {}", Quoted(key), Quoted(name)))
    }

    fn commit_layer(&self, key: &str, name: &str, parent: &str, labels: Labels) -> Result<()> {
        labels::check_key("key", key)?;
        labels::check_key("name", name)?;
        let labels = labels::check_labels(labels)?;
        let (snapshot, _) = self.store.read()?.committable(key, name, parent)?;
        let volume = snapshot
            .volume
            .expect("an active snapshot has a directory, by the schema of create");

        let dirs = self.volumes.open(volume)?;
        let usage = tree::count_usage(dirs.open_upper(snapshot.id)?)?;
        if self.options.sync == SyncMode::AtCommit {
            dirs.sync()?;
        }
        if volume == Volume::Writable {
            self.volumes.link_home(snapshot.id)?;
        }
        let committed = self.enter_layer(&Commit {
            key,
            name,
            parent,
            labels: &labels,
            usage,
        });
        if committed.is_err() && volume == Volume::Writable {
            self.drop_link_unless_committed(snapshot.id, key);
        }
        self.relocator.wake();
        committed
    }

    fn enter_layer(&self, commit: &Commit<'_>) -> Result<()> {
        let transaction = self.store.write()?;
        transaction.rows().commit(commit)?;
        transaction.commit()
    }

    /// After a commit that failed at its last step. Another commit of the same
    /// snapshot may have won meanwhile, and the link is its own then.
    fn drop_link_unless_committed(&self, id: SnapshotId, key: &str) {
        let dropped = self.store.write().and_then(|transaction| {
            let still_active = transaction
                .rows()
                .find(key)?
                .is_some_and(|snapshot| snapshot.id == id && snapshot.info.kind == Kind::Active);
            if still_active {
                self.volumes.image().remove_link(id)?;
            }
            Ok(())
        });
        if let Err(error) = dropped {
            self.note_stray(Volume::Image);
            log::warn!("undo the link of a refused commit: {}", error.chain());
        }
    }

    /// Removes a snapshot that nothing stands on. Its bytes go to the trash.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::FailedPrecondition`] if others
    /// stand on it.
    pub fn remove(&self, key: &str) -> Result<()> {
        self.remove_snapshot(key)
            .context(|| format!("remove snapshot {}", Quoted(key)))
    }

    fn remove_snapshot(&self, key: &str) -> Result<()> {
        labels::check_key("key", key)?;
        let transaction = self.store.write()?;
        let removed = transaction.rows().remove(key)?;
        let released = transaction.rows().release_retired()?;
        transaction.commit()?;

        // The snapshot is gone by now, so what fails here must not be told as
        // if it were not: its bytes are found again by Cleanup.
        if let Some(volume) = removed.volume
            && let Err(error) = self.trash(&removed, volume)
        {
            self.note_stray(volume);
            log::warn!(
                "remove the directory of snapshot {}: {}",
                removed.id,
                error.chain()
            );
        }
        for layer in &released {
            if let Err(error) = self.trash_old(*layer) {
                self.note_stray(Volume::Writable);
                log::warn!("remove what layer {layer} has left: {}", error.chain());
            }
        }
        if self.options.removal == RemovalMode::AtOnce {
            let old = (!released.is_empty()).then_some(Volume::Writable);
            for volume in removed.volume.into_iter().chain(old) {
                if let Err(error) = self.empty_trash(volume) {
                    log::warn!("empty the trash of the {volume} volume: {}", error.chain());
                }
            }
            self.relocator.tell_room();
        }
        self.relocator.wake();
        Ok(())
    }

    fn trash(&self, removed: &Place, volume: Volume) -> Result<()> {
        if volume == Volume::Writable && removed.kind == Kind::Committed {
            let image = self.volumes.image();
            image
                .remove_link(removed.id)
                .inspect_err(|_| self.note_stray(Volume::Image))?;
        }
        self.volumes.open(volume)?.trash(removed.id).map(drop)
    }

    fn trash_old(&self, layer: SnapshotId) -> Result<()> {
        self.volumes.open(Volume::Writable)?.trash(layer).map(drop)
    }

    /// Tells one snapshot.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`].
    pub fn stat(&self, key: &str) -> Result<Info> {
        let snapshot = self
            .store
            .read()
            .and_then(|reader| reader.stat(key))
            .context(|| format!("stat snapshot {}", Quoted(key)))?;
        Ok(self.shown(snapshot))
    }

    /// Changes labels: those that `mask` names to what `given` has, or all.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InvalidArgument`] for a mask that
    /// names anything but labels, or a bad label.
    pub fn update(&self, key: &str, mask: &[String], given: &Labels) -> Result<Info> {
        let update = || {
            let changes = labels::plan_update(mask, given)?;
            let transaction = self.store.write()?;
            let snapshot = transaction.rows().update(key, changes)?;
            transaction.commit().map(|()| snapshot)
        };
        let snapshot = update().context(|| format!("update snapshot {}", Quoted(key)))?;
        Ok(self.shown(snapshot))
    }

    /// Shows `each` snapshot that one of the filters lets through (all of them
    /// without filters), in order of name, as of one moment.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidArgument`] for a filter that does not parse.
    pub fn list(&self, filters: &[String], mut each: impl FnMut(Info)) -> Result<()> {
        let filters = Filters::parse(filters)
            .map_err(|error| Error::caused(ErrorKind::InvalidArgument, "list snapshots", error))?;
        self.store.read()?.list(&filters, |snapshot| {
            each(self.shown(snapshot));
            Ok(())
        })
    }

    fn shown(&self, snapshot: Snapshot) -> Info {
        let mut info = snapshot.info;
        if self.options.upperdir_label == UpperdirLabel::Shown
            && let Some(volume) = snapshot.volume
        {
            // A layer's path stays the same wherever its bytes are.
            let volume = match info.kind {
                Kind::Committed => Volume::Image,
                Kind::Active | Kind::View => volume,
            };
            let path = format!("{}/{}/fs", self.volumes.snapshots_path(volume), snapshot.id);
            info.labels.insert(LABEL_UPPERDIR.to_owned(), path);
        }
        info
    }

    /// What a snapshot itself takes: counted now for an active one, as recorded
    /// by Commit for a layer, nothing for a view.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::FailedPrecondition`] if the
    /// writable volume is needed and not there.
    pub fn usage(&self, key: &str) -> Result<Usage> {
        let usage = || {
            let snapshot = self.store.read()?.stat(key)?;
            match (snapshot.info.kind, snapshot.volume) {
                (Kind::Active, Some(volume)) => {
                    let upper = self.volumes.open(volume)?.open_upper(snapshot.id)?;
                    tree::count_usage(upper)
                }
                _ => Ok(snapshot.usage),
            }
        };
        usage().context(|| format!("count the usage of snapshot {}", Quoted(key)))
    }

    /// Gives back the space of everything removed before this call.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if the writable volume is not there
    /// (the image volume has been cleaned then); [`ErrorKind::Internal`] if
    /// something cannot be deleted.
    pub fn cleanup(&self) -> Result<()> {
        let image = self.empty_trash(Volume::Image);
        self.relocator.tell_room();
        let writable = self.empty_trash(Volume::Writable);
        image.and(writable).context(|| "clean removed snapshots up")
    }

    fn empty_trash(&self, volume: Volume) -> Result<()> {
        let _cleaning = self.cleaning.lock().unwrap_or_else(PoisonError::into_inner);
        let dirs = self.volumes.open(volume)?;
        if self.strays[volume as usize].swap(false, Ordering::AcqRel) {
            self.sweep(&dirs, volume)
                .inspect_err(|_| self.note_stray(volume))?;
        }
        tree::remove_children(dirs.trash_fd())
            .context(|| format!("empty the trash of the {volume} volume"))
    }

    fn note_stray(&self, volume: Volume) {
        self.strays[volume as usize].store(true, Ordering::Release);
    }

    fn sweep(&self, dirs: &Arc<Dirs>, volume: Volume) -> Result<()> {
        let transaction = self.store.write()?;
        let inventory = recover::Inventory::read(&transaction)?;
        recover::trash_strays(dirs, volume, &inventory).map(drop)
    }
}

/// A snapshot about to be shown as mounts.
struct Mounted<'a> {
    kind: Kind,
    id: SnapshotId,
    volume: Option<Volume>,
    ancestors: &'a [Ancestor],
    over_empty: bool,
    id_maps: Option<IdMaps>,
}
