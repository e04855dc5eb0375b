//! The directories that moved layers have left on the writable volume: finding out when
//! nothing can have them mounted any more, and deleting them.
//!
//! Containers and views mount a layer by its path, which leads to the moved layer, so
//! only a mount from before the move can show the old directory. An overlay does not show
//! when it was mounted. Therefore the overlays on the layer are noted some time after the
//! move, when a mount that was under way at the move must be in the kernel's list.
//! Overlays that appear later do not count.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::{EVERY_MINUTE, Relocator};
use crate::error::Result;
use crate::mount::mountinfo::Mounted;
use crate::snapshotter::in_use::Mounts;
use crate::store::LeftoverDir;
use crate::types::{SnapshotId, Volume};

/// How long a mount(2) that has found the old directory may take.
const SETTLING: Duration = Duration::from_secs(10);

/// What the relocator's thread knows of leftover directories. After a start it knows
/// nothing, and all mounted overlays count.
#[derive(Default)]
pub(super) struct Leftovers {
    seen: HashMap<SnapshotId, Seen>,
}

struct Seen {
    since: Instant,
    /// The device numbers of the overlays that may show the directory.
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
            // No claim is held, because a Remove of the layer must not wait for
            // this disk.
            match writable.trash(id) {
                Ok(name) => name
                    .into_iter()
                    .for_each(|name| relocator.trash.delete(&writable, &name)),
                Err(error) => {
                    relocator.trash.note_stray(Volume::Writable);
                    log::warn!(
                        "cannot remove what layer {id} has left on the writable volume: {}",
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
        let seen = self.seen.entry(leftover.id).or_insert_with(|| Seen {
            since: Instant::now(),
            overlays: None,
        });
        let wait = SETTLING.saturating_sub(seen.since.elapsed());
        if !wait.is_zero() && relocator.store.read()?.may_be_mounted(leftover)? {
            return Ok(Some(wait));
        }
        let is_overlay = |mounted: &&&Mounted| mounted.file_system == "overlay";
        let overlays = mounts.iter().filter(is_overlay);
        let now: HashSet<_> = overlays.map(|mounted| mounted.device.clone()).collect();
        let noted = seen.overlays.get_or_insert_with(|| now.clone());
        noted.retain(|device| now.contains(device));
        let is_bound = mounts.iter().any(|mounted| !is_overlay(&mounted));
        Ok((noted.is_empty() && !is_bound).then_some(Duration::ZERO))
    }
}
