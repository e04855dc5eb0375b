//! Charging trees again, beside the requests: those that came back from a backup,
//! or from another disk, by somebody who knows no projects.
//!
//! `<id>` itself leaves its project first, and is put into it last: cut short, it
//! tells the next start that there is something left to do. Nobody makes anything in
//! `<id>`, so nothing escapes its project meanwhile. The directories in it come
//! before what they hold: what a container makes in them is charged by itself.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use super::Projects;
use crate::error::{Error, ErrorKind, Result};
use crate::quota;
use crate::snapshotter::in_use;
use crate::sys;
use crate::tree::{self, Visited};
use crate::types::{Kind, ProjectId, SnapshotId, Volume};
use crate::util::fault_point::fault_point;
use crate::util::threads::Background;
use crate::volume::SnapshotDirs;

/// The snapshots whose trees are to be charged.
#[derive(Default)]
pub(super) struct Uncharged {
    waiting: BTreeSet<SnapshotId>,
    under_way: Option<SnapshotId>,
    /// Until they are asked for again.
    failed: HashSet<SnapshotId>,
}

impl Uncharged {
    fn is_pending(&self, id: SnapshotId) -> bool {
        self.under_way == Some(id) || self.waiting.contains(&id)
    }

    fn begin_next(&mut self) -> Option<SnapshotId> {
        self.under_way = self.waiting.pop_first();
        self.under_way
    }
}

impl Projects {
    /// Has these snapshots charged to their projects, beside the requests.
    pub(in crate::snapshotter) fn recharge_later(&self, ids: &[SnapshotId]) {
        self.uncharged.change(|uncharged| {
            for id in ids {
                uncharged.failed.remove(id);
                uncharged.waiting.insert(*id);
            }
        });
    }

    /// Whether part of a snapshot's tree may not be charged to its project.
    pub(in crate::snapshotter) fn is_uncharged(&self, id: SnapshotId) -> bool {
        self.uncharged
            .look(|uncharged| uncharged.is_pending(id) || uncharged.failed.contains(&id))
    }

    /// Whether a snapshot's tree is being charged, or waits for that.
    pub(super) fn is_recharge_pending(&self, id: SnapshotId) -> bool {
        self.uncharged.look(|uncharged| uncharged.is_pending(id))
    }

    /// Starts the thread, which calls `on_missing_volume` when it cannot go on without
    /// the writable volume. Stopped, it ends within a file.
    pub(in crate::snapshotter) fn start_charger(
        self: &Arc<Projects>,
        on_missing_volume: impl Fn() + Send + 'static,
    ) -> Result<Background> {
        let stop = |projects: &Projects| projects.uncharged.stop();
        Background::start("charger", self, stop, move |projects| {
            if let Err(errno) = sys::lower_io_priority() {
                log::debug!("the charger has no idle I/O priority: {errno}");
            }
            let is_idle = |uncharged: &Uncharged| uncharged.waiting.is_empty();
            let begin_next = || {
                projects
                    .uncharged
                    .wait_while(is_idle, Uncharged::begin_next)
            };
            while let Some(id) = begin_next().flatten() {
                let Err(error) = projects.charge(id) else {
                    continue;
                };
                if error.kind() == ErrorKind::Unavailable {
                    continue;
                }
                log::error!("snapshot {id} stays out of its project: {}", error.chain());
                if projects.volumes.open(Volume::Writable).is_err() {
                    on_missing_volume();
                }
            }
        })
    }

    /// Charges all that wait, in the calling thread.
    pub(in crate::snapshotter) fn recharge_now(&self) -> Result<()> {
        while let Some(id) = self.uncharged.look(Uncharged::begin_next) {
            self.charge(id)?;
        }
        Ok(())
    }

    fn charge(&self, id: SnapshotId) -> Result<()> {
        let charged = match self.charge_snapshot(id) {
            // Removed meanwhile.
            Err(_) if self.is_gone(id) => Ok(()),
            charged => charged,
        };
        self.uncharged.look(|uncharged| {
            uncharged.under_way = None;
            if charged.is_err() {
                uncharged.failed.insert(id);
            }
        });
        charged
    }

    fn is_gone(&self, id: SnapshotId) -> bool {
        let reader = self.store.read();
        reader.is_ok_and(|reader| matches!(reader.place(id), Ok(None)))
    }

    fn charge_snapshot(&self, id: SnapshotId) -> Result<()> {
        let Some(given) = self.store.read()?.project_of(id)? else {
            return Ok(());
        };
        let project = given.project;
        let dirs = self.volumes.open(Volume::Writable)?;
        let parts = match dirs.open_parts(id) {
            // Reported by who looks for layers.
            Err(error) if error.kind() == ErrorKind::DataLoss => return Ok(()),
            parts => parts?,
        };
        self.charge_tree(id, &parts, project)?;
        log::warn!("snapshot {id} was not charged to project {project}, and is now");
        Ok(())
    }

    /// Charges a tree to a project, whatever it was charged to.
    fn charge_tree(&self, id: SnapshotId, parts: &SnapshotDirs, project: ProjectId) -> Result<()> {
        quota::set_project(&parts.top, ProjectId::NONE)?;
        let scratch = match self.may_make_anew(id)? {
            true => Some(parts.ensure_scratch()?),
            false => None,
        };
        if let Some(scratch) = &scratch {
            quota::set_project(scratch, project)?;
        }
        let mut is_top = true;
        let (mut failures, mut first, mut linked) = (0_u64, None, 0_u64);
        tree::visit_open(&parts.top, |visited| {
            if std::mem::take(&mut is_top) {
                return Ok(());
            }
            if self.uncharged.is_stopping() {
                return Err(Error::new(ErrorKind::Unavailable, "the daemon is stopping"));
            }
            let charged = match (visited, &scratch) {
                (Visited::Directory(fd), _) => quota::set_project(fd, project),
                (Visited::File(fd), _) => {
                    quota::charge_file(fd, project).inspect(|()| fault_point("file-charged"))
                }
                // It may have been mounted meanwhile, and be somebody's to change.
                (Visited::Node(parent, name), Some(scratch)) if !self.is_mounted(id)? => {
                    tree::remake(parent, name, scratch).map(|is_made| linked += u64::from(!is_made))
                }
                // They take inodes, and hardly a block.
                (Visited::Node(..), _) => Ok(()),
            };
            // One that nobody may change (chattr(1), immutable), for one.
            if let Err(error) = charged {
                failures += 1;
                first.get_or_insert(error);
            }
            Ok(())
        })?;
        if let Some(error) = first {
            log::warn!(
                "{failures} files of snapshot {id} stay out of project {project}, the first: {}",
                error.chain()
            );
        }
        if linked > 0 {
            log::warn!(
                "{linked} links and nodes of snapshot {id} stay out of project {project}, \
                 because they have several names: they cannot be renamed"
            );
        }
        if scratch.is_some() {
            parts.remove_scratch()?;
        }
        quota::set_project(&parts.top, project)
    }

    /// Whether links and nodes may be made anew, which cannot be charged as what they
    /// are, and so can neither be renamed nor linked in directories that hand a project
    /// on (rename(2), EXDEV). Nobody does that in a layer. In what is mounted, the
    /// kernel has its own idea of which inodes there are.
    fn may_make_anew(&self, id: SnapshotId) -> Result<bool> {
        let place = self.store.read()?.place(id)?;
        let is_active = place.is_some_and(|place| place.kind == Kind::Active);
        Ok(is_active && !self.is_mounted(id)?)
    }

    fn is_mounted(&self, id: SnapshotId) -> Result<bool> {
        in_use::is_mounted(&self.store, &self.volumes, id, Volume::Writable)
    }
}
