//! Turning an active snapshot into a layer.

use std::time::{Duration, Instant};

use super::in_use::{Sureness, is_mounted};
use super::label_source::LabelSource;
use super::new_snapshot::is_remap;
use super::{Snapshotter, SyncMode, labels};
#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Context, Error, Result};
use crate::store::{Commit, DataBytes};
use crate::tree;
use crate::types::{Labels, Quoted, Volume};
use crate::util::undo::Undo;

impl Snapshotter {
    /// Turns the active snapshot `key` into the layer `name`. If `parent` is not empty, it
    /// names the parent of the layer, also if Prepare has named none. containerd calls this
    /// within a database transaction of its own. Therefore the duration does not depend on
    /// how many bytes the snapshot holds, only on how many of them the disk still has to
    /// write.
    ///
    /// # Errors
    ///
    /// The errors of [`crate::store::Rows::committable`]; [`ErrorKind::InvalidArgument`]
    /// for a bad name or label; [`ErrorKind::FailedPrecondition`] if the writable volume is
    /// needed and missing. After an error, the snapshot is as it was.
    pub fn commit(&self, key: &str, name: &str, parent: &str, labels: Labels) -> Result<()> {
        self.commit_layer(key, name, parent, labels)
            .context(|| format!("commit snapshot {} as {}", Quoted(key), Quoted(name)))
    }

    fn commit_layer(&self, key: &str, name: &str, parent: &str, labels: Labels) -> Result<()> {
        labels::check_key("key", key)?;
        labels::check_key("name", name)?;
        let mut labels = labels::check_labels(labels)?;
        let ignored = LabelSource::Image.take_ignored(&mut labels);
        self.ignored_labels.note(LabelSource::Image, name, &ignored);
        let look = || self.store.read()?.committable(key, name, parent);
        look()?;
        let _claim = self.claim(key)?;
        // An impossible commit is refused here, before it waits for the disk. Other
        // snapshots may change during that wait, so `commit_snapshot` checks again.
        let (snapshot, _) = look()?;
        let volume = snapshot.volume.ok_or_else(|| {
            Error::data_loss(
                "the database is damaged: it records no volume for this active snapshot",
            )
        })?;

        self.check_late_parent(&snapshot, parent)?;

        let dirs = self.volumes.open(volume)?;
        let upper = self.open_upper(key, &snapshot, &dirs)?;
        self.drop_whiteouts_of_nothing(&snapshot, parent, &upper)?;
        if self.options.sync == SyncMode::AtCommit {
            let begun = Instant::now();
            self.flusher.flush_snapshot(&dirs, snapshot.id, &upper)?;
            log_wait(name, volume, begun.elapsed());
        }
        // The files are counted after the flush, because some file systems allocate blocks
        // only then.
        let content = tree::count_layer(upper)?;
        self.flusher.refuse_suspect(snapshot.id, volume)?;
        let (store, volumes) = (&self.store, &self.volumes);
        let is_mounted = is_mounted(store, volumes, snapshot.id, volume, Sureness::Proved)?;
        self.enter_layer(
            volume,
            &Commit {
                id: snapshot.id,
                key,
                name,
                parent,
                labels: &labels,
                content,
                is_remapped: is_remap(key),
                data_bytes: match is_mounted {
                    true => DataBytes::WasMounted,
                    false => DataBytes::Counted(content.data_bytes),
                },
            },
        )?;
        self.flusher.end_unpack(snapshot.id);
        self.walks.forget(snapshot.id);
        self.drop_lower_links(snapshot.id);
        match volume {
            Volume::Writable => self.relocator.wake(),
            Volume::Image => {
                self.relocator.note_end();
                if self.options.records_digests {
                    self.recorder.note_layer(snapshot.id);
                }
            }
        }
        Ok(())
    }

    /// Records the layer in the database. A layer on the writable volume gets its link
    /// before that, unless the image disk does not answer.
    fn enter_layer(&self, volume: Volume, commit: &Commit<'_>) -> Result<()> {
        let link = (volume == Volume::Writable).then(|| {
            Undo::new("the link to a layer whose commit has failed", || {
                self.links.take_back(commit.id);
                Ok(())
            })
        });
        if link.is_some() {
            self.links.make(commit.id)?;
        }
        self.store.together(|transaction| {
            transaction.commit_snapshot(commit)?;
            transaction.forget_lowers(commit.id)
        })?;
        link.into_iter().for_each(Undo::keep);
        Ok(())
    }
}

/// Commits that wait this long for a flush are logged at level "info". containerd waits
/// with them, and users look in the log for the reason of a slow pull.
const SLOW_FLUSH: Duration = Duration::from_secs(2);

fn log_wait(name: &str, volume: Volume, waited: Duration) {
    let level = match waited >= SLOW_FLUSH {
        true => log::Level::Info,
        false => log::Level::Debug,
    };
    log::log!(
        level,
        "the commit of layer {} has waited {} ms for the disk of the {volume} volume",
        Quoted(name),
        waited.as_millis()
    );
}
