//! Turning an active snapshot into a layer.

use super::{Snapshotter, SyncMode, labels};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Context, Result};
use crate::store::Commit;
use crate::tree;
use crate::types::{Kind, Labels, Quoted, SnapshotId, Volume};

impl Snapshotter {
    /// Turns the active snapshot `key` into the layer `name`; with `parent`,
    /// onto a parent named only now. What it takes does not depend on how many
    /// bytes the snapshot holds, only on how many of them the disk still has to
    /// write: containerd calls this within a transaction of its own.
    ///
    /// # Errors
    ///
    /// See [`crate::store::Rows::committable`];
    /// [`ErrorKind::InvalidArgument`] for a bad name or label;
    /// [`ErrorKind::FailedPrecondition`] if the writable volume is needed and
    /// not there. The snapshot stays as it was then.
    pub fn commit(&self, key: &str, name: &str, parent: &str, labels: Labels) -> Result<()> {
        self.commit_layer(key, name, parent, labels)
            .context(|| format!("commit snapshot {} as {}", Quoted(key), Quoted(name)))
    }

    fn commit_layer(&self, key: &str, name: &str, parent: &str, labels: Labels) -> Result<()> {
        labels::check_key("key", key)?;
        labels::check_key("name", name)?;
        let labels = labels::check_labels(labels)?;
        let (snapshot, _) = self.store.read()?.committable(key, name, parent)?;
        let volume = snapshot
            .volume
            .expect("an active snapshot has a directory, by the schema of create");

        let dirs = self.volumes.open(volume)?;
        let usage = tree::count_usage(dirs.open_upper(snapshot.id)?)?;
        if self.options.sync == SyncMode::AtCommit {
            dirs.sync()?;
        }
        if volume == Volume::Writable {
            self.volumes.link_home(snapshot.id)?;
        }
        let committed = self.enter_layer(&Commit {
            key,
            name,
            parent,
            labels: &labels,
            usage,
        });
        if committed.is_err() && volume == Volume::Writable {
            self.drop_link_unless_committed(snapshot.id);
        }
        self.relocator.wake();
        committed
    }

    fn enter_layer(&self, commit: &Commit<'_>) -> Result<()> {
        let transaction = self.store.write()?;
        transaction.rows().commit(commit)?;
        transaction.commit()
    }

    /// After a commit that failed at its last step. Another commit of the same
    /// snapshot may have won meanwhile, and the link is its own then.
    fn drop_link_unless_committed(&self, id: SnapshotId) {
        let dropped =
            self.store
                .write()
                .and_then(|transaction| match transaction.rows().place(id)? {
                    Some(place) if place.kind == Kind::Committed => Ok(()),
                    _ => self.volumes.image().remove_link(id),
                });
        if let Err(error) = dropped {
            self.note_stray(Volume::Image);
            log::warn!("undo the link of a refused commit: {}", error.chain());
        }
    }
}
