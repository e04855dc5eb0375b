//! Bringing the projects in the database and those of the file system into
//! agreement at a start, and comparing them for `check`.

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
    /// At a start, after strays have gone to the trash: brings the projects in the database
    /// and those of the file system into agreement. Returns the snapshots whose files have
    /// to be charged in the background.
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
                // Quotas are missing, and another try would fail in the same way.
                Err(error) if error.kind() == ErrorKind::FailedPrecondition => {
                    if given.iter().any(|given| !loose.contains(&given.project)) {
                        log::warn!(
                            "the limits of containers are no longer enforced, and their usage is \
                             found by counting all files: {}",
                            error.chain()
                        );
                    }
                    return Ok(Vec::new());
                }
                required => required?,
            },
        };
        // The kernel refuses to move a directory of another project into a directory that
        // gives its own project to its entries (rename(2), EXDEV).
        for directory in [dirs.snapshots_fd(), dirs.trash_fd()?] {
            if quota::project_of(directory)? != ProjectId::NONE {
                quota::set_project(directory, ProjectId::NONE)?;
                log::warn!(
                    "snapshots/ or the trash of {} was in a project, so no snapshot could be moved \
                     there: took the directory out of the project; nothing has to be done",
                    dirs.path()
                );
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
                    "the limits of snapshot {id} (project {}) may not be enforced until the next \
                     start: {}",
                    given.project,
                    error.chain()
                ),
            }
        }
        self.adopt_trashed(dirs)?;
        Ok(uncharged)
    }

    /// Sets the recorded limits of a snapshot's project again. Returns `false` if the
    /// snapshot's directories are not charged to the project, because they were created
    /// again, or copied by a program that does not know projects.
    fn restore_project(
        &self,
        quotas: &Quotas<'_>,
        dirs: &Dirs,
        id: SnapshotId,
        given: &Project,
    ) -> Result<bool> {
        // A request may have changed or removed the project meanwhile.
        if self.store.read()?.project_of(id)?.as_ref() != Some(given) {
            return Ok(true);
        }
        let parts = match dirs.open_parts(id) {
            // The start reports a missing directory when it looks for lost layers.
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
            log::warn!(
                "the limits of snapshot {id} (project {project}) on the disk were not the recorded \
                 ones, as after a power cut: the recorded limits are enforced again"
            );
        }
        is_charged(&parts, project)
    }

    /// Gives a snapshot another project in place of one that another program uses. Returns
    /// `None` if no id is free.
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
                    "snapshot {id} has no limit any more: another program uses its project \
                     {theirs} on this disk, and {}",
                    error.chain()
                );
                None
            }
            Err(error) => return Err(error),
        };
        let recorded = self.store.together(|transaction| {
            // The database only forgets the old id. Taking it back would clear the other
            // program's limits.
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
                "another program uses project {theirs} of snapshot {id} on this disk: the snapshot \
                 has project {project} from now on, with the same limits"
            );
        } else {
            recorded?;
        }
        Ok(picked)
    }

    /// Findings about projects that differ from the recorded ones, in the order of the
    /// snapshots' projects; none without quotas.
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
            // A missing directory is reported as a finding of its own.
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

    /// Records the projects of directories in the trash that the database does not know.
    /// Interrupted requests have set them.
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
                log::info!(
                    "project id {project} is in use by removed files, until containerd's next \
                     garbage collection"
                );
            }
            Ok(())
        })
    }
}

/// Whether a recorded project is the snapshot's on this disk, too. After a move to another
/// disk, or with an older database, the project may be another program's: then files
/// outside of the snapshot are charged to it, or its limits differ from the recorded ones.
fn is_ours(parts: &SnapshotDirs, given: &Project, held: &Held) -> Result<bool> {
    for part in parts.all() {
        if quota::project_of(part)? == given.project {
            return Ok(true);
        }
    }
    let limits = held.limits;
    Ok(held.is_unused() && (limits == Limits::NONE || given.limits.are_kept_by(limits)))
}

/// Whether all of a snapshot's directories give the project to their entries.
fn is_charged(parts: &SnapshotDirs, project: ProjectId) -> Result<bool> {
    let mut is_charged = true;
    for part in parts.all() {
        is_charged &= quota::project_of(part)? == project;
    }
    Ok(is_charged)
}
