//! Turning an active snapshot into a layer.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Snapshotter, SyncMode, labels};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::{Commit, DataBytes};
use crate::tree;
use crate::types::{Labels, Quoted, SnapshotId, Volume};
use crate::util::lock::lock;
use crate::util::undo::Undo;
use crate::volume::Dirs;

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
        let volume = snapshot.volume.ok_or_else(|| {
            Error::data_loss("the database is damaged: the active snapshot is on no volume")
        })?;

        let dirs = self.volumes.open(volume)?;
        if self.options.sync == SyncMode::AtCommit {
            let begun = Instant::now();
            self.flush(&dirs, volume)?;
            tell_wait(volume, begun.elapsed());
        }
        // After the flush: until then some file systems cannot tell blocks.
        let content = tree::count(self.open_upper(key, &snapshot, &dirs)?)?;
        self.refuse_suspect(snapshot.id, volume)?;
        self.enter_layer(
            volume,
            &Commit {
                id: snapshot.id,
                key,
                name,
                parent,
                labels: &labels,
                content,
                data_bytes: match self.is_mounted(snapshot.id, volume)? {
                    true => DataBytes::WasMounted,
                    false => DataBytes::Counted(content.data_bytes),
                },
            },
        )?;
        self.unpacks.end(snapshot.id);
        self.walks.forget(snapshot.id);
        self.drop_lower_links(snapshot.id);
        match volume {
            Volume::Writable => self.relocator.wake(),
            Volume::Image => self.relocator.tell_end(),
        }
        Ok(())
    }

    /// Under the writer's lock from the row to the link: whoever commits,
    /// removes, moves or sweeps the same snapshot comes before or after.
    fn enter_layer(&self, volume: Volume, commit: &Commit<'_>) -> Result<()> {
        let linked = self.store.together(|transaction| {
            transaction.rows().commit(commit)?;
            transaction.rows().forget_lowers(commit.id)?;
            if volume == Volume::Image {
                return Ok(None);
            }
            let link = Undo::new("the link of a refused commit", move || {
                let removed = self.volumes.image().remove_link(commit.id);
                if removed.is_err() {
                    self.note_stray(Volume::Image);
                }
                removed
            });
            self.volumes.link_home(commit.id)?;
            Ok(Some(link))
        })?;
        linked.into_iter().for_each(Undo::keep);
        Ok(())
    }

    /// Makes everything on a volume durable. A disk that fails to write says so
    /// once, to whoever asks first: the data of every snapshot that was there then
    /// may be what it has lost.
    pub(super) fn flush(&self, dirs: &Dirs, volume: Volume) -> Result<()> {
        // One after another: who comes second must hear of a failure that the
        // kernel told the first.
        let _syncing = lock(&self.syncing[volume as usize]);
        let flushed = dirs.sync();
        if let Err(error) = &flushed
            && error.kind() == ErrorKind::DataLoss
        {
            let highest = self.store.read().and_then(|reader| reader.highest_id());
            let highest = highest.unwrap_or(u64::MAX);
            self.suspect_up_to[volume as usize].fetch_max(highest, Ordering::AcqRel);
            log::error!("the {volume} volume has failed to write data: look at its disk");
        }
        flushed
    }

    fn refuse_suspect(&self, id: SnapshotId, volume: Volume) -> Result<()> {
        if id.number() > self.suspect_up_to[volume as usize].load(Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::data_loss(format!(
            "the {volume} volume has failed to write data while this snapshot was being \
                 filled: remove it, look at the disk, and fill it anew"
        )))
    }
}

/// What a slow disk costs is told where somebody may look for the reason why a
/// pull takes long: containerd waits meanwhile.
const SLOW_FLUSH: Duration = Duration::from_secs(2);

fn tell_wait(volume: Volume, waited: Duration) {
    let level = match waited >= SLOW_FLUSH {
        true => log::Level::Info,
        false => log::Level::Debug,
    };
    log::log!(
        level,
        "a commit has waited {} ms for the disk of the {volume} volume",
        waited.as_millis()
    );
}
