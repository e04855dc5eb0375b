//! The steps of each operation, their order, and how they are undone.
//!
//! Owns: the order of steps. Never: SQL, system calls, protobuf.
//!
//! One order holds everywhere: a row exists only while its directories exist. So
//! directories are created before the row is committed, and go to the trash after the row
//! is deleted. A crash in between leaves a directory without a row, which [`recover`] moves
//! away at the next start.
//!
//! Within a transaction, nothing waits for a disk other than the database's. A
//! request that changes directories holds a claim on the snapshot instead (see
//! [`ids`]).

mod by_hand;
mod commit;
mod compare;
mod elsewhere;
mod first_layers;
mod flusher;
mod heal;
mod host_dirs;
mod id_options;
mod ids;
mod in_use;
mod inspect;
mod label_source;
mod labels;
pub mod limits;
mod links;
mod mounting;
mod new_snapshot;
mod options;
mod prepare;
mod problem;
mod quotas;
mod recorder;
mod recover;
mod relocator;
mod removal;
mod repair;
mod stats;
mod trash;
mod usage;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use crate::error::{Context, Error, ErrorKind, Result};
use crate::quota::Support;
use crate::store::{LabelChange, Snapshot, Store};
use crate::text::filter::Filters;
use crate::types::{Info, Kind, LABEL_UPPERDIR, Labels, Quoted, SnapshotId, Volume};
use crate::util::threads::Background;
use crate::volume::Volumes;
use crate::waits::{self, Awaited};
pub use compare::{Compared, Unpacking};
use flusher::Flusher;
use id_options::MappedIds;
use ids::{Claim, Ids};
pub use inspect::Inspection;
use label_source::{IgnoredLabels, LabelSource};
use links::Links;
pub use options::{Options, PodLabels, QuotaMode, QuotaOptions, Relocation, SyncMode};
pub use problem::{Finding, Problem};
use quotas::Projects;
use recorder::Recorder;
use relocator::Relocator;
pub use stats::{Figures, Held, VolumeFigures, Written};
use trash::Trash;
pub use usage::{Caller, UsageFigures};

/// The ten operations of containerd's snapshots API. The other parts do the background
/// work.
pub struct Snapshotter {
    store: Arc<Store>,
    volumes: Arc<Volumes>,
    options: Options,
    projects: Arc<Projects>,
    flusher: Arc<Flusher>,
    recorder: Arc<Recorder>,
    trash: Arc<Trash>,
    relocator: Arc<Relocator>,
    ids: Arc<Ids>,
    links: Arc<Links>,
    /// Layers that were missing at the start and have not healed since. Their ids are never
    /// given out again.
    lost: Mutex<HashSet<SnapshotId>>,
    mapped_ids: MappedIds,
    ignored_labels: IgnoredLabels,
    walks: usage::Walks,
}

impl Snapshotter {
    /// Creates a snapshotter and its parts. Accesses no disk.
    pub fn new(store: Store, volumes: Volumes, options: Options) -> Snapshotter {
        let (store, volumes) = (Arc::new(store), Arc::new(volumes));
        let disks = || (Arc::clone(&store), Arc::clone(&volumes));
        let ids = Arc::new(Ids::new(disks()));
        let projects = Arc::new(Projects::new(disks(), Arc::clone(&ids), options.quota));
        let flusher = Arc::new(Flusher::new(Arc::clone(&store)));
        let recorder = Arc::new(Recorder::new(disks()));
        let trash = Arc::new(Trash::new(disks(), Arc::clone(&projects), Arc::clone(&ids)));
        let links = Arc::new(Links::new(Arc::clone(&volumes), Arc::clone(&trash)));
        let relocator = Arc::new(Relocator::new(
            disks(),
            Arc::clone(&flusher),
            Arc::clone(&trash),
            (Arc::clone(&ids), Arc::clone(&links)),
            options.relocation,
        ));
        Snapshotter {
            store,
            volumes,
            options,
            projects,
            flusher,
            recorder,
            trash,
            relocator,
            ids,
            links,
            lost: Mutex::default(),
            mapped_ids: MappedIds::default(),
            ignored_labels: IgnoredLabels::default(),
            walks: usage::Walks::default(),
        }
    }

    /// Starts the background threads. Each ends when the returned value is dropped.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] if the system cannot start a thread.
    pub fn start_threads(&self) -> Result<Vec<Background>> {
        let mut threads = vec![self.relocator.start()?];
        // If commits do not flush, no thread has to flush ahead of them.
        if self.options.sync == SyncMode::AtCommit {
            threads.push(self.flusher.start(self.volumes.image().flush()?)?);
        }
        if self.options.records_digests {
            threads.push(self.recorder.start()?);
        }
        threads.push(self.store.start_checkpoints()?);
        threads.push(self.ids.start()?);
        threads.push(self.links.start()?);
        threads.push(self.projects.start_lender()?);
        let trash = Arc::clone(&self.trash);
        // When the volume is back, a Cleanup finds the directories that are not charged
        // yet.
        let on_missing_volume = move || trash.note_stray(Volume::Writable);
        threads.push(self.projects.start_charger(on_missing_volume)?);
        Ok(threads)
    }

    /// The database, which the daemon opens and closes.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Both volumes, which the start of the daemon checks.
    pub fn volumes(&self) -> &Volumes {
        &self.volumes
    }

    /// Prepares for the stop of the daemon: moves of layers, in every thread,
    /// end with [`ErrorKind::Unavailable`], and no further file is charged to a
    /// project.
    pub fn begin_stop(&self) {
        self.relocator.stop();
        self.projects.stop_charging();
    }

    /// What project quotas can do on the writable volume.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if there are no project quotas, with the reason
    /// and a remedy.
    pub fn quota_support(&self) -> Result<Support> {
        self.projects.support()
    }

    /// Returns the information about one snapshot.
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

    /// Sets the labels that `mask` names, or all labels if `mask` is empty, to their values
    /// in `given`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InvalidArgument`] for a mask that names
    /// anything other than labels, for a bad label, or for unusable host directories;
    /// [`ErrorKind::FailedPrecondition`] for a limit that cannot be enforced, or a label
    /// in the mask that does not count on this snapshot; for host directories also the
    /// errors of [`crate::host_dirs::Policy::ensure`].
    pub fn update(&self, key: &str, mask: &[String], given: &Labels) -> Result<Info> {
        let update = || -> Result<Snapshot> {
            let (_, changes) = self.plan_update(key, mask, given)?;
            let lowers = self.lowers_to_check(key, &changes)?;
            self.check_host_dirs(key, &lowers)?;
            let _claim = self.claim(key)?;
            // Another snapshot may have got the key before the claim.
            let (source, changes) = self.plan_update(key, mask, given)?;
            let before = self.store.read()?.stat(key)?;
            let mut after = before.clone();
            for change in &changes {
                change.clone().apply(&mut after.info.labels);
            }
            let change = self.projects.plan_limit_change(source, &before, &after)?;
            let record = || {
                self.store.together(|transaction| {
                    if let Some(change) = &change {
                        change.record(transaction)?;
                    }
                    transaction.update(key, changes.clone())
                })
            };
            match &change {
                Some(change) => self.projects.change_limits(change, record),
                None => record(),
            }
        };
        let snapshot = update().context(|| format!("update snapshot {}", Quoted(key)))?;
        Ok(self.shown(snapshot))
    }

    /// The source of the snapshot's labels, and the changes that an Update makes to them,
    /// without labels that do not count on this snapshot.
    fn plan_update(
        &self,
        key: &str,
        mask: &[String],
        given: &Labels,
    ) -> Result<(LabelSource, Vec<LabelChange>)> {
        let mut changes = labels::plan_update(mask, given)?;
        let info = self.store.read()?.stat(key)?.info;
        let source = LabelSource::of_stored(&info, self.options.pod_labels);
        let ignored = source.take_ignored_changes(&mut changes)?;
        self.ignored_labels.note(source, key, &ignored);
        Ok((source, changes))
    }

    /// Calls `each` for every snapshot that matches one of the filters, or for all if there
    /// are no filters. The snapshots are those of one moment, in the order of their names.
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

    /// Waits until no other request works on the snapshot with that key. The snapshot
    /// keeps the key as long as the claim is held.
    fn claim(&self, key: &str) -> Result<Claim<'_>> {
        loop {
            let snapshot = self.store.read()?.stat(key)?;
            // Another request may have the claim, and wait for the volume.
            if let Some(volume) = snapshot.volume {
                waits::enter(Awaited::Volume(volume))?;
            }
            let claim = self.ids.claim(snapshot.id);
            // The snapshot may have been removed meanwhile, and another one may
            // have the key.
            if self.store.read()?.stat(key)?.id == claim.id {
                return Ok(claim);
            }
        }
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
