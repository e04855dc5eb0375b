//! What each operation does, in which order, and how it is undone.
//!
//! Owns: the order of steps. Never: SQL, system calls, protobuf.
//!
//! The order that holds everywhere: a row speaks only of directories that are
//! there, so directories are made before the row is committed and go to the
//! trash after it has been struck out. A crash in between leaves a directory
//! that no row knows, and [`Snapshotter::recover`] trashes it.

mod by_hand;
mod commit;
mod flush;
mod host_dirs;
mod inspect;
mod labels;
pub mod limits;
mod mounting;
mod options;
mod place;
mod problem;
mod quotas;
mod recover;
mod relocate;
mod removal;
mod repair;
mod stats;
mod usage;

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, Once, OnceLock};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::mount;
use crate::mount::overlay::Layout;
use crate::store::{Ancestor, New, Snapshot, Store};
use crate::text::filter::Filters;
use crate::types::{
    Info, Kind, LABEL_UPPERDIR, Labels, Mount, ProjectId, Quoted, SnapshotId, Volume,
};
use crate::volume::{NewDirs, Owner, Shape, Volumes};
pub use by_hand::Rescue;
pub use inspect::Inspection;
use labels::IdMaps;
use mounting::Mounted;
pub use options::{
    Options, QuotaMode, QuotaOptions, Relocation, RemovalMode, SyncMode, UpperdirLabel,
};
use place::{choose_volume, is_unpack};
pub use problem::{Finding, Problem, Recorded};
use quotas::NewProject;
pub use stats::{Figures, VolumeFigures, Written};
pub use usage::{Caller, UsageFigures};

/// What the kernel does with mounts whose ids are to be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IdMappedMounts {
    /// It maps them: mounts carry `uidmap=` and `gidmap=`.
    Supported,
    /// It cannot; only a snapshot's own top directory is given its owner.
    Unsupported,
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
    /// Snapshots up to these ids may have lost data to a failing disk, in the
    /// order of `strays`.
    suspect_up_to: [AtomicU64; 2],
    syncing: [Mutex<()>; 2],
    /// On the image volume, since the start.
    unpacks: flush::Unpacks,
    /// Set once, when the daemon stops: long work ends early.
    stopping: AtomicBool,
    /// One layer moves at a time.
    relocating: Mutex<()>,
    relocator: relocate::Signal,
    relocated: stats::Relocated,
    /// Layers that the start has missed. Ids are never given out again.
    lost: OnceLock<HashSet<SnapshotId>>,
    /// Asked of the kernel when it is first needed: few need it, and the answer
    /// takes longer than everything else at a start.
    id_mapped_mounts: OnceLock<IdMappedMounts>,
    /// The project id given out last, of which the next is looked for.
    last_project: Mutex<Option<ProjectId>>,
    uncharged: quotas::Uncharged,
    loans: quotas::Loans,
    /// That they fail where they could be done without is told once.
    broken_quotas: Once,
    walks: usage::Walks,
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
            suspect_up_to: [AtomicU64::new(0), AtomicU64::new(0)],
            syncing: [Mutex::new(()), Mutex::new(())],
            unpacks: flush::Unpacks::default(),
            stopping: AtomicBool::new(false),
            relocating: Mutex::new(()),
            relocator: relocate::Signal::default(),
            relocated: stats::Relocated::default(),
            lost: OnceLock::new(),
            id_mapped_mounts: OnceLock::new(),
            last_project: Mutex::new(None),
            uncharged: quotas::Uncharged::default(),
            loans: quotas::Loans::default(),
            broken_quotas: Once::new(),
            walks: usage::Walks::default(),
        }
    }

    /// The database, for what the daemon does with it at start and stop.
    pub fn store(&self) -> &Store {
        &self.store
    }

    fn id_mapped_mounts(&self) -> IdMappedMounts {
        *self.id_mapped_mounts.get_or_init(|| {
            let snapshots = self.volumes.snapshots_path(Volume::Image);
            match mount::probe_idmapped_mounts(Path::new(&snapshots)) {
                Ok(()) => IdMappedMounts::Supported,
                Err(error) => {
                    log::info!("layers cannot be id-mapped: {}", error.chain());
                    IdMappedMounts::Unsupported
                }
            }
        })
    }

    /// The daemon is stopping: moves of layers, in whatever thread, end with
    /// [`ErrorKind::Unavailable`], the relocator ends, and no further file is charged
    /// to a project.
    pub fn begin_stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.relocator.wake();
    }

    /// Makes an active snapshot on a committed parent, or on nothing.
    ///
    /// # Errors
    ///
    /// See [`crate::store::Rows::create`]; [`ErrorKind::InvalidArgument`] for a
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
        labels::check_key("key", key)?;
        let labels = labels::check_labels(labels)?;
        let id_maps = IdMaps::from_labels(&labels)?;
        if let Some(maps) = &id_maps {
            maps.root()?;
        }
        let volume = choose_volume(kind, key, &labels)?;
        let default = self.options.quota.default;
        let limits = quotas::plan_limits(kind, key, &labels, Some(volume), default)?;
        let wanted = self.wanted_lowers(kind, key, parent, &labels, id_maps.as_ref())?;
        // A view of a parent is that parent's directories.
        let volume = (kind == Kind::Active || parent.is_empty()).then_some(volume);
        let dirs = volume.map(|volume| self.volumes.open(volume)).transpose()?;
        if let (Some(Volume::Writable), Some(dirs)) = (volume, &dirs) {
            dirs.require_room(self.options.reserve)?;
        }
        let quotas = match (limits, &dirs) {
            (Some(limits), Some(dirs)) => self.quotas_for(dirs, limits)?,
            _ => None,
        };
        let needs_home = id_maps.is_some() && self.id_mapped_mounts() == IdMappedMounts::Supported;
        if needs_home && !parent.is_empty() {
            self.bring_home(&self.ancestors_of(parent)?)?;
        }
        // Before the writer's lock: the disk they are on may be slow, or gone.
        let lowers = self.ensure_lowers(&wanted)?;

        let image = self.volumes.image();
        let made = self.store.together(|transaction| {
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
            let new_project = match (&quotas, &dirs, limits) {
                (Some(quotas), Some(dirs), Some(limits)) => {
                    self.give_project(transaction, quotas, dirs, created.id, limits)?
                }
                _ => None,
            };
            let new_links = image.link_lowers(created.id, lowers.targets())?;
            let rows = transaction.rows();
            rows.record_lowers(created.id, &wanted.chosen)?;
            Ok((new_links, new_project, new_dirs, created))
        })?;
        let (new_links, new_project, new_dirs, created) = made;
        new_links.keep();
        new_project.into_iter().for_each(NewProject::keep);
        new_dirs.into_iter().for_each(NewDirs::keep);
        let extras = image.lower_links(created.id, lowers.targets().len());
        lowers.keep();
        let is_unpack = kind == Kind::Active && is_unpack(key, &labels);
        if is_unpack && volume == Some(Volume::Image) {
            self.unpacks.begin(created.id);
        }
        Ok(self.mounts_of(&Mounted {
            kind,
            id: created.id,
            volume,
            ancestors: &created.ancestors,
            extras: &extras,
            over_empty: is_unpack,
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
    /// names anything but labels, a bad label, or host directories that will not
    /// do; [`ErrorKind::FailedPrecondition`] for a limit that cannot be kept; for
    /// host directories also as of [`crate::host_dirs::Policy::ensure`].
    pub fn update(&self, key: &str, mask: &[String], given: &Labels) -> Result<Info> {
        let update = || -> Result<Snapshot> {
            let changes = labels::plan_update(mask, given)?;
            self.check_lowers_after(key, &changes)?;
            let mut transaction = self.store.write()?;
            let before = transaction.rows().stat(key)?;
            let after = transaction.rows().update(key, changes)?;
            let change = self.plan_limit_change(&transaction, &before, &after)?;
            match change {
                Some(change) => self.change_limits(&change, || transaction.commit())?,
                None => transaction.commit()?,
            }
            Ok(after)
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
}
