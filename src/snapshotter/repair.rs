//! Repairing what an inspection has found, while no daemon runs.

use std::collections::HashSet;

use super::Snapshotter;
use super::problem::{Finding, Problem};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Context, Error, Result};
use crate::store::Snapshot;
use crate::types::{SnapshotId, Volume};
use crate::util::fault_point::fault_point;

impl Snapshotter {
    /// The snapshots that a repair drops: missing or damaged layers, and
    /// everything that stands on them.
    pub fn doomed(&self, findings: &[Finding]) -> Result<Vec<Snapshot>> {
        let fatal = findings.iter().filter(|finding| finding.problem.is_fatal());
        let mut doomed: HashSet<SnapshotId> = fatal.filter_map(|finding| finding.id).collect();
        if doomed.is_empty() {
            return Ok(Vec::new());
        }
        let mut all = self.all_snapshots()?;
        loop {
            let before = doomed.len();
            let stands_on = |snapshot: &&Snapshot| {
                let parent = snapshot.parent_id;
                parent.is_some_and(|parent| doomed.contains(&parent))
            };
            let upon: Vec<_> = all.iter().filter(stands_on).map(|found| found.id).collect();
            doomed.extend(upon);
            if doomed.len() == before {
                break;
            }
        }
        all.retain(|snapshot| doomed.contains(&snapshot.id));
        Ok(all)
    }

    /// Repairs these findings as far as possible, and does what a start does.
    /// No other process may have the database or the volumes open.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if the writable volume is needed for
    /// the repair and not there; errors of the database and the disks. The next
    /// try continues where this one ended.
    pub fn repair(&self, findings: &[Finding]) -> Result<()> {
        let has =
            |wanted: fn(&Problem) -> bool| findings.iter().any(|finding| wanted(&finding.problem));
        let forgets = has(|problem| {
            matches!(
                problem,
                Problem::OtherHistory
                    | Problem::DatabaseOlder { .. }
                    | Problem::DatabaseIncomplete { .. }
            )
        });
        if forgets && has(|problem| matches!(problem, Problem::VolumeMissing { .. })) {
            return Err(Error::refused(
                "the database is not the latest, and only the writable volume shows which numbers \
                 it has given out: mount that volume, or give it up with --reset-writable",
            ));
        }
        if has(|problem| *problem == Problem::MarkMissing) {
            // The contents of the volume were not inspected, so nothing on it is moved in
            // this run.
            return self.volumes.mark_writable();
        }
        let doomed = self.doomed(findings)?;

        let mut transaction = self.store.write()?;
        // The directories of snapshots above a damaged layer are whole: they
        // are set aside.
        let is_damaged = |snapshot: &Snapshot| {
            let mut about = findings.iter().filter(|one| one.id == Some(snapshot.id));
            about.any(|one| matches!(one.problem, Problem::LayerDamaged { .. }))
        };
        for snapshot in doomed.iter().filter(|snapshot| is_damaged(snapshot)) {
            for volume in snapshot.place().volumes() {
                transaction.bury(snapshot.id, volume)?;
            }
        }
        let ids: Vec<_> = doomed.iter().map(|snapshot| snapshot.id).collect();
        transaction.drop_snapshots(&ids)?;
        for finding in findings {
            // If a disk is another day's, or another database's, so may be what is there.
            if let (Problem::LayerChanged { counted, .. }, Some(id), false) =
                (&finding.problem, finding.id, forgets)
            {
                transaction.record_content(id, counted)?;
            }
        }
        transaction.skip_ids_through(self.highest_entry()?)?;
        transaction.forget_copied()?;
        if forgets {
            transaction.forget_all_tombstones()?;
        }
        self.flusher.forget_failures(&transaction)?;
        transaction.commit()?;
        drop(transaction);
        fault_point("repair-recorded");
        // Written into the database file itself, because a copy whose log is
        // missing is refused.
        self.store.settle()?;
        self.relocator.recover_moves()?;
        self.mend()
            .context(|| "repair the volumes, as a start does")?;
        self.projects.recharge_now()
    }

    /// The highest id in a name on either volume; 0 if there is none.
    fn highest_entry(&self) -> Result<u64> {
        let mut highest = 0;
        for volume in [Volume::Image, Volume::Writable] {
            if let Ok(dirs) = self.volumes.open(volume) {
                highest = highest.max(dirs.highest_id()?);
            }
        }
        Ok(highest)
    }
}
