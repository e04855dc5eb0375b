//! Unpacks without a parent. Each becomes the first layer of an image, or a layer whose
//! parent is named only at its commit, because containerd unpacks the layers of an image in
//! parallel (capability "rebase", containerd 2.2 and later).
//!
//! containerd writes the deletions of a layer as overlayfs's whiteouts only if the mount is
//! an overlay (`core/diff/apply/apply_linux.go`). A first layer has nothing to delete, so
//! it gets a bind mount, on which a deletion leaves no trace. A layer whose parent is named
//! later needs an overlay; otherwise the files that it deletes would reappear. containerd
//! 2.3 and later announce that parent in a label. containerd 2.2 sends no such label, and
//! older versions unpack only first layers without a parent, so the snapshotter cannot
//! distinguish the two. It refuses the first commit with a parent that was not announced,
//! and from then on gives every unpack without a parent an overlay.

use rustix::fd::AsFd;

use super::Snapshotter;
use super::new_snapshot::Purpose;
use crate::error::{Error, Result};
use crate::mount;
use crate::store::{Rows, Snapshot};
use crate::tree;
use crate::types::{Info, LABEL_PARENT_CHAIN_ID, Labels, Quoted, SnapshotId};

/// The name of a fact in the database: the newest id at the first commit with a late parent
/// that no label had announced. Unpacks with higher ids get an overlay.
const LATE_PARENTS_AFTER: &str = "late_parents_after";

/// Whether an unpack without a parent gets an overlay over the empty directory, rather than
/// a bind mount.
pub(super) fn is_over_empty(rows: &Rows, id: SnapshotId, labels: &Labels) -> Result<bool> {
    if labels.contains_key(LABEL_PARENT_CHAIN_ID) {
        return Ok(true);
    }
    let last = rows.fact(LATE_PARENTS_AFTER)?;
    let last = last.and_then(|id| SnapshotId::from_directory_name(id.as_bytes()));
    Ok(last.is_some_and(|last| id > last))
}

/// Whether an existing snapshot is an unpack without a parent that got an overlay over the
/// empty directory.
pub(super) fn is_stored_over_empty(rows: &Rows, snapshot: &Snapshot) -> Result<bool> {
    let info = &snapshot.info;
    Ok(is_parentless_unpack(info) && is_over_empty(rows, snapshot.id, &info.labels)?)
}

fn is_parentless_unpack(info: &Info) -> bool {
    info.parent.is_empty() && Purpose::of_stored(info) == Purpose::Unpack
}

impl Snapshotter {
    /// Refuses a commit with a late parent if the unpacked directory may lack deletions of
    /// the layer.
    pub(super) fn check_late_parent(&self, snapshot: &Snapshot, parent: &str) -> Result<()> {
        if parent.is_empty() || !snapshot.info.parent.is_empty() {
            return Ok(());
        }
        let naming = format!("the layer's parent {} is named only now", Quoted(parent));
        // In a user namespace, containerd writes no whiteouts, whatever the
        // mount is.
        if mount::probe_user_namespace() {
            return Err(Error::refused(format!(
                "{naming}, and in a user namespace containerd then loses the layer's deletions: \
                 leave \"rebase\" out of the capabilities of the proxy plugin"
            )));
        }
        if !is_parentless_unpack(&snapshot.info)
            || is_stored_over_empty(&*self.store.read()?, snapshot)?
        {
            return Ok(());
        }
        let mut transaction = self.store.write()?;
        // The first record must stay, because every snapshot after it has been given an
        // overlay.
        if transaction.fact(LATE_PARENTS_AFTER)?.is_none() {
            let last = transaction.highest_id()?;
            transaction.record_fact(LATE_PARENTS_AFTER, &last.to_string())?;
            transaction.commit()?;
        }
        Err(Error::refused(format!(
            "{naming}, and no label {LABEL_PARENT_CHAIN_ID} has announced it, so files that the \
             layer deletes might reappear: pull the image again; from now on, unpacked layers keep \
             their deletions"
        )))
    }

    /// Removes the whiteouts of a first layer. They hide nothing, and programs would see
    /// them as device files that cannot be opened. Every device 0:0 is removed, because
    /// overlayfs treats each as a whiteout.
    pub(super) fn drop_whiteouts_of_nothing(
        &self,
        snapshot: &Snapshot,
        parent: &str,
        upper: impl AsFd,
    ) -> Result<()> {
        if parent.is_empty() && is_stored_over_empty(&*self.store.read()?, snapshot)? {
            tree::remove_whiteouts(upper)?;
        }
        Ok(())
    }
}
