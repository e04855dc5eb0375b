//! Moving committed layers home, from the writable to the image volume.
//!
//! What a container may have mounted is never touched: the layer is copied, the copy is made
//! durable, copy and link change names, and the row says so. New mounts find the copy by the
//! same path. The old directory goes at once if nothing stands on the layer, else
//! when nothing has it mounted any more, or when the host has rebooted.
//!
//! After a crash: before the exchange, the copy is dropped and the layer is
//! where it was; after it, the copy is whole and the start records it.

mod leftovers;
mod worker;

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
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

/// The number of this boot of the host (random(4)).
fn boot_id() -> Result<String> {
    let path = "/proc/sys/kernel/random/boot_id";
    std::fs::read_to_string(path)
        .map(|text| text.trim_end().to_owned())
        .map_err(|error| Error::caused(ErrorKind::Internal, format!("read {path}"), error))
}

/// How often the thread looks for what no request reports.
const EVERY_MINUTE: Duration = Duration::from_secs(60);

/// What was moved to the trash of a volume, and its name there.
type Trashed = (Arc<Dirs>, String);

/// What moving a layer came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moved {
    /// It is home; that many bytes were copied.
    Home(u64),
    /// It was removed meanwhile, or is home already.
    Gone,
    /// Not now: its own snapshot is still mounted, or one upon it is that has
    /// been committed meanwhile and counts as no user in the database.
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
    /// One layer moves at a time.
    moving: Mutex<()>,
    news: Monitor<News>,
    /// An unmoved layer or a leftover directory was there when the thread last looked, or
    /// it is just looking.
    has_layers: AtomicBool,
    /// Ends a copy under way.
    is_stopping: AtomicBool,
    moves: Mutex<Moves>,
}

/// What has happened since the thread last looked for layers to move.
#[derive(Default)]
struct News {
    /// Something that a layer may have waited for.
    is_any: bool,
    /// Something on the image volume was removed.
    has_room: bool,
}

/// What the relocator has done since the start.
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
            has_layers: AtomicBool::new(false),
            is_stopping: AtomicBool::new(false),
            moves: Mutex::default(),
        }
    }

    /// Ends the thread, and all moves in whatever thread with
    /// [`ErrorKind::Unavailable`].
    pub(super) fn stop(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
        self.news.stop();
    }

    /// Has the thread look for layers to move.
    pub(super) fn wake(&self) {
        self.news.change(|news| news.is_any = true);
    }

    /// Something has ended that a layer may have waited for. If there is no layer, the
    /// thread need not look.
    pub(super) fn note_end(&self) {
        if self.has_layers.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Something on the image volume was removed.
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

    /// Moves one layer home, in the calling thread. What is to be deleted after that is
    /// added to `trashed`: others may wait for the next move.
    fn relocate(&self, id: SnapshotId, trashed: &mut Vec<Trashed>) -> Result<Moved> {
        let _one_at_a_time = lock(&self.moving);
        let image = self.volumes.image();
        let writable = self.volumes.open(Volume::Writable)?;

        let is_exchanged = image.layer_entry(id)? == Some(FileType::Directory);
        let mut bytes = 0;
        if is_exchanged {
            // A crash may have come between the exchange and its own flush.
            image.dirs().settle_names()?;
        } else {
            if self.mounted_layers()?.contains(&id) {
                return Ok(Moved::InUse);
            }
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
            self.end_move(id, trashed)?;
            return Err(error);
        }
        fault_point("exchanged");
        // If recording fails, the copy stays in place: it is whole, and the
        // next try, or the next start, finds it and only records it. What is
        // held is asked again: what stood on it may have been committed since.
        let held = self.held_after_exchange(id)?;
        let boot_id = boot_id()?;
        let is_in_use = self.store.together(|transaction| {
            transaction.forget_tombstones(&self.trash.take_settled())?;
            transaction.move_home(id, &held, &boot_id)
        })?;
        fault_point("recorded");
        // A Remove of the layer need not wait for the writable volume any more.
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
            log::warn!("tidy up after the move of layer {id}: {}", error.chain());
        }
        fault_point("trashed");
        Ok(Moved::Home(bytes))
    }

    /// Drops what a move has under its own name: half a copy, or the link.
    fn end_move(&self, id: SnapshotId, trashed: &mut Vec<Trashed>) -> Result<()> {
        let image = self.volumes.image();
        let name = image.end_move(id)?;
        trashed.extend(name.map(|name| (Arc::clone(image.dirs()), name)));
        Ok(())
    }

    /// Deletes the copies in the trash that a kill has kept from being deleted: at a daemon
    /// that is killed again and again they would fill the disk before a Cleanup comes.
    fn delete_dropped_copies(&self) -> Result<()> {
        let image = self.volumes.image().dirs();
        for name in image.trashed_moves()? {
            self.trash.delete(image, &name);
        }
        Ok(())
    }

    /// The layers whose old directory is mounted, though perhaps by nothing that the
    /// database knows.
    fn held_after_exchange(&self, id: SnapshotId) -> Result<HashSet<SnapshotId>> {
        let mounts = Mounts::read(&self.store, &self.volumes)?;
        let mut held = mounts.layers(&*self.store.read()?)?;
        if !mounts.of_leftover(id).is_empty() {
            held.insert(id);
        }
        Ok(held)
    }

    /// As [`Relocator::relocate`], and deletes what that has left.
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
        if let Some(layer) = away.iter().find(|layer| layer.id == id) {
            require_room(layer, image.dirs())?;
            let snapshot = self.store.read()?.stat(&layer.name)?;
            // A copy of less would take the place of what is perhaps only elsewhere now.
            let found = inspect_layer(writable, &snapshot, true, false)?;
            if matches!(found, Some(Problem::LayerDamaged { .. })) {
                return Err(Error::data_loss(format!(
                    "layer {id} holds less than when it was committed: run `check`"
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
            let names: Vec<_> = copied.left_out.into_iter().collect();
            log::info!(
                "layer {id}: its files do not have these attributes on the image volume, which \
                 belong to the other file system or which this one cannot have: {}",
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

    /// The whole move where both volumes are one file system: two renames.
    /// `false`, and nothing done, where they are not.
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
            // Nothing was left behind: the directory itself has moved.
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

    /// Before an id-mapped mount over these layers: containerd clones and maps
    /// the directory that all lowers share, and such a clone does not lead
    /// through a link to another file system.
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
                     writable volume and stays there by --relocate never"
                )));
            }
            let moved = self
                .relocate_and_delete(*id)
                .context(|| format!("move layer {id} home for a container with mapped ids"))?;
            // It may have left a directory that the thread has to look after.
            self.wake();
            if moved == Moved::InUse {
                return Err(Error::refused(format!(
                    "layer {id} was committed while it was mounted, and still is: it cannot \
                     move to where a container with mapped ids could use it"
                )));
            }
        }
        Ok(())
    }

    /// At start, before strays are looked for: finishes moves whose exchange
    /// has happened, drops the others, and forgets left directories of an
    /// earlier boot, which nothing has mounted any more.
    pub(super) fn recover_moves(&self) -> Result<()> {
        let image = self.volumes.image();
        let boot_id = boot_id()?;
        for away in self.store.read()?.away()? {
            let is_exchanged = match image.layer_entry(away.id)? {
                Some(FileType::Directory) => true,
                _ => self.finish_rename(away.id)?,
            };
            if is_exchanged {
                // A crash may have come between the exchange and its own flush.
                image.dirs().settle_names()?;
                let held = self.held_after_exchange(away.id)?;
                self.store
                    .together(|transaction| transaction.move_home(away.id, &held, &boot_id))?;
                log::info!("layer {} had been moved home: recorded", Quoted(&away.name));
            }
        }
        let mut leftover = self.store.read()?.retired()?;
        leftover.retain(|leftover| leftover.boot_id != boot_id);
        if leftover.is_empty() {
            return Ok(());
        }
        self.store.together(|transaction| {
            leftover
                .iter()
                .try_for_each(|leftover| transaction.forget_retired(leftover.id))
        })
    }

    /// After a crash between the two renames of [`Relocator::rename_home`]:
    /// the layer is nowhere but under the move's own name.
    fn finish_rename(&self, id: SnapshotId) -> Result<bool> {
        let image = self.volumes.image();
        let Ok(writable) = self.volumes.open(Volume::Writable) else {
            return Ok(false);
        };
        match writable.open_snapshot(id) {
            Ok(_) => return Ok(false),
            Err(error) if error.kind() == ErrorKind::DataLoss => {}
            Err(error) => return Err(error),
        }
        if !image.is_renamed_layer(id)? {
            return Ok(false);
        }
        // A link there, or nothing after a power cut: either way the name is
        // made first, so that there is something to exchange.
        self.volumes.link_home(id)?;
        image.exchange(id)?;
        Ok(true)
    }
}

/// Refuses a copy that would fill the image volume before it is whole.
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
            layer.id,
            layer.size_bytes,
            layer.inodes,
            image.path(),
            unused.bytes,
            unused.inodes
        ),
    ))
}
