//! Charging the files of snapshots to their projects again, in the background, after a
//! program that does not know projects has copied them from a backup or from another disk.
//!
//! The directory `<id>` leaves its project first and returns to it last, so that after a
//! crash the next start sees that the work is not finished. Nothing is created directly in
//! `<id>`, so nothing escapes the project meanwhile. A directory is charged before its
//! entries, so that the kernel charges files which a container creates in it.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use super::Projects;
use crate::error::{Error, ErrorKind, Result};
use crate::quota;
use crate::snapshotter::in_use::{self, Sureness};
use crate::tree::{self, Visited};
use crate::types::{Kind, ProjectId, SnapshotId, Volume};
use crate::util::fault_point::fault_point;
use crate::util::threads::{Background, lower_io_priority};
use crate::volume::SnapshotDirs;

/// The snapshots whose files have to be charged.
#[derive(Default)]
pub(super) struct Uncharged {
    waiting: BTreeSet<SnapshotId>,
    under_way: Option<SnapshotId>,
    /// Snapshots that could not be charged. [`Projects::recharge_later`] tries them again.
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
    /// Asks the background thread to charge the files of these snapshots to their projects.
    pub(in crate::snapshotter) fn recharge_later(&self, ids: &[SnapshotId]) {
        self.uncharged.change(|uncharged| {
            for id in ids {
                uncharged.failed.remove(id);
                uncharged.waiting.insert(*id);
            }
        });
    }

    /// Whether some files of a snapshot may not be charged to its project.
    pub(in crate::snapshotter) fn is_uncharged(&self, id: SnapshotId) -> bool {
        self.uncharged
            .look(|uncharged| uncharged.is_pending(id) || uncharged.failed.contains(&id))
    }

    /// Whether the files of a snapshot are being charged, or are waiting for that.
    pub(super) fn is_recharge_pending(&self, id: SnapshotId) -> bool {
        self.uncharged.look(|uncharged| uncharged.is_pending(id))
    }

    /// Starts the thread that charges files. The thread calls `on_missing_volume` if it
    /// cannot go on without the writable volume. After a stop, the thread ends within one
    /// file.
    pub(in crate::snapshotter) fn start_charger(
        self: &Arc<Projects>,
        on_missing_volume: impl Fn() + Send + 'static,
    ) -> Result<Background> {
        let stop = |projects: &Projects| projects.uncharged.stop();
        Background::start("charger", self, stop, move |projects| {
            lower_io_priority("the charger's thread");
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
                log::error!(
                    "the limit of snapshot {id} counts only a part of its files until the next \
                     start: {}",
                    error.chain()
                );
                if projects.volumes.open(Volume::Writable).is_err() {
                    on_missing_volume();
                }
            }
        })
    }

    /// Charges all waiting snapshots, in the calling thread.
    pub(in crate::snapshotter) fn recharge_now(&self) -> Result<()> {
        while let Some(id) = self.uncharged.look(Uncharged::begin_next) {
            self.charge(id)?;
        }
        Ok(())
    }

    fn charge(&self, id: SnapshotId) -> Result<()> {
        let charged = match self.charge_snapshot(id) {
            // Nothing is left to charge if the snapshot was removed meanwhile.
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
            // The start reports a missing directory when it looks for lost layers.
            Err(error) if error.kind() == ErrorKind::DataLoss => return Ok(()),
            parts => parts?,
        };
        self.charge_tree(id, &parts, project)?;
        log::warn!(
            "not all files of snapshot {id} counted towards its limits; now they are charged to \
             its project {project}"
        );
        Ok(())
    }

    /// Charges the files of a snapshot to a project, whatever project they were charged to
    /// before.
    fn charge_tree(&self, id: SnapshotId, parts: &SnapshotDirs, project: ProjectId) -> Result<()> {
        quota::set_project(&parts.top, ProjectId::NONE)?;
        let scratch = match self.may_replace_nodes(id)? {
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
                // If the snapshot was mounted meanwhile, its nodes stay, because its
                // container may use them.
                (Visited::Node(parent, name), Some(scratch)) if !self.is_mounted(id)? => {
                    tree::remake(parent, name, scratch).map(|is_made| linked += u64::from(!is_made))
                }
                // Links and nodes that stay outside the project take inodes, but hardly any
                // blocks.
                (Visited::Node(..), _) => Ok(()),
            };
            // A file that cannot be charged, for example because it is immutable
            // (chattr(1)), does not stop the work.
            if let Err(error) = charged {
                failures += 1;
                first.get_or_insert(error);
            }
            Ok(())
        })?;
        if let Some(error) = first {
            log::warn!(
                "the limit of snapshot {id} does not count {failures} files, because they cannot \
                 be charged to project {project}; the first error: {}",
                error.chain()
            );
        }
        if linked > 0 {
            log::warn!(
                "{linked} symbolic links and device nodes of snapshot {id} stay out of its project \
                 {project}, because they have several names: the snapshot's container can use \
                 them, but not rename them"
            );
        }
        if scratch.is_some() {
            parts.remove_scratch()?;
        }
        quota::set_project(&parts.top, project)
    }

    /// Whether the symbolic links and device nodes of a snapshot may be created again. The
    /// existing ones cannot be charged to a project, and so can neither be renamed nor
    /// linked in directories that give a project to their entries (rename(2), EXDEV).
    /// Layers need no such renames, and in a mounted snapshot the kernel holds the old
    /// inodes.
    fn may_replace_nodes(&self, id: SnapshotId) -> Result<bool> {
        let place = self.store.read()?.place(id)?;
        let is_active = place.is_some_and(|place| place.kind == Kind::Active);
        Ok(is_active && !self.is_mounted(id)?)
    }

    pub(super) fn is_mounted(&self, id: SnapshotId) -> Result<bool> {
        let (store, volumes) = (&self.store, &self.volumes);
        in_use::is_mounted(store, volumes, id, Volume::Writable, Sureness::Possible)
    }
}
