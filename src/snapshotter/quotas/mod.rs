//! Project ids of the snapshots on the writable volume: giving them out,
//! limiting and counting by them, and taking them back.
//!
//! An id is set on the empty directories of a snapshot, and recorded in the transaction
//! that enters the snapshot. It stays taken until no inode on the file system is
//! charged to it any more; the kernel is asked for that, not the database. Then its
//! limit is cleared, and after that its row is deleted. An id is never given out if the
//! kernel has anything charged to it, or has a limit for it, whatever the database
//! records.
//!
//! A layer keeps its project and limit as long as its directory is on the writable volume's
//! file system. Usually nothing writes to a layer. A container that still does, after `ctr
//! snapshot commit`, does so within the limit. The copy on the image volume gets no
//! project.
//!
//! After a crash, a directory in the trash may have a project id that the database does
//! not record: the next start records it. Limits of project ids that are not recorded
//! belong to other programs.

mod given;
mod mount_headroom;
mod recharge;
mod recover;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, Once};

use rustix::fd::OwnedFd;
use rustix::rand::{GetRandomFlags, getrandom};

use super::ids::Ids;
use super::label_source::LabelSource;
use super::limits::Asked;
use super::new_snapshot::{Purpose, plan_limits};
use super::{QuotaMode, QuotaOptions};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::quota::{self, Quotas, Support};
use crate::store::{Reader, Snapshot, Store, Transaction};
use crate::types::{
    LABEL_MAX_INODES, LABEL_MAX_SIZE, LABEL_OWN_MAX_SIZE, Limits, ProjectId, SnapshotId, Usage,
    Volume,
};
use crate::util::fault_point::fault_point;
use crate::util::lock::lock;
use crate::util::monitor::Monitor;
use crate::volume::{Dirs, Volumes};
pub(super) use given::{GivenProject, PlannedProject};
use mount_headroom::Loan;
use recharge::Uncharged;

/// How many ids in use by other programs a search skips before it gives up. Each costs a
/// system call while all requests that need an id wait.
const MOST_MISSES: u32 = 256;
/// How many ids in use by other programs are skipped in a row, before the search goes on at
/// a random id. A container with the host's root can charge its files to all the ids that
/// come next, but hardly to a billion ids.
const MOST_NEIGHBOURS: u32 = 16;

/// A change of an existing snapshot's limits.
pub(super) struct LimitChange {
    project: ProjectId,
    from: Limits,
    to: Limits,
}

impl LimitChange {
    /// Records the new limits in the database.
    pub(super) fn record(&self, transaction: &Transaction<'_>) -> Result<()> {
        transaction.record_limits(self.project, self.to)
    }

    /// Whether the change only keeps or removes limits, and sets no new number.
    fn only_lifts(&self) -> bool {
        let lifts = |from: Option<u64>, to: Option<u64>| to.is_none() || to == from;
        lifts(self.from.max_bytes, self.to.max_bytes)
            && lifts(self.from.max_inodes, self.to.max_inodes)
    }
}

/// The project quotas of the snapshots on the writable volume.
pub(super) struct Projects {
    store: Arc<Store>,
    volumes: Arc<Volumes>,
    options: QuotaOptions,
    ids: Arc<Ids>,
    search: Mutex<Search>,
    uncharged: Monitor<Uncharged>,
    /// The snapshots whose limit is raised at present, for a mount.
    loans: Monitor<HashMap<SnapshotId, Loan>>,
    /// Used to log only the first failure of quotas for snapshots that can do without.
    failing: Once,
}

/// The state of the search for the next project id.
#[derive(Default)]
struct Search {
    /// The project id given out last, from which the search for the next starts.
    last: Option<ProjectId>,
    /// Ids that are given out, but are not in the database yet.
    unrecorded: HashSet<ProjectId>,
}

impl Projects {
    pub(super) fn new(
        (store, volumes): (Arc<Store>, Arc<Volumes>),
        ids: Arc<Ids>,
        options: QuotaOptions,
    ) -> Projects {
        Projects {
            store,
            volumes,
            options,
            ids,
            search: Mutex::default(),
            uncharged: Monitor::default(),
            loans: Monitor::default(),
            failing: Once::new(),
        }
    }

    /// The quotas of the writable volume; `None` if they are switched off, its file
    /// system has none, or this process may not use them.
    fn available<'a>(&self, dirs: &'a Dirs) -> Result<Option<Quotas<'a>>> {
        if self.options.mode == QuotaMode::Off {
            return Ok(None);
        }
        match Quotas::probe(dirs.snapshots_fd()) {
            Err(error) if error.kind() == ErrorKind::FailedPrecondition => Ok(None),
            probed => probed,
        }
    }

    /// The quotas of the writable volume. If it has none, returns
    /// [`ErrorKind::FailedPrecondition`] with the reason and a remedy.
    fn require<'a>(&self, dirs: &'a Dirs) -> Result<Quotas<'a>> {
        self.require_switched_on()?;
        match Quotas::probe(dirs.snapshots_fd())? {
            Some(quotas) => Ok(quotas),
            None => Err(quota::lack(dirs.snapshots_fd(), dirs.path(), None)),
        }
    }

    /// The quotas of the writable volume, if they enforce limits. Otherwise returns
    /// [`ErrorKind::FailedPrecondition`] with the reason and a remedy.
    fn require_limits<'a>(&self, dirs: &'a Dirs) -> Result<Quotas<'a>> {
        let quotas = self
            .require(dirs)
            .and_then(|quotas| match quotas.support() {
                Support::Limits => Ok(quotas),
                counts => Err(quota::lack(dirs.snapshots_fd(), dirs.path(), Some(counts))),
            });
        quotas.context(|| "enforce a limit on the writable volume")
    }

    fn require_switched_on(&self) -> Result<()> {
        match self.options.mode {
            QuotaMode::Auto | QuotaMode::Require => Ok(()),
            QuotaMode::Off => Err(Error::refused(
                "project quotas are switched off by --quota off, or by a user namespace, in \
                 which the kernel sets no projects",
            )),
        }
    }

    /// What project quotas can do on the writable volume. Returns an error if there are
    /// none.
    pub(super) fn support(&self) -> Result<Support> {
        self.require_switched_on()?;
        let dirs = self.volumes.open(Volume::Writable)?;
        Ok(self.require(&dirs)?.support())
    }

    /// The project for a new snapshot with these limits; `None` if the snapshot gets no
    /// project.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if quotas are needed and not supported,
    /// with the reason and a remedy.
    pub(super) fn plan<'a>(
        &self,
        dirs: &'a Dirs,
        limits: Limits,
    ) -> Result<Option<PlannedProject<'a>>> {
        let quotas = match self.are_needed(limits) {
            true => Some(self.require_limits(dirs)?),
            false => self
                .available(dirs)
                .or_else(|error| self.do_without(limits, error).map(|()| None))?,
        };
        Ok(quotas.map(|quotas| PlannedProject {
            quotas,
            dirs,
            limits,
        }))
    }

    /// Charges the directories of a new snapshot, which are empty, to a new project.
    /// Returns `None` if that fails and the snapshot can do without a project.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ResourceExhausted`] if no id is free.
    pub(super) fn give<'a>(
        &'a self,
        planned: &'a PlannedProject<'a>,
        id: SnapshotId,
    ) -> Result<Option<GivenProject<'a>>> {
        let limits = planned.limits;
        let given = self
            .pick(&planned.quotas)
            .and_then(|project| GivenProject::give(self, planned, id, project));
        match given {
            Err(error) if error.kind() != ErrorKind::ResourceExhausted => {
                self.do_without(limits, error)?;
                Ok(None)
            }
            given => {
                fault_point("project-given");
                given.map(Some)
            }
        }
    }

    /// Returns `error` if a snapshot with these limits needs quotas. Otherwise the snapshot
    /// gets none, and the first such error is logged.
    fn do_without(&self, limits: Limits, error: Error) -> Result<()> {
        if self.are_needed(limits) {
            return Err(error);
        }
        self.failing.call_once(|| {
            log::warn!(
                "new containers get no project, so their usage is found by counting all files: {}",
                error.chain()
            );
        });
        Ok(())
    }

    fn are_needed(&self, limits: Limits) -> bool {
        limits != Limits::NONE || self.options.mode == QuotaMode::Require
    }

    /// Picks a project id that is free in the database, and to which the kernel has charged
    /// nothing and given no limit. The caller has to call [`Projects::end_search`] once the
    /// id is recorded or given up.
    fn pick(&self, quotas: &Quotas<'_>) -> Result<ProjectId> {
        let range = self.options.ids;
        let reader = self.store.read()?;
        // The lock is held while the writable volume is asked; only requests that need this
        // volume wait here.
        let mut search = lock(&self.search);
        if search.last.is_none() {
            let given = reader.projects()?;
            let mut ids = given.iter().map(|given| given.project);
            search.last = ids.rfind(|project| range.contains(*project));
        }
        // The search goes on after the last id, so an id that was given back is used again
        // only after all others.
        let mut candidate = search.last.unwrap_or(ProjectId::NONE);
        let mut misses = 0;
        let ours = reader.count_projects()? + search.unrecorded.len() as u64;
        // Ids of this daemon are skipped without asking the kernel.
        for _ in 0..ours + u64::from(MOST_MISSES) {
            candidate = range.after(candidate);
            if search.unrecorded.contains(&candidate) || reader.is_project_taken(candidate)? {
                continue;
            }
            // An id with nothing but a limit is skipped, too: another program may have set
            // the limit for files to come.
            if quotas.held(candidate)?.is_nothing() {
                search.last = Some(candidate);
                search.unrecorded.insert(candidate);
                return Ok(candidate);
            }
            misses += 1;
            // A large range is not tried id by id: the search goes on at a random id.
            if misses % MOST_NEIGHBOURS == 0 && range.count() > MOST_MISSES {
                candidate = range.at(random()?);
            }
        }
        search.last = Some(candidate);
        Err(Error::new(
            ErrorKind::ResourceExhausted,
            format!(
                "no project id of {range} is free, {misses} are in use by other programs: remove \
                 containers, or give --quota-ids another range"
            ),
        ))
    }

    /// Ends the search for a project id, which is recorded by now or was given up.
    fn end_search(&self, project: ProjectId) {
        lock(&self.search).unrecorded.remove(&project);
    }

    /// The change of an existing snapshot's limits that an Update of its labels asks for;
    /// `None` if there is no change.
    ///
    /// # Errors
    ///
    /// Those of [`Asked::of`] and [`plan_limits`]; [`ErrorKind::FailedPrecondition`] if the
    /// snapshot has no project.
    pub(super) fn plan_limit_change(
        &self,
        source: LabelSource,
        before: &Snapshot,
        after: &Snapshot,
    ) -> Result<Option<LimitChange>> {
        let info = &after.info;
        // A limit whose label does not change stays, even if the default is another one by
        // now.
        let is_changed = |label: &str| before.info.labels.get(label) != info.labels.get(label);
        let is_size_changed = is_changed(LABEL_MAX_SIZE) || is_changed(LABEL_OWN_MAX_SIZE);
        let are_inodes_changed = is_changed(LABEL_MAX_INODES);
        if !is_size_changed && !are_inodes_changed {
            return Ok(None);
        }
        let default = self.options.default;
        let purpose = Purpose::of_stored(info);
        let asked = Asked::of(source, &info.labels, default)?;
        let limits = plan_limits(purpose, after.volume, asked, default)?;
        let Some(mut to) = limits else {
            return Ok(None);
        };
        if let Some(given) = self.store.read()?.project_of(after.id)? {
            if !is_size_changed {
                to.max_bytes = given.limits.max_bytes;
            }
            if !are_inodes_changed {
                to.max_inodes = given.limits.max_inodes;
            }
            return Ok(Some(LimitChange {
                project: given.project,
                from: given.limits,
                to,
            }));
        }
        if source == LabelSource::Administrator && asked.is_limit() {
            // An error about a file system that enforces no limits comes before the error
            // about the missing project.
            let dirs = self.volumes.open(Volume::Writable)?;
            self.require_limits(&dirs)?;
            return Err(Error::refused(
                "the snapshot was created while the writable volume had no project quotas, so it \
                 has no project that could be limited: create the container again",
            ));
        }
        Ok(None)
    }

    /// Changes limits in the kernel before `record` makes the change durable, and changes
    /// them back if `record` fails. A limit can be removed even if the kernel cannot be
    /// asked now, because the next start sets the recorded limits.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if the volume or its quotas are missing; errors of
    /// the volume's disk; errors of `record`.
    pub(super) fn change_limits<T>(
        &self,
        change: &LimitChange,
        record: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let are_kept = || matches!(self.support(), Ok(Support::Limits));
        if change.only_lifts() && !are_kept() {
            log::info!(
                "the limits of project {} are removed from the database only, because the disk's \
                 quotas cannot be used now: the next start with quotas removes them from the disk",
                change.project
            );
            return record();
        }
        let dirs = self.volumes.open(Volume::Writable)?;
        let quotas = self.require_limits(&dirs)?;
        quotas
            .set_limits(change.project, change.to)
            .and_then(|()| {
                fault_point("limits-changed");
                record()
            })
            .inspect_err(|_| {
                if let Err(error) = quotas.set_limits(change.project, change.from) {
                    log::warn!(
                        "the limits of project {} could not be set back after a failed update, \
                         so the new ones are enforced until the next start: {}",
                        change.project,
                        error.chain()
                    );
                }
            })
    }

    /// Whether a snapshot has, or may have, limits that are enforced.
    pub(super) fn is_limited(&self, reader: &Reader<'_>, snapshot: &Snapshot) -> bool {
        if snapshot.volume != Some(Volume::Writable) || self.options.mode == QuotaMode::Off {
            return false;
        }
        match reader.project_of(snapshot.id) {
            Ok(given) => given.is_some_and(|given| given.limits != Limits::NONE),
            // The mount is not refused for this error, which is logged when room is lent.
            Err(_) => true,
        }
    }

    /// Stops charging further files to projects.
    pub(super) fn stop_charging(&self) {
        self.uncharged.stop();
    }

    /// The usage of a snapshot according to its project quota, without counting files.
    /// `None` if the snapshot has no project, or if its directory is not charged to the
    /// project.
    pub(super) fn usage(
        &self,
        dirs: &Dirs,
        id: SnapshotId,
        upper: &OwnedFd,
    ) -> Result<Option<Usage>> {
        let Some(given) = self.store.read()?.project_of(id)? else {
            return Ok(None);
        };
        if quota::project_of(upper)? != given.project {
            return Ok(None);
        }
        // The caller can still count the files. The kernel treats a question for quotas as
        // a write, and so refuses it on a read-only volume.
        let Ok(Some(quotas)) = self.available(dirs) else {
            return Ok(None);
        };
        Ok(quotas.held(given.project).ok().map(|held| held.usage))
    }

    /// Takes back the project ids to which no file is charged any more. XFS may still
    /// charge deleted files to their project for a moment; the next call takes that
    /// project's id back.
    pub(super) fn free_unused(&self) -> Result<()> {
        let loose = self.store.read()?.loose_projects()?;
        if loose.is_empty() {
            return Ok(());
        }
        // Without the volume the kernel cannot be asked. The missing volume is
        // reported elsewhere.
        let Ok(dirs) = self.volumes.open(Volume::Writable) else {
            return Ok(());
        };
        // The start has logged why there are no quotas.
        let Some(quotas) = self.available(&dirs)? else {
            return Ok(());
        };
        quotas.settle();
        let mut unused = Vec::new();
        for given in loose {
            let held = quotas.held(given.project)?;
            if held.is_unused() {
                // The limit is cleared first: without the row, nothing would
                // record whose it is.
                quotas.set_limits(given.project, Limits::NONE)?;
                unused.push(given.project);
            }
        }
        if unused.is_empty() {
            return Ok(());
        }
        fault_point("unlimited");
        let mut transaction = self.store.write()?;
        for project in unused {
            transaction.forget_project(project)?;
        }
        transaction.commit()
    }
}

fn random() -> Result<u32> {
    let mut bytes = [0; 4];
    getrandom(&mut bytes, GetRandomFlags::empty()).context(|| "get random bytes")?;
    Ok(u32::from_ne_bytes(bytes))
}
