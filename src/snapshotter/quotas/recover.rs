//! Making what the database has of projects and what the file system has one:
//! at a start, and told by `check`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::Projects;
use crate::error::{ErrorKind, Result};
use crate::quota::{self, Held, Quotas, Support};
use crate::snapshotter::options::QuotaMode;
use crate::snapshotter::problem::{Finding, Problem};
use crate::store::{Project, Snapshot};
use crate::types::{Limits, ProjectId, SnapshotId, Volume};
use crate::util::lock::lock;
use crate::volume::{Dirs, SnapshotDirs};

impl Projects {
    /// At a start, after strays have gone to the trash: what the database has of
    /// projects, and what the file system has, are made one. Returns the snapshots
    /// whose trees have to be charged, which is done beside the requests.
    pub(in crate::snapshotter) fn recover(&self, dirs: &Arc<Dirs>) -> Result<Vec<SnapshotId>> {
        let given = self.store.read()?.projects()?;
        let loose: HashSet<_> = self
            .store
            .read()?
            .loose_projects()?
            .into_iter()
            .map(|given| given.project)
            .collect();
        let quotas = match self.options.mode {
            QuotaMode::Require => self.require_limits(dirs)?,
            QuotaMode::Auto | QuotaMode::Off => match self.require(dirs) {
                // Nothing changes about that by another try.
                Err(error) if error.kind() == ErrorKind::FailedPrecondition => {
                    if given.iter().any(|given| !loose.contains(&given.project)) {
                        log::warn!(
                            "containers that have limits or are counted by quotas are no longer: \
                             {}",
                            error.chain()
                        );
                    }
                    return Ok(Vec::new());
                }
                required => required?,
            },
        };
        // A directory of another project cannot be moved into one that hands its
        // own on (rename(2), EXDEV).
        for directory in [dirs.snapshots_fd(), dirs.trash_fd()?] {
            if quota::project_of(directory)? != ProjectId::NONE {
                quota::set_project(directory, ProjectId::NONE)?;
                log::warn!("a directory of {} is no longer in a project", dirs.path());
            }
        }
        let mut uncharged = Vec::new();
        for given in given.iter().filter(|given| !loose.contains(&given.project)) {
            let Some(id) = given.snapshot.filter(|id| !self.is_recharge_pending(*id)) else {
                continue;
            };
            let _claim = self.ids.claim(id);
            match self.restore_project(&quotas, dirs, id, given) {
                Ok(true) => {}
                Ok(false) => uncharged.push(id),
                Err(error) => log::error!(
                    "project {} of snapshot {id}: {}",
                    given.project,
                    error.chain()
                ),
            }
        }
        self.adopt_trashed(dirs)?;
        Ok(uncharged)
    }

    /// Sets a snapshot's limits to what is recorded, also when its directories were made
    /// again, or copied by a program that knows no projects. Returns whether its
    /// directories are charged to its project.
    fn restore_project(
        &self,
        quotas: &Quotas<'_>,
        dirs: &Dirs,
        id: SnapshotId,
        given: &Project,
    ) -> Result<bool> {
        // It may have been changed, or removed, meanwhile.
        if self.store.read()?.project_of(id)?.as_ref() != Some(given) {
            return Ok(true);
        }
        let parts = match dirs.open_parts(id) {
            // Reported by who looks for layers.
            Err(error) if error.kind() == ErrorKind::DataLoss => return Ok(true),
            parts => parts?,
        };
        let mut project = given.project;
        if !is_ours(&parts, given, &quotas.held(project)?)? {
            match self.replace_project(quotas, id, given)? {
                Some(other) => project = other,
                None => return Ok(true),
            }
        }
        if quotas.support() == Support::Limits
            && !given.limits.are_kept_by(quotas.held(project)?.limits)
        {
            quotas.set_limits(project, given.limits)?;
            log::warn!("project {project} of snapshot {id} has its limits again");
        }
        is_charged(&parts, project)
    }

    /// Gives a snapshot another id for one that is somebody else's; none if none is
    /// free.
    fn replace_project(
        &self,
        quotas: &Quotas<'_>,
        id: SnapshotId,
        given: &Project,
    ) -> Result<Option<ProjectId>> {
        let theirs = given.project;
        let picked = match self.pick(quotas) {
            Ok(project) => Some(project),
            Err(error) if error.kind() == ErrorKind::ResourceExhausted => {
                log::error!(
                    "snapshot {id} has no limit any more: its project {theirs} is somebody \
                     else's on this disk, and {}",
                    error.chain()
                );
                None
            }
            Err(error) => return Err(error),
        };
        let recorded = self.store.together(|transaction| {
            // Not to be given back: that would clear the limits of whose it is.
            transaction.forget_project(theirs)?;
            match picked {
                None => Ok(()),
                Some(project) => transaction.record_project(&Project {
                    project,
                    snapshot: Some(id),
                    limits: given.limits,
                }),
            }
        });
        if let Some(project) = picked {
            self.end_search(project);
            recorded?;
            log::warn!(
                "project {theirs} of snapshot {id} is somebody else's on this disk: it has \
                 project {project} from now on"
            );
        } else {
            recorded?;
        }
        Ok(picked)
    }

    /// What is not as recorded, in order of the ids; nothing where no quotas are.
    pub(in crate::snapshotter) fn inspect(
        &self,
        snapshots: &HashMap<SnapshotId, Snapshot>,
    ) -> Result<Vec<Finding>> {
        let mut findings = Vec::new();
        let Ok(dirs) = self.volumes.open(Volume::Writable) else {
            return Ok(findings);
        };
        let Ok(Some(quotas)) = self.available(&dirs) else {
            return Ok(findings);
        };
        let given = self.store.read()?.projects()?;
        for given in &given {
            let snapshot = given.snapshot.and_then(|id| snapshots.get(&id));
            let is_there = |snapshot: &&Snapshot| snapshot.volume == Some(Volume::Writable);
            let Some(snapshot) = snapshot.filter(is_there) else {
                continue;
            };
            let project = given.project;
            let about = |problem| Finding {
                problem,
                name: Some(snapshot.info.name.clone()),
                id: Some(snapshot.id),
                volume: Some(Volume::Writable),
            };
            // A missing directory is a finding of its own.
            if let Ok(parts) = dirs.open_parts(snapshot.id)
                && !is_charged(&parts, project)?
            {
                findings.push(about(Problem::NotCharged { project }));
                continue;
            }
            let kept = quotas.held(project)?.limits;
            if quotas.support() == Support::Limits && !given.limits.are_kept_by(kept) {
                findings.push(about(Problem::LimitsDiffer { project }));
            }
        }
        Ok(findings)
    }

    /// Records the ids of directories in the trash that are not recorded: a
    /// request was cut off after it had set one.
    fn adopt_trashed(&self, dirs: &Dirs) -> Result<()> {
        let given = self.store.read()?.projects()?;
        let mut known: HashSet<_> = given.iter().map(|given| given.project).collect();
        known.extend(&lock(&self.search).unrecorded);
        let mut unknown = Vec::new();
        dirs.each_trashed(|directory| {
            let project = quota::project_of(&directory)?;
            if self.options.ids.contains(project) && known.insert(project) {
                unknown.push(project);
            }
            Ok(())
        })?;
        if unknown.is_empty() {
            return Ok(());
        }
        self.store.together(|transaction| {
            for project in &unknown {
                transaction.record_project(&Project {
                    project: *project,
                    snapshot: None,
                    limits: Limits::NONE,
                })?;
                log::info!("project {project} is taken by what is in the trash");
            }
            Ok(())
        })
    }
}

/// Whether a recorded id is the snapshot's on this disk as well. After a move to
/// another disk, or with a database from another day, it may be somebody else's: what
/// is charged to it is not in the snapshot, or what it is limited to is not recorded.
fn is_ours(parts: &SnapshotDirs, given: &Project, held: &Held) -> Result<bool> {
    for part in parts.all() {
        if quota::project_of(part)? == given.project {
            return Ok(true);
        }
    }
    let limits = held.limits;
    Ok(held.is_unused() && (limits == Limits::NONE || given.limits.are_kept_by(limits)))
}

/// Whether all of a snapshot's directories hand a project on.
fn is_charged(parts: &SnapshotDirs, project: ProjectId) -> Result<bool> {
    let mut is_charged = true;
    for part in parts.all() {
        is_charged &= quota::project_of(part)? == project;
    }
    Ok(is_charged)
}
