//! Repairing the findings of an inspection, while no daemon runs.

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
    /// The snapshots that a repair of these findings drops: missing or damaged layers, and
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

    /// Repairs these findings as far as possible, and does everything that a start does. No
    /// other process may have the database or the volumes open.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if the writable volume is needed for the repair
    /// and missing; errors of the database and the disks. The next try continues where this
    /// one ended.
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
                "the database is not the latest, and only the writable volume shows which ids were \
                 given out since: mount that volume, or give it up with --reset-writable",
            ));
        }
        if has(|problem| *problem == Problem::MarkMissing) {
            // The contents of the volume were not inspected, so nothing on it is moved in
            // this run.
            return self.volumes.mark_writable();
        }
        let doomed = self.doomed(findings)?;

        let mut transaction = self.store.write()?;
        // A tombstone permits the deletion of a damaged layer's directory. The directories
        // of the snapshots above the layer are whole: they get no tombstone, and are set
        // aside.
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
            // If the database or a disk is an older copy, or belongs to another root, the
            // counted directory may not be this layer.
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
        // The changes are written into the database file itself, because the file would be
        // refused if its log went missing.
        self.store.settle()?;
        self.relocator.recover_moves()?;
        self.mend()
            .context(|| "repair the volumes, as a start does")?;
        self.projects.recharge_now()
    }

    /// The highest id among the names in `snapshots/` on both volumes; 0 if there is none.
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
