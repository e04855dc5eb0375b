//! The project of a new snapshot that is not in the database yet.

use super::Projects;
use crate::error::Result;
use crate::quota::{self, Quotas};
use crate::store::{Project, Transaction};
use crate::types::{Limits, ProjectId, SnapshotId};
use crate::volume::Dirs;

/// A project that a new snapshot will get, before the project's id is picked.
pub(in crate::snapshotter) struct PlannedProject<'a> {
    pub(super) quotas: Quotas<'a>,
    pub(super) dirs: &'a Dirs,
    pub(super) limits: Limits,
}

/// A project that is set on a snapshot's directories before the snapshot is entered. If
/// this value is dropped without [`GivenProject::keep`], the project is taken back.
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
        // An id that has limits is not picked, so this project has none yet.
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

    /// Records the project, in the transaction that enters the snapshot.
    pub(in crate::snapshotter) fn record(&self, transaction: &Transaction<'_>) -> Result<()> {
        transaction.record_project(&self.row)
    }

    /// Keeps the project, because the snapshot is entered.
    pub(in crate::snapshotter) fn keep(mut self) {
        self.is_kept = true;
    }

    /// Takes the project back. The limits are cleared first, because no row records which
    /// snapshot they belong to. The caller then moves the directories to the trash.
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
            log::warn!(
                "project {} of a snapshot that was not created stays in use: {}",
                self.row.project,
                error.chain()
            );
        }
        self.projects.end_search(self.row.project);
    }
}
