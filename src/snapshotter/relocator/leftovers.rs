//! The directories that moved layers have left on the writable volume, and those that
//! healed layers have replaced: finding out when nothing can have them mounted any more, and
//! deleting them.
//!
//! Containers and views mount a layer by its path, which leads to the moved or healed
//! layer, so only a mount from before the exchange can show the old directory. An overlay
//! does not show when it was mounted. Therefore the overlays on the layer are noted some
//! time after the exchange, when a mount that was under way then must be in the kernel's
//! list. Overlays that appear later do not count.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::{EVERY_MINUTE, Relocator};
use crate::error::Result;
use crate::mount::mountinfo::Mounted;
use crate::snapshotter::in_use::Mounts;
use crate::store::LeftoverDir;
use crate::types::{SnapshotId, Volume};
use crate::util::lock::lock;

/// How long a mount(2) that has found the old directory before the exchange may take until
/// it is in the kernel's list.
const SETTLING: Duration = Duration::from_secs(10);

/// Notes of the relocator's thread about leftover directories. After a start there are
/// none, and every overlay that is mounted on the layer counts as a user of its old
/// directory.
#[derive(Default)]
pub(super) struct Leftovers {
    seen: HashMap<SnapshotId, Seen>,
}

struct Seen {
    since: Instant,
    /// The device numbers of the overlays that may show the directory; `None` until they
    /// are noted.
    overlays: Option<HashSet<String>>,
}

impl Leftovers {
    /// Deletes the leftover directories that nothing has mounted any more. Returns
    /// when to look again; `None` if no leftover directory remains.
    pub(super) fn release(&mut self, relocator: &Relocator) -> Result<Option<Duration>> {
        let leftovers = relocator.store.read()?.retired()?;
        self.seen
            .retain(|id, _| leftovers.iter().any(|leftover| leftover.id == *id));
        if leftovers.is_empty() {
            return Ok(None);
        }
        let Ok(writable) = relocator.volumes.open(Volume::Writable) else {
            return Ok(Some(EVERY_MINUTE));
        };
        let mounts = Mounts::read(&relocator.store, &relocator.volumes)?;
        let held = mounts.layers(&*relocator.store.read()?)?;
        let mut next = None;
        for leftover in leftovers {
            let wait = self.is_free_in(relocator, &leftover, &mounts.of_leftover(leftover.id))?;
            if held.contains(&leftover.id) || wait != Some(Duration::ZERO) {
                let wait = wait.filter(|wait| !wait.is_zero()).unwrap_or(EVERY_MINUTE);
                next = Some(next.map_or(wait, |next: Duration| next.min(wait)));
                continue;
            }
            let id = leftover.id;
            relocator.store.together(|transaction| {
                transaction.forget_tombstones(&relocator.trash.take_settled())?;
                transaction.forget_retired(id)
            })?;
            // The relocator holds no claim here, because a Remove of the layer must not
            // wait for this disk.
            match writable.trash(id) {
                Ok(name) => name
                    .into_iter()
                    .for_each(|name| relocator.trash.delete(&writable, &name)),
                Err(error) => {
                    relocator.trash.note_stray(Volume::Writable);
                    log::warn!(
                        "the leftover directory of layer {id} stays on the writable volume until \
                         the next Cleanup: {}",
                        error.chain()
                    );
                    continue;
                }
            }
            relocator.trash.note_trashed(id, Volume::Writable);
            log::debug!("deleted the leftover directory of layer {id} on the writable volume");
        }
        Ok(next)
    }

    /// How long a leftover directory has to stay at least; `None` if something has it
    /// mounted.
    fn is_free_in(
        &mut self,
        relocator: &Relocator,
        leftover: &LeftoverDir,
        mounts: &[&Mounted],
    ) -> Result<Option<Duration>> {
        let seen = self.seen.entry(leftover.id).or_insert_with(Seen::now);
        let wait = seen.settles_in();
        if !wait.is_zero() && relocator.store.read()?.may_be_mounted(leftover)? {
            return Ok(Some(wait));
        }
        Ok(seen.is_free(mounts).then_some(Duration::ZERO))
    }
}

impl Seen {
    fn now() -> Seen {
        Seen {
            since: Instant::now(),
            overlays: None,
        }
    }

    /// How long to wait until a mount that was under way at `since` is in the kernel's
    /// list.
    fn settles_in(&self) -> Duration {
        SETTLING.saturating_sub(self.since.elapsed())
    }

    /// Whether nothing shows the directory any more. `mounts` are those that may show it;
    /// overlays that were mounted after the first call cannot.
    fn is_free(&mut self, mounts: &[&Mounted]) -> bool {
        let is_overlay = |mounted: &&&Mounted| mounted.file_system == "overlay";
        let overlays = mounts.iter().filter(is_overlay);
        let now: HashSet<_> = overlays.map(|mounted| mounted.device.clone()).collect();
        let noted = self.overlays.get_or_insert_with(|| now.clone());
        noted.retain(|device| now.contains(device));
        let is_bound = mounts.iter().any(|mounted| !is_overlay(&mounted));
        noted.is_empty() && !is_bound
    }
}

/// The damaged directories that healed layers have replaced, and that are still to be
/// deleted.
#[derive(Default)]
pub(super) struct Replaced(HashMap<SnapshotId, Seen>);

impl Replaced {
    pub(super) fn note(&mut self, id: SnapshotId) {
        self.0.insert(id, Seen::now());
    }

    /// Removes the directories that nothing has mounted any more from the list, and returns
    /// them. Also returns when to look again.
    fn take_free(&mut self, mounts: &Mounts<'_>) -> (Vec<SnapshotId>, Option<Duration>) {
        let (mut free, mut next) = (Vec::new(), None);
        for (id, seen) in &mut self.0 {
            let mut wait = seen.settles_in();
            if wait.is_zero() {
                if mounts.may_show_replaced(*id) && !seen.is_free(&mounts.of_replaced(*id)) {
                    wait = EVERY_MINUTE;
                } else {
                    free.push(*id);
                    continue;
                }
            }
            next = Some(next.map_or(wait, |next: Duration| next.min(wait)));
        }
        self.0.retain(|id, _| !free.contains(id));
        (free, next)
    }
}

impl Relocator {
    /// Deletes the directories that healed layers have replaced, once nothing has them
    /// mounted any more. Returns when to look again; `None` if no such directory remains.
    pub(super) fn release_replaced(&self) -> Result<Option<Duration>> {
        if lock(&self.replaced).0.is_empty() {
            return Ok(None);
        }
        let mounts = Mounts::read(&self.store, &self.volumes)?;
        let (free, next) = lock(&self.replaced).take_free(&mounts);
        let image = self.volumes.image().dirs();
        for id in free {
            let claim = self.ids.claim(id);
            // The layer may have healed again before the claim.
            if lock(&self.replaced).0.contains_key(&id) {
                continue;
            }
            let trashed = image.trash_replaced(id);
            drop(claim);
            if let Some(name) = trashed? {
                self.trash.delete(image, &name);
                log::debug!("deleted the damaged directory of layer {id}");
            }
        }
        Ok(next)
    }
}
