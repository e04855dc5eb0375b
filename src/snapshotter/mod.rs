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
mod elsewhere;
mod flusher;
mod host_dirs;
mod in_use;
mod inspect;
mod labels;
pub mod limits;
mod mounting;
mod new_snapshot;
mod options;
mod prepare;
mod problem;
mod quotas;
mod recover;
mod relocator;
mod removal;
mod repair;
mod stats;
mod trash;
mod usage;

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::mount;
use crate::mount::overlay::Layout;
use crate::quota::Support;
use crate::store::{Snapshot, Store};
use crate::text::filter::Filters;
use crate::types::{Info, Kind, LABEL_UPPERDIR, Labels, Quoted, SnapshotId, Volume};
use crate::util::threads::Background;
use crate::volume::Volumes;
use flusher::Flusher;
pub use inspect::Inspection;
pub use options::{Options, QuotaMode, QuotaOptions, Relocation, SyncMode};
pub use problem::{Finding, Problem};
use quotas::Projects;
use relocator::Relocator;
pub use stats::{Figures, VolumeFigures, Written};
use trash::Trash;
pub use usage::{Caller, UsageFigures};

/// The ten operations of containerd's snapshots API. What goes on beside them has owners
/// of its own.
pub struct Snapshotter {
    store: Arc<Store>,
    volumes: Arc<Volumes>,
    layout: Layout,
    options: Options,
    projects: Arc<Projects>,
    flusher: Arc<Flusher>,
    trash: Arc<Trash>,
    relocator: Arc<Relocator>,
    /// Layers that the start has missed. Ids are never given out again.
    lost: OnceLock<HashSet<SnapshotId>>,
    /// Whether the kernel maps the ids of mounts with `uidmap=` and `gidmap=`; else only a
    /// snapshot's own top directory is given its owner. Asked when it is first needed: few
    /// need it, and the answer takes longer than everything else at a start.
    maps_ids: OnceLock<bool>,
    walks: usage::Walks,
}

impl Snapshotter {
    /// Puts the parts together. Touches no disk.
    pub fn new(store: Store, volumes: Volumes, options: Options) -> Snapshotter {
        let layout = Layout {
            empty: volumes.image().empty_path(),
            options: options.mount_options.clone(),
        };
        let (store, volumes) = (Arc::new(store), Arc::new(volumes));
        let disks = || (Arc::clone(&store), Arc::clone(&volumes));
        let projects = Arc::new(Projects::new(disks(), options.quota));
        let flusher = Arc::new(Flusher::new(Arc::clone(&store)));
        let trash = Arc::new(Trash::new(disks(), Arc::clone(&projects)));
        let relocator = Arc::new(Relocator::new(
            disks(),
            Arc::clone(&flusher),
            Arc::clone(&trash),
            options.relocation,
        ));
        Snapshotter {
            store,
            volumes,
            layout,
            options,
            projects,
            flusher,
            trash,
            relocator,
            lost: OnceLock::new(),
            maps_ids: OnceLock::new(),
            walks: usage::Walks::default(),
        }
    }

    /// Starts the threads that work beside the requests. Each ends when its value is
    /// dropped.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] if the system gives no thread.
    pub fn start_threads(&self) -> Result<Vec<Background>> {
        let mut threads: Vec<_> = self.relocator.start()?.into_iter().collect();
        // Without flushes at commits there is nothing to have ready for them.
        if self.options.sync == SyncMode::AtCommit {
            threads.push(self.flusher.start(self.volumes.image().flush()?)?);
        }
        threads.push(self.projects.start_lender()?);
        let trash = Arc::clone(&self.trash);
        // Once the volume is back, a Cleanup asks for the rest again.
        let on_missing_volume = move || trash.note_stray(Volume::Writable);
        threads.push(self.projects.start_charger(on_missing_volume)?);
        Ok(threads)
    }

    /// The database, for what the daemon does with it at start and stop.
    pub fn store(&self) -> &Store {
        &self.store
    }

    fn maps_ids(&self) -> bool {
        *self.maps_ids.get_or_init(|| {
            let snapshots = self.volumes.snapshots_path(Volume::Image);
            let probed = mount::probe_idmapped_mounts(Path::new(&snapshots));
            if let Err(error) = &probed {
                log::info!("layers cannot be id-mapped: {}", error.chain());
            }
            probed.is_ok()
        })
    }

    /// The daemon is stopping: moves of layers, in whatever thread, end with
    /// [`ErrorKind::Unavailable`], and no further file is charged to a project.
    pub fn begin_stop(&self) {
        self.relocator.stop();
        self.projects.stop_charging();
    }

    /// What project quotas do on the writable volume.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if they do nothing: why, and what would
    /// change that.
    pub fn quota_support(&self) -> Result<Support> {
        self.projects.support()
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
            self.options
                .lowers
                .check(&self.lowers_to_check(key, &changes)?)?;
            let mut transaction = self.store.write()?;
            let before = transaction.stat(key)?;
            let after = transaction.update(key, changes)?;
            let change = self
                .projects
                .plan_limit_change(&transaction, &before, &after)?;
            match change {
                Some(change) => self
                    .projects
                    .change_limits(&change, || transaction.commit())?,
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

    fn all_snapshots(&self) -> Result<Vec<Snapshot>> {
        let mut all = Vec::new();
        self.store.read()?.list(&Filters::all(), |snapshot| {
            all.push(snapshot);
            Ok(())
        })?;
        Ok(all)
    }

    fn shown(&self, snapshot: Snapshot) -> Info {
        let mut info = snapshot.info;
        if self.options.shows_upperdir
            && let Some(volume) = snapshot.volume
        {
            // A layer's path stays the same wherever its bytes are.
            let volume = match info.kind {
                Kind::Committed => Volume::Image,
                Kind::Active | Kind::View => volume,
            };
            let paths = self.volumes.snapshot_paths(volume, snapshot.id);
            info.labels.insert(LABEL_UPPERDIR.to_owned(), paths.upper);
        }
        info
    }
}
