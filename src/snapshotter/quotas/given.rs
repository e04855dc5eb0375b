//! A project on its way to a new snapshot.

use super::Projects;
use crate::error::Result;
use crate::quota::{self, Quotas};
use crate::store::{Project, Transaction};
use crate::types::{Limits, ProjectId, SnapshotId};
use crate::volume::Dirs;

/// The project that a new snapshot is to get.
pub(in crate::snapshotter) struct PlannedProject<'a> {
    pub(super) quotas: Quotas<'a>,
    pub(super) dirs: &'a Dirs,
    pub(super) limits: Limits,
}

/// A project that a snapshot's directories have, until the snapshot is entered. Dropped
/// without [`GivenProject::keep`], it is taken back.
pub(in crate::snapshotter) struct GivenProject<'a> {
    projects: &'a Projects,
    planned: &'a PlannedProject<'a>,
    row: Project,
    is_kept: bool,
}

impl<'a> GivenProject<'a> {
    /// Sets the project on the directories of a snapshot.
    pub(super) fn give(
        projects: &'a Projects,
        planned: &'a PlannedProject<'a>,
        id: SnapshotId,
        project: ProjectId,
    ) -> Result<GivenProject<'a>> {
        let given = GivenProject {
            projects,
            planned,
            row: Project {
                project,
                snapshot: Some(id),
                limits: planned.limits,
            },
            is_kept: false,
        };
        given.set()?;
        Ok(given)
    }

    /// Sets the project on the snapshot's directories.
    fn set(&self) -> Result<()> {
        self.set_on_all(self.row.project)?;
        // The project has no limits yet: an id that has any is not picked.
        match self.row.limits {
            Limits::NONE => Ok(()),
            limits => self.planned.quotas.set_limits(self.row.project, limits),
        }
    }

    fn set_on_all(&self, project: ProjectId) -> Result<()> {
        let id = self.row.snapshot.expect("the snapshot that it is given to");
        let parts = self.planned.dirs.open_parts(id)?;
        let mut parts = parts.all();
        parts.try_for_each(|part| quota::set_project(part, project))
    }

    /// Records it, in the transaction that enters the snapshot.
    pub(in crate::snapshotter) fn record(&self, transaction: &Transaction<'_>) -> Result<()> {
        transaction.record_project(&self.row)
    }

    /// The snapshot is entered.
    pub(in crate::snapshotter) fn keep(mut self) {
        self.is_kept = true;
    }

    /// Takes it back. First the limits: no row says whose they are. The directories go to
    /// the trash next.
    fn take_back(&self) -> Result<()> {
        let cleared = match self.row.limits {
            Limits::NONE => Ok(()),
            _ => self
                .planned
                .quotas
                .set_limits(self.row.project, Limits::NONE),
        };
        self.set_on_all(ProjectId::NONE).and(cleared)
    }
}

impl Drop for GivenProject<'_> {
    fn drop(&mut self) {
        if !self.is_kept
            && let Err(error) = self.take_back()
        {
            log::warn!("undo the project of a refused snapshot: {}", error.chain());
        }
        self.projects.end_search(self.row.project);
    }
}
