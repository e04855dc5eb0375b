//! Removing snapshots, and giving back what they took.

use super::{Snapshotter, in_use, labels};
use crate::error::{Context, ErrorKind, Result};
use crate::store::{Place, Transaction};
use crate::types::{Quoted, SnapshotId, Volume};

impl Snapshotter {
    /// Removes a snapshot that nothing stands on. Its bytes go to the trash.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::FailedPrecondition`] if others
    /// stand on it.
    pub fn remove(&self, key: &str) -> Result<()> {
        self.remove_snapshot(key)
            .context(|| format!("remove snapshot {}", Quoted(key)))
    }

    fn remove_snapshot(&self, key: &str) -> Result<()> {
        labels::check_key("key", key)?;
        let claim = self.claim(key)?;
        let (removed, released) = self.strike_out(key)?;

        self.flusher.end_unpack(removed.id);
        self.walks.forget(removed.id);
        self.drop_lower_links(removed.id);

        // The snapshot is gone by now, so what fails here must not be told as
        // if it were not: its bytes are found again by Cleanup.
        let own = removed.volume.map(|volume| (volume, removed.id));
        let left = released.iter().map(|layer| (Volume::Writable, *layer));
        for (volume, id) in own.into_iter().chain(left) {
            let trashed = self.volumes.open(volume).and_then(|dirs| {
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
                    "remove snapshots/{id} from the {volume} volume: {}",
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

    /// Removes the row; returns what it was, and the layers whose old directory
    /// nothing needs any more. Also on a full disk: alone then, as it may be what
    /// others do at the same time that is too much.
    fn strike_out(&self, key: &str) -> Result<(Place, Vec<SnapshotId>)> {
        let alone = || {
            let mut transaction = self.store.write()?;
            let struck = self.strike_out_within(&transaction, key)?;
            transaction.commit()?;
            Ok(struck)
        };
        let mut struck = self
            .store
            .together(|transaction| self.strike_out_within(transaction, key));
        if fails_as(&struck, ErrorKind::Unavailable) {
            struck = alone();
        }
        if fails_as(&struck, ErrorKind::ResourceExhausted) {
            self.store.make_room();
            struck = alone();
        }
        struck
    }

    fn strike_out_within(
        &self,
        transaction: &Transaction<'_>,
        key: &str,
    ) -> Result<(Place, Vec<SnapshotId>)> {
        transaction.forget_tombstones(&self.trash.take_settled())?;
        // Before the row is gone by which it is known what stands on what.
        let held = match transaction.retired()?.is_empty() {
            true => None,
            false => {
                let mounted = in_use::mounted_on_writable(&self.store, &self.volumes)?;
                Some(transaction.layers_of(&mounted)?)
            }
        };
        let removed = transaction.remove(key)?;
        let released = match held {
            None => Vec::new(),
            Some(held) => transaction.release_retired(&held)?,
        };
        Ok((removed, released))
    }

    /// Gives back the space of everything that was removed from a volume before this call.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if the writable volume is not there;
    /// [`ErrorKind::Internal`] if something cannot be deleted.
    pub fn cleanup(&self, volume: Volume) -> Result<()> {
        let emptied = self.trash.empty(volume);
        match volume {
            Volume::Image => self.relocator.note_room(),
            Volume::Writable => self.store.refill_ballast(),
        }
        emptied.context(|| "clean removed snapshots up")
    }
}

fn fails_as<T>(result: &Result<T>, kind: ErrorKind) -> bool {
    result.as_ref().is_err_and(|error| error.kind() == kind)
}
