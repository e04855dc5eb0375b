//! Charging trees again, beside the requests: those that came back from a backup,
//! or from another disk, by somebody who knows no projects.
//!
//! `<id>` itself leaves its project first, and is put into it last: cut short, it
//! tells the next start that there is something left to do. Nobody makes anything in
//! `<id>`, so nothing escapes its project meanwhile. The directories in it come
//! before what they hold: what a container makes in them is charged by itself.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::error::{Error, ErrorKind, Result};
use crate::quota;
use crate::snapshotter::Snapshotter;
use crate::sys;
use crate::tree::{self, Visited};
use crate::types::{Kind, ProjectId, SnapshotId, Volume};
use crate::util::fault_point::fault_point;
use crate::util::lock::lock;
use crate::util::threads::Background;
use crate::volume::Parts;

/// The snapshots whose trees are to be charged.
#[derive(Default)]
pub(in crate::snapshotter) struct Uncharged {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: BTreeSet<SnapshotId>,
    under_way: Option<SnapshotId>,
    /// Until somebody asks for them again.
    failed: HashSet<SnapshotId>,
    is_stopping: bool,
}

impl State {
    fn is_pending(&self, id: SnapshotId) -> bool {
        self.under_way == Some(id) || self.waiting.contains(&id)
    }

    fn begin_next(&mut self) -> Option<SnapshotId> {
        self.under_way = self.waiting.pop_first();
        self.under_way
    }
}

impl Uncharged {
    pub(in crate::snapshotter) fn add(&self, ids: &[SnapshotId]) {
        let mut state = lock(&self.state);
        for id in ids {
            state.failed.remove(id);
            state.waiting.insert(*id);
        }
        self.changed.notify_all();
    }

    /// Whether part of its tree may not be charged to its project.
    pub(in crate::snapshotter) fn has(&self, id: SnapshotId) -> bool {
        let state = lock(&self.state);
        state.is_pending(id) || state.failed.contains(&id)
    }

    /// Whether that is being dealt with.
    pub(super) fn is_pending(&self, id: SnapshotId) -> bool {
        lock(&self.state).is_pending(id)
    }

    fn begin_next(&self) -> Option<SnapshotId> {
        lock(&self.state).begin_next()
    }

    /// Waits while there is none. `None` at the stop.
    fn await_next(&self) -> Option<SnapshotId> {
        let waited = self.changed.wait_while(lock(&self.state), |state| {
            state.waiting.is_empty() && !state.is_stopping
        });
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        match state.is_stopping {
            true => None,
            false => state.begin_next(),
        }
    }

    fn end(&self, id: SnapshotId, is_charged: bool) {
        let mut state = lock(&self.state);
        state.under_way = None;
        if !is_charged {
            state.failed.insert(id);
        }
    }

    fn stop(&self) {
        lock(&self.state).is_stopping = true;
        self.changed.notify_all();
    }
}

impl Snapshotter {
    /// Starts the thread. Told to end, it does so within a file.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Internal`] if the system gives no thread.
    pub fn start_charger(self: &Arc<Snapshotter>) -> Result<Background> {
        let (told, charging) = (Arc::clone(self), Arc::clone(self));
        let tell_to_end = move || {
            told.begin_stop();
            told.uncharged.stop();
        };
        Background::start("charger", tell_to_end, move || {
            if let Err(errno) = sys::lower_io_priority() {
                log::debug!("the charger has no idle I/O priority: {errno}");
            }
            while let Some(id) = charging.uncharged.await_next() {
                let Err(error) = charging.charge(id) else {
                    continue;
                };
                if error.kind() == ErrorKind::Unavailable {
                    continue;
                }
                log::error!("snapshot {id} stays out of its project: {}", error.chain());
                if charging.volumes.open(Volume::Writable).is_err() {
                    // Once it is back, a Cleanup asks for it again.
                    charging.note_stray(Volume::Writable);
                }
            }
        })
    }

    /// Charges all that wait, in the calling thread.
    pub(in crate::snapshotter) fn charge_waiting(&self) -> Result<()> {
        while let Some(id) = self.uncharged.begin_next() {
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
        self.uncharged.end(id, charged.is_ok());
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
    fn charge_tree(&self, id: SnapshotId, parts: &Parts, project: ProjectId) -> Result<()> {
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
            if self.stopping.load(Ordering::Relaxed) {
                return Err(Error::new(ErrorKind::Unavailable, "the daemon is stopping"));
            }
            let charged = match (visited, &scratch) {
                (Visited::Directory(fd), _) => quota::set_project(fd, project),
                (Visited::File(fd), _) => {
                    quota::charge_file(fd, project).inspect(|()| fault_point("file-charged"))
                }
                // It may have been mounted meanwhile, and be somebody's to change.
                (Visited::Node(parent, name), Some(scratch))
                    if !self.is_mounted(id, Volume::Writable)? =>
                {
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
        Ok(is_active && !self.is_mounted(id, Volume::Writable)?)
    }
}
