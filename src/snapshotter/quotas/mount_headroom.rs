//! Room for the start of a container that has filled its limit.
//!
//! overlayfs removes `work/work` at every mount and creates it again, for which XFS
//! reserves blocks and an inode. XFS enforces the limit for root as well, so in a full
//! project the mount is read-only, or fails. Therefore a request for the mounts of a
//! snapshot lends the snapshot what it lacks: the kernel's limit is raised, and lowered
//! to the recorded limit when the mount has been seen, or after a while.
//!
//! What a container writes during a loan stays. Restarts must not add up to a higher
//! limit, so the loan is counted from the recorded limit, ends before a runtime has
//! started the container's program, and is not given to a mounted snapshot.
//!
//! Two other designs do not work. Room that is always there would be filled by the
//! first run, and be missing at the second start. A `work` outside of the project
//! fails, because overlayfs copies files up by renaming them from there, and such a
//! rename into a project is refused (rename(2), EXDEV).
//!
//! ext4 lets root mount in a full project, but gets loans as well: whether
//! overlayfs acts with root's rights depends on the kernel.
//!
//! Loans are in memory only. The database always has the limit without the loan, and the
//! next start after a crash sets that limit.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Projects;
use crate::error::Result;
use crate::snapshotter::limits::with_room;
use crate::types::{Limits, SnapshotId, Volume};
use crate::util::threads::Background;
use crate::volume::WorkMark;

/// How often to check whether the mount has happened. This is less than a runtime takes
/// from the mount to the start of a container's program.
const LOOK: Duration = Duration::from_millis(10);
/// How long a loan is kept after overlayfs has created `work/work`, if the mount itself is
/// not seen, as in another mount namespace. overlayfs creates that directory before the
/// mount is complete.
const COMPLETES: Duration = Duration::from_millis(500);
/// How long a loan is kept if no mount begins. Callers may take long from the request for
/// mounts to the mount, if a disk beneath the layers has to wake up.
const LONGEST: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Loan {
    until: Instant,
    /// The trace of the last mount before the loan; the next mount leaves another one.
    work: Option<WorkMark>,
    /// Whether overlayfs has begun to mount the snapshot.
    is_mount_begun: bool,
}

impl Projects {
    /// Raises the limit of a snapshot if it cannot be mounted within the limit. If that
    /// fails, the caller still returns the mounts, because they may work.
    pub(in crate::snapshotter) fn lend_room(&self, id: SnapshotId) {
        if let Err(error) = self.try_to_lend_room(id) {
            log::warn!(
                "the limit of snapshot {id} cannot be raised for its mount, so its container does \
                 not start if it has filled the limit: {}",
                error.chain()
            );
        }
    }

    fn try_to_lend_room(&self, id: SnapshotId) -> Result<()> {
        let given = self.store.read()?.project_of(id)?;
        let Some(given) = given.filter(|given| given.limits != Limits::NONE) else {
            return Ok(());
        };
        let dirs = self.volumes.open(Volume::Writable)?;
        let Some(quotas) = self.available(&dirs)? else {
            return Ok(());
        };
        let lent = with_room(given.limits, quotas.held(given.project)?.usage);
        if lent == given.limits {
            return Ok(());
        }
        // The container of a mounted snapshot runs, and would only write more.
        if self.is_mounted(id)? {
            return Ok(());
        }
        let _claim = self.ids.claim(id);
        // The limits may have changed before the claim was taken.
        let Some(given) = self.store.read()?.project_of(id)? else {
            return Ok(());
        };
        let lent = with_room(given.limits, quotas.held(given.project)?.usage);
        if lent == given.limits {
            return Ok(());
        }
        let work = dirs.work_mark(id);
        quotas.set_limits(given.project, lent)?;
        let loan = Loan {
            until: Instant::now() + LONGEST,
            work,
            is_mount_begun: false,
        };
        // An earlier loan of the snapshot is replaced, because it may belong to another
        // mount.
        self.loans.change(|loans| loans.insert(id, loan));
        log::debug!("snapshot {id} has filled its limit, which is raised for its mount");
        Ok(())
    }

    /// Starts the thread that lowers the limits again.
    pub(in crate::snapshotter) fn start_lender(self: &Arc<Projects>) -> Result<Background> {
        let stop = |projects: &Projects| projects.loans.stop();
        Background::start("lender", self, stop, |projects| {
            while let Some(loans) = projects.await_loans() {
                for (id, loan) in loans {
                    projects.look_at_loan(id, loan);
                }
            }
        })
    }

    /// Waits until there is a loan, and then until the next check. Returns `None` once the
    /// daemon stops.
    fn await_loans(&self) -> Option<Vec<(SnapshotId, Loan)>> {
        self.loans.wait_while(HashMap::is_empty, |_| ())?;
        if !self.loans.pause(LOOK) {
            return None;
        }
        let all = |loans: &mut HashMap<_, _>| loans.iter().map(|(id, loan)| (*id, *loan)).collect();
        Some(self.loans.look(all))
    }

    /// Replaces `loan` by `by`, or ends it. Does nothing and returns `false` if a mount has
    /// got a new loan meanwhile.
    fn replace_loan(&self, id: SnapshotId, loan: Loan, by: Option<Loan>) -> bool {
        self.loans.look(|loans| {
            let is_it = loans.get(&id) == Some(&loan);
            if is_it {
                loans.remove(&id);
                loans.extend(by.map(|by| (id, by)));
            }
            is_it
        })
    }

    fn look_at_loan(&self, id: SnapshotId, mut loan: Loan) {
        let now = Instant::now();
        if now < loan.until {
            if !loan.is_mount_begun {
                let volume = self.volumes.open(Volume::Writable);
                if volume.ok().and_then(|dirs| dirs.work_mark(id)) == loan.work {
                    return;
                }
                let begun = Loan {
                    is_mount_begun: true,
                    until: loan.until.min(now + COMPLETES),
                    ..loan
                };
                if !self.replace_loan(id, loan, Some(begun)) {
                    return;
                }
                loan = begun;
            }
            if !self.is_mounted(id).unwrap_or(false) {
                return;
            }
        }
        if let Err(error) = self.take_room_back(id, loan) {
            log::warn!(
                "the limits of snapshot {id} stay raised until the next start: {}",
                error.chain()
            );
        }
    }

    fn take_room_back(&self, id: SnapshotId, loan: Loan) -> Result<()> {
        // While this claim is held, nothing is lent and no limit changes.
        let _claim = self.ids.claim(id);
        if !self.replace_loan(id, loan, None) {
            return Ok(());
        }
        let reader = self.store.read()?;
        let Some(given) = reader.project_of(id)? else {
            return Ok(());
        };
        // The limits of a project without a snapshot are cleared when its id is taken back.
        let loose = reader.loose_projects()?;
        if loose.iter().any(|loose| loose.project == given.project) {
            return Ok(());
        }
        let dirs = self.volumes.open(Volume::Writable)?;
        self.require_limits(&dirs)?
            .set_limits(given.project, given.limits)
    }
}
