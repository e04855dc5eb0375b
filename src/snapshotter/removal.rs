//! Removing snapshots, and freeing their space.

use super::{Snapshotter, in_use, labels};
use crate::error::{Context, ErrorKind, Result};
use crate::store::{Place, Transaction};
use crate::types::{Quoted, Volume};

impl Snapshotter {
    /// Removes a snapshot that nothing stands on. Its directory goes to the trash.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::FailedPrecondition`] if another snapshot
    /// stands on this one.
    pub fn remove(&self, key: &str) -> Result<()> {
        self.remove_snapshot(key)
            .context(|| format!("remove snapshot {}", Quoted(key)))
    }

    fn remove_snapshot(&self, key: &str) -> Result<()> {
        labels::check_key("key", key)?;
        let claim = self.claim(key)?;
        let removed = self.strike_out(key)?;

        self.flusher.end_unpack(removed.id);
        self.walks.forget(removed.id);
        self.drop_lower_links(removed.id);

        // The row is deleted by now, so a failure from here on must not be reported to the
        // caller. Cleanup finds the directories that are left.
        if let Some(volume) = removed.volume {
            let id = removed.id;
            let trashed = self.volumes.open(volume).and_then(|dirs| {
                // If a person has mounted the snapshot, its files stay until they are
                // unmounted. A person who is about to mount it sees that the row is gone.
                in_use::require_not_by_hand(&self.store, &self.volumes, id)?;
                if let Some(name) = dirs.trash(id)?
                    && self.options.removes_at_once
                {
                    self.trash.delete(&dirs, &name);
                }
                self.trash.note_trashed(id, volume);
                Ok(())
            });
            if let Err(error) = trashed {
                self.trash.note_stray(volume);
                log::warn!(
                    "snapshot {id} is removed, but its directory stays on the {volume} volume \
                     until the next Cleanup: {}",
                    error.chain()
                );
            }
        }
        if removed.is_unmoved() {
            self.links.remove(removed.id);
        }
        drop(claim);
        if self.options.removes_at_once {
            self.relocator.note_room();
        }
        self.relocator.note_end();
        Ok(())
    }

    /// Whether [`Snapshotter::remove`] deletes files, which can take long.
    pub fn removes_at_once(&self) -> bool {
        self.options.removes_at_once
    }

    /// Deletes the row, and returns where the snapshot was. If the disk is full, the
    /// deletion is tried again in a transaction of its own, because concurrent changes may
    /// be those that the disk has no room for.
    fn strike_out(&self, key: &str) -> Result<Place> {
        let strike = |transaction: &Transaction<'_>| {
            transaction.forget_tombstones(&self.trash.take_settled())?;
            transaction.remove(key)
        };
        let alone = || {
            let mut transaction = self.store.write()?;
            let struck = strike(&transaction)?;
            transaction.commit()?;
            Ok(struck)
        };
        let mut struck = self.store.together(strike);
        if fails_as(&struck, ErrorKind::Unavailable) {
            struck = alone();
        }
        if fails_as(&struck, ErrorKind::ResourceExhausted) {
            self.store.make_room();
            struck = alone();
        }
        struck
    }

    /// Frees the space of everything that was removed from a volume before this call.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if the writable volume is missing;
    /// [`ErrorKind::Internal`] if something cannot be deleted.
    pub fn cleanup(&self, volume: Volume) -> Result<()> {
        let emptied = self.trash.empty(volume);
        match volume {
            Volume::Image => self.relocator.note_room(),
            Volume::Writable => self.store.refill_ballast(),
        }
        emptied.context(|| "delete the removed snapshots")
    }
}

fn fails_as<T>(result: &Result<T>, kind: ErrorKind) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == kind)
}
