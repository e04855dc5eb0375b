//! The thread that moves layers: which layer moves next, and when to look again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::leftovers::Leftovers;
use super::{EVERY_MINUTE, Moved, News, Relocator, require_room};
use crate::error::{ErrorKind, Result};
use crate::snapshotter::Relocation;
use crate::store::UnmovedLayer;
use crate::types::{Quoted, SnapshotId, Timestamp, Volume};
use crate::util::lock::lock;
use crate::util::threads::{Background, lower_io_priority};
use crate::volume::{Unused, keeps_times};

/// Layers smaller than this wait until nothing stands on them: they are mostly
/// Docker's init layers, which are removed with their container.
const SMALL_BYTES: u64 = 1 << 20;

impl Relocator {
    /// Starts the relocator's thread. With [`Relocation::Never`] it moves no layers. After
    /// a stop, the thread ends once it has copied the current chunk of a file.
    pub(in crate::snapshotter) fn start(self: &Arc<Relocator>) -> Result<Background> {
        let (after, keeps_small) = match self.relocation {
            Relocation::Background { after, keeps_small } => (Some(after), keeps_small),
            Relocation::Never => (None, true),
        };
        let work = move |relocator: &Relocator| {
            let mut worker = Worker {
                relocator,
                after,
                keeps_small,
                notes: Notes::default(),
                leftovers: Leftovers::default(),
            };
            worker.run();
        };
        Background::start("relocator", self, Relocator::stop, work)
    }
}

struct Worker<'a> {
    relocator: &'a Relocator,
    /// How long layers wait before they move; `None` if they stay where they
    /// are.
    after: Option<Duration>,
    /// Whether small layers stay as long as something stands on them.
    keeps_small: bool,
    notes: Notes,
    leftovers: Leftovers,
}

/// Notes about layers that are still to be moved.
#[derive(Default)]
struct Notes {
    /// Layers that cannot be moved before the next start.
    unmovable: HashSet<SnapshotId>,
    /// Layers whose delay has been logged, so that it is logged once.
    put_off: HashSet<SnapshotId>,
    /// Layers for which the image volume had no room, with its free space at that time.
    without_room: HashMap<SnapshotId, Unused>,
}

impl Notes {
    /// Forgets layers that were moved or removed. There can be many, because Docker
    /// creates and removes one for each container.
    fn keep_only(&mut self, unmoved: &HashSet<SnapshotId>) {
        self.unmovable.retain(|id| unmoved.contains(id));
        self.put_off.retain(|id| unmoved.contains(id));
        self.without_room.retain(|id, _| unmoved.contains(id));
    }
}

impl Worker<'_> {
    fn run(&mut self) {
        lower_io_priority("the relocator's thread");
        if self.after.is_some() {
            self.say_lost_times();
        }
        if let Err(error) = self.relocator.delete_dropped_copies() {
            log::warn!(
                "unfinished copies of layers stay in the trash of the image volume until \
                 containerd's next garbage collection: {}",
                error.chain()
            );
        }
        loop {
            let next = self.step().unwrap_or_else(|error| {
                log::warn!(
                    "cannot look for layers to move to the image volume, and will try again in a \
                     minute: {}",
                    error.chain()
                );
                // The thread pauses, because it would otherwise try without end if the
                // database cannot be read.
                Some(EVERY_MINUTE)
            });
            if !self.wait(next) {
                return;
            }
        }
    }

    fn say_lost_times(&self) {
        let image = self.relocator.volumes.image().dirs();
        let kept = image.trash_fd().and_then(keeps_times);
        if kept.is_ok_and(|are_kept| !are_kept) {
            log::warn!(
                "the file system of {} keeps times to the second and up to 2038 only: layers that \
                 are committed from containers lose fractions of seconds and later times when they \
                 move there; ext4 with inodes of 256 bytes (mkfs.ext4 -I 256), XFS and btrfs keep \
                 them",
                image.path()
            );
        }
    }

    /// Deletes the old directories of moved and healed layers, and moves at most one layer.
    /// Returns when to look again if nothing wakes the thread.
    fn step(&mut self) -> Result<Option<Duration>> {
        let has_layers = &self.relocator.has_layers;
        // The flag is set before the thread looks, so that events after the look wake it.
        has_layers.store(true, Ordering::SeqCst);
        let released = self.leftovers.release(self.relocator)?;
        let released = self
            .relocator
            .release_replaced()?
            .into_iter()
            .chain(released)
            .min();
        let away = self.relocator.store.read()?.away()?;
        has_layers.store(!away.is_empty() || released.is_some(), Ordering::SeqCst);
        self.notes
            .keep_only(&away.iter().map(|layer| layer.id).collect());
        let moved = match self.after {
            Some(after) => self.move_one(away, after)?,
            None => None,
        };
        Ok(moved.into_iter().chain(released).min())
    }

    /// Moves the first layer that can move. Returns when to look again; `None` if it is
    /// enough to look when the thread is woken.
    fn move_one(&mut self, away: Vec<UnmovedLayer>, after: Duration) -> Result<Option<Duration>> {
        if !away.is_empty() && self.relocator.volumes.open(Volume::Writable).is_err() {
            // The thread looks again by itself, because the return of the volume does not
            // wake it.
            return Ok(Some(EVERY_MINUTE));
        }
        let mut next = None;
        for layer in away {
            if self.notes.unmovable.contains(&layer.id) {
                continue;
            }
            if !self.may_have_room(&layer)? {
                // The thread looks again by itself, because room that other programs make
                // does not wake it.
                next = Some(EVERY_MINUTE);
                continue;
            }
            let age = Timestamp::now()
                .nanos()
                .saturating_sub(layer.committed.nanos());
            let age = Duration::from_nanos(age.try_into().unwrap_or(0));
            if age < after {
                // The layers are in the order of their commits, so all others are younger.
                next = next.into_iter().chain([after - age]).min();
                break;
            }
            let is_small = self.keeps_small && layer.size_bytes < SMALL_BYTES;
            if is_small && self.relocator.store.read()?.is_in_use(layer.id)? {
                self.say_put_off(&layer, "it is small and in use");
                continue;
            }
            if self.move_home(&layer) == Some(Moved::InUse) {
                self.say_put_off(&layer, "it is still mounted");
                // The thread looks again by itself, because an unmount does not wake it.
                next = Some(EVERY_MINUTE);
                continue;
            }
            return Ok(Some(Duration::ZERO));
        }
        Ok(next)
    }

    /// Whether a layer that had no room may have room now. The recorded size of the layer
    /// does not decide that, because the layer may take more on another file system. So the
    /// layer is copied again only when the free space has grown by a part of its size since
    /// the last failure.
    fn may_have_room(&self, layer: &UnmovedLayer) -> Result<bool> {
        let Some(before) = self.notes.without_room.get(&layer.id) else {
            return Ok(true);
        };
        let image = self.relocator.volumes.image().dirs();
        let now = image.unused()?;
        let is_more = |now: u64, before: u64, takes: u64| now > before.saturating_add(takes / 16);
        Ok(require_room(layer, image).is_ok()
            && (is_more(now.bytes, before.bytes, layer.size_bytes)
                || is_more(now.inodes, before.inodes, layer.inodes)))
    }

    fn move_home(&mut self, layer: &UnmovedLayer) -> Option<Moved> {
        let begun = Instant::now();
        let unused = self.relocator.volumes.image().dirs().unused();
        let name = Quoted(&layer.name);
        let moved = self.relocator.relocate_and_delete(layer.id);
        match &moved {
            Ok(Moved::Home(bytes)) => {
                let mut moves = lock(&self.relocator.moves);
                moves.layers += 1;
                moves.bytes += bytes;
                drop(moves);
                log::info!(
                    "layer {name} moved to the image volume: {bytes} bytes copied in {:.1} s",
                    begun.elapsed().as_secs_f64()
                );
            }
            Ok(Moved::InUse) => {}
            Ok(Moved::Gone) => log::debug!("layer {name} was removed before it had moved"),
            Err(error) => match error.kind() {
                ErrorKind::Unavailable => {
                    log::debug!("layer {name} does not move now: {}", error.chain())
                }
                ErrorKind::ResourceExhausted => {
                    lock(&self.relocator.moves).failures += 1;
                    self.notes
                        .without_room
                        .insert(layer.id, unused.unwrap_or_default());
                    log::warn!(
                        "layer {name} stays on the writable volume until the image volume has \
                         room: {}",
                        error.chain()
                    );
                }
                _ => {
                    lock(&self.relocator.moves).failures += 1;
                    self.notes.unmovable.insert(layer.id);
                    log::error!(
                        "layer {name} stays on the writable volume until the next start: {}",
                        error.chain()
                    );
                }
            },
        }
        moved.ok()
    }

    fn say_put_off(&mut self, layer: &UnmovedLayer, why: &str) {
        if self.notes.put_off.insert(layer.id) {
            log::debug!(
                "the move of layer {} is put off: {why}",
                Quoted(&layer.name)
            );
        }
    }

    /// Waits until it is time to look again. Returns `false` after
    /// [`Relocator::stop`].
    fn wait(&mut self, next: Option<Duration>) -> bool {
        let deadline = next.map(|wait| Instant::now() + wait);
        let is_idle = |news: &News| !news.is_any;
        let news = &self.relocator.news;
        let Some(news) = news.wait_until(deadline, is_idle, std::mem::take) else {
            return false;
        };
        if news.has_room && !self.notes.without_room.is_empty() {
            // The flush makes room before the next look: ext4 frees the blocks of deleted
            // files only with its next journal commit.
            let image = self.relocator.volumes.image().dirs();
            if let Err(error) = self.relocator.flusher.flush(image) {
                log::warn!(
                    "cannot flush the image volume after files were deleted, so layers may wait \
                     longer for the room there: {}",
                    error.chain()
                );
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_that_are_gone_are_forgotten() {
        let [there, gone] = [7, 8].map(SnapshotId::new);
        let mut notes = Notes::default();
        for id in [there, gone] {
            notes.unmovable.insert(id);
            notes.put_off.insert(id);
            notes.without_room.insert(id, Unused::default());
        }
        notes.keep_only(&HashSet::from([there]));
        assert_eq!(notes.unmovable, HashSet::from([there]));
        assert_eq!(notes.put_off, HashSet::from([there]));
        assert!(notes.without_room.len() == 1 && notes.without_room.contains_key(&there));
    }
}
