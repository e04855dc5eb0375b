//! Moving committed layers from the writable to the image volume.
//!
//! Nothing that a container may have mounted is touched. The layer is copied, the copy is
//! made durable, the copy and the layer's link exchange their names, and the row is
//! updated. New mounts find the copy by the same path. The old directory is deleted at
//! once if nothing stands on the layer, otherwise when nothing has it mounted any more,
//! or when the host has rebooted.
//!
//! After a crash before the exchange, the copy is dropped, and the layer is where it was.
//! After the exchange the copy is whole, and the next start records the move. The proof of
//! the exchange is the link, which has the former name of the copy then; see [`recovery`].

mod leftovers;
mod recovery;
mod worker;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rustix::fs::FileType;

use super::Relocation;
use super::flusher::Flusher;
use super::ids::Ids;
use super::in_use::{self, Mounts};
use super::inspect::inspect_layer;
use super::links::Links;
use super::problem::Problem;
use super::trash::Trash;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::store::{Ancestor, Store, UnmovedLayer};
use crate::tree;
use crate::types::{Quoted, SnapshotId, Volume};
use crate::util::fault_point::fault_point;
use crate::util::lock::lock;
use crate::util::monitor::Monitor;
use crate::volume::{Dirs, UPPER, Volumes};
use leftovers::Replaced;
pub(super) use recovery::Namesake;

/// The id of this boot of the host (random(4)).
fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    std::fs::read_to_string(path)
        .map(|text| text.trim_end().to_owned())
        .map_err(|error| Error::caused(ErrorKind::Internal, format!("read {path}"), error))
}

/// How often the relocator's thread looks for changes that no request reports.
const EVERY_MINUTE: Duration = Duration::from_secs(60);

/// An entry that was moved to the trash: its volume, and its name there.
type Trashed = (Arc<Dirs>, String);

/// The result of moving a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    /// The layer is on the image volume now; this number of bytes was copied.
    Home(u64),
    /// The layer was removed meanwhile, or was moved before.
    Gone,
    /// The layer cannot move yet, because it was committed while it was mounted and still
    /// is mounted, or because another such layer stands on it. The database does not count
    /// these mounts.
    InUse,
}

pub(super) struct Relocator {
    store: Arc<Store>,
    volumes: Arc<Volumes>,
    flusher: Arc<Flusher>,
    trash: Arc<Trash>,
    ids: Arc<Ids>,
    links: Arc<Links>,
    relocation: Relocation,
    /// Locked during each move, because one layer moves at a time.
    moving: Mutex<()>,
    news: Monitor<News>,
    /// The directories `.replaced-<id>` that healed layers have replaced.
    replaced: Mutex<Replaced>,
    /// Whether the thread has found an unmoved layer, or a leftover or replaced directory,
    /// when it last looked, or is looking now.
    has_layers: AtomicBool,
    /// Cancels the current copy when set.
    is_stopping: AtomicBool,
    moves: Mutex<Moves>,
}

/// What has happened since the thread last looked for layers to move.
#[derive(Default)]
struct News {
    /// Something has happened that a layer may wait for.
    is_any: bool,
    /// Something was removed from the image volume.
    has_room: bool,
}

/// What the relocator has done since the start of the daemon.
#[derive(Clone, Copy, Default)]
pub(super) struct Moves {
    pub layers: u64,
    pub bytes: u64,
    pub failures: u64,
}

impl Relocator {
    pub(super) fn new(
        (store, volumes): (Arc<Store>, Arc<Volumes>),
        flusher: Arc<Flusher>,
        trash: Arc<Trash>,
        (ids, links): (Arc<Ids>, Arc<Links>),
        relocation: Relocation,
    ) -> Relocator {
        Relocator {
            store,
            volumes,
            flusher,
            trash,
            ids,
            links,
            relocation,
            moving: Mutex::new(()),
            news: Monitor::default(),
            replaced: Mutex::default(),
            has_layers: AtomicBool::new(false),
            is_stopping: AtomicBool::new(false),
            moves: Mutex::default(),
        }
    }

    /// Stops the thread. Moves in every thread end with
    /// [`ErrorKind::Unavailable`].
    pub(super) fn stop(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
        self.news.stop();
    }

    /// Asks the thread to look for layers to move.
    pub(super) fn wake(&self) {
        self.news.change(|news| news.is_any = true);
    }

    /// Notes that something has ended for which a layer may have waited, such as a
    /// container. If no layer is waiting, the thread is not woken.
    pub(super) fn note_end(&self) {
        if self.has_layers.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Notes that the image volume may have more room, because something was removed from
    /// it.
    pub(super) fn note_room(&self) {
        self.news.change(|news| {
            news.has_room = true;
            news.is_any = true;
        });
    }

    pub(super) fn moves(&self) -> Moves {
        *lock(&self.moves)
    }

    fn mounted_layers(&self) -> Result<HashSet<SnapshotId>> {
        in_use::mounted_layers(&self.store, &self.volumes)
    }

    /// Moves one layer, in the calling thread. Entries that have to be deleted
    /// afterwards are added to `trashed`, so that the next move need not wait for that.
    fn relocate(&self, id: SnapshotId, trashed: &mut Vec<Trashed>) -> Result<Moved> {
        let _one_at_a_time = lock(&self.moving);
        let image = self.volumes.image();
        let writable = self.volumes.open(Volume::Writable)?;

        let is_exchanged = image.layer_entry(id)? == Some(FileType::Directory);
        let mut bytes = 0;
        if is_exchanged {
            self.require_exchanged(id)?;
            // A crash may have come between the exchange and its flush.
            image.dirs().settle_names()?;
        } else {
            if self.mounted_layers()?.contains(&id) {
                return Ok(Moved::InUse);
            }
            // Otherwise, a start could treat the image volume as one that was rolled back.
            self.ids.begin_on(image.dirs())?;
            if self.rename_home(id, &writable)? {
                return Ok(Moved::Home(0));
            }
            match self.copy_home(id, &writable) {
                Ok(copied) => bytes = copied,
                Err(error) => {
                    self.end_move(id, trashed)?;
                    if !self.is_unmoved(id)? {
                        return Ok(Moved::Gone);
                    }
                    return Err(error);
                }
            }
        }

        let claim = self.ids.claim(id);
        if !self.is_unmoved(id)? {
            self.end_move(id, trashed)?;
            return Ok(Moved::Gone);
        }
        if !is_exchanged
            && let Err(error) = self.links.require([id]).and_then(|()| image.exchange(id))
        {
            // If the exchange has happened and only its flush has failed, the link stays as
            // the proof.
            if image.layer_entry(id)? != Some(FileType::Directory) {
                self.end_move(id, trashed)?;
            }
            return Err(error);
        }
        fault_point("exchanged");
        // If recording the move fails, the copy stays in place: it is whole,
        // and the next try, or the next start, only records it. The users of
        // the layer are read again, because snapshots on it may have been
        // committed since.
        let held = self.held_after_exchange(id)?;
        let boot_id = boot_id()?;
        let is_in_use = self.store.together(|transaction| {
            transaction.forget_tombstones(&self.trash.take_settled())?;
            transaction.move_home(id, &held, &boot_id)
        })?;
        fault_point("recorded");
        // From here on, a Remove of the layer need not wait for the writable volume.
        drop(claim);
        let mut tidy = || -> Result<()> {
            self.end_move(id, trashed)?;
            if !is_in_use {
                let old = writable.trash(id)?;
                trashed.extend(old.map(|name| (Arc::clone(&writable), name)));
                self.trash.note_trashed(id, Volume::Writable);
            }
            Ok(())
        };
        if let Err(error) = tidy() {
            self.trash.note_stray(Volume::Writable);
            log::warn!(
                "layer {id} has moved to the image volume, but its old files take room on the \
                 writable volume until containerd's next garbage collection: {}",
                error.chain()
            );
        }
        fault_point("trashed");
        Ok(Moved::Home(bytes))
    }

    /// Returns an error unless a move has put the directory with this id on the image
    /// volume.
    fn require_exchanged(&self, id: SnapshotId) -> Result<()> {
        if self.volumes.image().has_exchanged_link(id)? {
            return Ok(());
        }
        Err(Error::refused(format!(
            "the directory snapshots/{id} on the image volume is not the layer with that id, \
             because no move has put it there: restart the daemon, which sets the directory aside"
        )))
    }

    /// Moves the entry `.moving-<id>`, an unfinished copy or the former link, to the trash.
    fn end_move(&self, id: SnapshotId, trashed: &mut Vec<Trashed>) -> Result<()> {
        let image = self.volumes.image();
        let name = image.end_move(id)?;
        trashed.extend(name.map(|name| (Arc::clone(image.dirs()), name)));
        Ok(())
    }

    /// Deletes unfinished copies in the trash, which a killed daemon has left there. A
    /// daemon that is killed again and again would otherwise fill the disk before a Cleanup
    /// comes.
    fn delete_dropped_copies(&self) -> Result<()> {
        let image = self.volumes.image().dirs();
        for name in image.trashed_moves()? {
            self.trash.delete(image, &name);
        }
        Ok(())
    }

    /// The layers whose old directory may be mounted, perhaps by a program that the
    /// database does not know of.
    fn held_after_exchange(&self, id: SnapshotId) -> Result<HashSet<SnapshotId>> {
        let mounts = Mounts::read(&self.store, &self.volumes)?;
        let mut held = mounts.layers(&*self.store.read()?)?;
        if !mounts.of_leftover(id).is_empty() {
            held.insert(id);
        }
        Ok(held)
    }

    /// Moves one layer like [`Relocator::relocate`], and deletes the entries that the move
    /// has put into the trash.
    fn relocate_and_delete(&self, id: SnapshotId) -> Result<Moved> {
        let mut trashed = Vec::new();
        let moved = self.relocate(id, &mut trashed);
        for (dirs, name) in trashed {
            self.trash.delete(&dirs, &name);
        }
        moved
    }

    fn copy_home(&self, id: SnapshotId, writable: &Arc<Dirs>) -> Result<u64> {
        let source = writable.open_snapshot(id)?;
        let image = self.volumes.image();
        let away = self.store.read()?.away()?;
        let layer = away.iter().find(|layer| layer.id == id);
        if let Some(layer) = layer {
            require_room(layer, image.dirs())?;
            let snapshot = self.store.read()?.stat(&layer.name)?;
            // A damaged layer does not move: a copy would take its place, although the
            // missing files may still be found.
            let found = inspect_layer(writable, &snapshot, true, false)?;
            if matches!(found, Some(Problem::LayerDamaged { .. })) {
                return Err(Error::data_loss(format!(
                    "layer {} holds less than when it was committed: run `check --heal`",
                    Quoted(&layer.name)
                )));
            }
        }
        let target = image.begin_move(id)?;
        fault_point("begun");
        let copied = tree::copy_tree(
            &source,
            &target.top,
            UPPER,
            &target.scratch,
            &self.is_stopping,
        )?;
        if !copied.left_out.is_empty() {
            let names = copied.left_out.iter();
            let names: Vec<_> = names.map(|name| Quoted(name).to_string()).collect();
            let layer =
                layer.map_or_else(|| id.to_string(), |layer| Quoted(&layer.name).to_string());
            log::info!(
                "layer {layer}: its files do not have these attributes on the image volume, \
                 because the file system there does not support them, or because only the \
                 writable volume's file system uses them: {}",
                names.join(", ")
            );
        }
        fault_point("copied");
        let flushed = image.finish_copy(&target);
        self.flusher.note_failure(&flushed, Volume::Image);
        flushed?;
        fault_point("durable");
        Ok(copied.bytes)
    }

    /// Moves a layer by two renames, if both volumes are on one file system. Otherwise does
    /// nothing and returns `false`.
    fn rename_home(&self, id: SnapshotId, writable: &Dirs) -> Result<bool> {
        let image = self.volumes.image();
        let _claim = self.ids.claim(id);
        if !self.is_unmoved(id)? {
            return Ok(false);
        }
        self.links.require([id])?;
        if !image.rename_home(id, writable)? {
            return Ok(false);
        }
        fault_point("renamed");
        if let Err(error) = image.exchange(id) {
            if image.layer_entry(id)? != Some(FileType::Directory) {
                image.rename_back(id, writable)?;
            }
            return Err(error);
        }
        fault_point("rename-exchanged");
        let boot_id = boot_id()?;
        self.store.together(|transaction| {
            transaction.move_home(id, &HashSet::new(), &boot_id)?;
            // There is no leftover directory, because the directory itself has
            // moved.
            transaction.forget_retired(id)
        })?;
        self.trash.note_trashed(id, Volume::Writable);
        fault_point("rename-recorded");
        image.end_move(id)?;
        Ok(true)
    }

    fn is_unmoved(&self, id: SnapshotId) -> Result<bool> {
        let place = self.store.read()?.place(id)?;
        Ok(place.is_some_and(|place| place.is_unmoved()))
    }

    /// Moves layers to the image volume before they are mounted with mapped ids. For such a
    /// mount, containerd clones and maps the directory that all lower directories share,
    /// and the clone does not lead through a link to another file system.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if a layer stays on the writable volume by
    /// configuration, or because it is still mounted.
    pub(super) fn bring_home(&self, layers: &[Ancestor]) -> Result<()> {
        let is_unmoved = |layer: &&Ancestor| layer.volume == Volume::Writable;
        for Ancestor { id, .. } in layers.iter().filter(is_unmoved) {
            if self.relocation == Relocation::Never {
                return Err(Error::refused(format!(
                    "a container with mapped ids cannot use layer {id}, which is on the \
                     writable volume, and stays there because of --relocate never: leave out \
                     that flag, or the mapping"
                )));
            }
            let moved = self.relocate_and_delete(*id).context(|| {
                format!("move layer {id} to the image volume for a container with mapped ids")
            })?;
            // The move may have left a directory that the thread has to delete.
            self.wake();
            if moved == Moved::InUse {
                return Err(Error::refused(format!(
                    "layer {id} was committed while it was mounted, and still is mounted, so it \
                     cannot move to the image volume, where a container with mapped ids needs it: \
                     stop the container that has it mounted"
                )));
            }
        }
        Ok(())
    }

    /// Prevents moves until the returned value is dropped. Waits for a move under way.
    pub(super) fn stop_moves(&self) -> MutexGuard<'_, ()> {
        lock(&self.moving)
    }

    /// Notes that a healed layer has replaced its damaged directory. The thread deletes
    /// that directory once nothing can have it mounted.
    pub(super) fn note_replaced(&self, id: SnapshotId) {
        lock(&self.replaced).note(id);
        self.has_layers.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Records that an unmoved layer is on the image volume now, because a directory has
    /// replaced its link.
    pub(super) fn record_exchanged(&self, id: SnapshotId) -> Result<()> {
        // A crash may have come between the exchange and its own flush.
        self.volumes.image().dirs().settle_names()?;
        let (held, boot_id) = (self.held_after_exchange(id)?, boot_id()?);
        self.store
            .together(|transaction| transaction.move_home(id, &held, &boot_id))
            .map(drop)
    }
}

/// Returns an error if the image volume has no room for a copy of the layer.
fn require_room(layer: &UnmovedLayer, image: &Dirs) -> Result<()> {
    let unused = image.unused()?;
    if layer.size_bytes <= unused.bytes && layer.inodes <= unused.inodes {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::ResourceExhausted,
        format!(
            "layer {} takes {} bytes and {} inodes, and {} has {} bytes and {} inodes free: \
             remove images, or make the volume larger",
            Quoted(&layer.name),
            layer.size_bytes,
            layer.inodes,
            image.path(),
            unused.bytes,
            unused.inodes
        ),
    ))
}
