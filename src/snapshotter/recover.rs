//! Making rows and directories agree again, at start and where a removal was
//! cut short. Each finding is logged once, with what was done.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use rustix::fs::FileType;

use super::Snapshotter;
use crate::error::{Context, Result};
use crate::store::Removed;
use crate::types::{Kind, Quoted, SnapshotId, Volume};
use crate::volume::{Dirs, Owner, Shape};

type Inventory = [(Removed, String)];

impl Snapshotter {
    /// After a start: trashes directories that no row knows, makes missing
    /// uppers anew, sets links right, and reports layers that are missing.
    ///
    /// # Errors
    ///
    /// As of the image volume's disk or the database. The writable volume may
    /// be missing: what concerns it is then left as it is.
    pub fn recover(&self) -> Result<()> {
        // Nobody is served yet; the transaction is for the rule that
        // directories change under the writer's lock.
        let transaction = self.store.write()?;
        let inventory = transaction.rows().inventory()?;

        let image = self.volumes.open(Volume::Image)?;
        let on_image = trash_strays(&image, Volume::Image, &inventory)?;
        heal(&image, Volume::Image, &inventory, &on_image);
        self.set_links(&inventory, &on_image)?;

        match self.volumes.open(Volume::Writable) {
            Ok(writable) => {
                let on_writable = trash_strays(&writable, Volume::Writable, &inventory)?;
                heal(&writable, Volume::Writable, &inventory, &on_writable);
            }
            Err(error) => {
                self.note_stray(Volume::Writable);
                log::warn!(
                    "containers cannot be started: {}; until it is back, only what does not \
                     need it is served",
                    error.chain()
                );
            }
        }
        Ok(())
    }

    /// Every layer whose bytes are on the writable volume is named by a link on
    /// the image volume; it is written anew where the writable directory moved.
    fn set_links(&self, inventory: &Inventory, found: &Found) -> Result<()> {
        for (snapshot, name) in inventory {
            let is_linked =
                snapshot.kind == Kind::Committed && snapshot.volume == Some(Volume::Writable);
            if !is_linked {
                continue;
            }
            let target = self.volumes.link_target(snapshot.id);
            let is_right = found.get(&snapshot.id) == Some(&FileType::Symlink)
                && self.volumes.image().links_to(snapshot.id, &target)?;
            if !is_right {
                self.volumes.link_home(snapshot.id)?;
                log::info!("layer {} is found at {target} from now on", Quoted(name));
            }
        }
        Ok(())
    }
}

/// What `snapshots/` of a volume holds under ids that rows know.
type Found = HashMap<SnapshotId, FileType>;

/// Moves to the trash what no row places on that volume, and returns the rest.
/// Names that are no ids are left alone: this program did not make them.
pub(super) fn trash_strays(
    dirs: &Arc<Dirs>,
    volume: Volume,
    inventory: &Inventory,
) -> Result<Found> {
    let belongs = |snapshot: &Removed| match volume {
        // As a directory, or as the link of a layer that is elsewhere.
        Volume::Image => {
            snapshot.volume == Some(Volume::Image)
                || snapshot.volume == Some(Volume::Writable) && snapshot.kind == Kind::Committed
        }
        Volume::Writable => snapshot.volume == Some(Volume::Writable),
    };
    let known: HashSet<SnapshotId> = inventory
        .iter()
        .filter(|(snapshot, _)| belongs(snapshot))
        .map(|(snapshot, _)| snapshot.id)
        .collect();
    let mut found = Found::new();
    for entry in dirs.entries()? {
        match SnapshotId::from_directory_name(entry.name.to_bytes()) {
            Some(id) if known.contains(&id) => {
                found.insert(id, entry.file_type);
            }
            Some(id) => {
                dirs.trash(id).context(|| "move a stray directory away")?;
                log::warn!("{volume} volume: snapshots/{id} belongs to no snapshot: trashed");
            }
            None => log::warn!(
                "{volume} volume: {:?} in snapshots/ was not made by this program: left alone",
                entry.name
            ),
        }
    }
    Ok(found)
}

/// Deals with rows whose directory is missing: an active snapshot gets an empty
/// one, as after a power cut before its directory reached the disk; a missing
/// layer cannot be healed and is reported.
fn heal(dirs: &Arc<Dirs>, volume: Volume, inventory: &Inventory, found: &Found) {
    for (snapshot, name) in inventory {
        if snapshot.volume != Some(volume) || found.get(&snapshot.id) == Some(&FileType::Directory)
        {
            continue;
        }
        let shape = match snapshot.kind {
            Kind::Committed => {
                log::error!(
                    "layer {} is lost: {volume} volume: snapshots/{} is missing; remove the \
                     images that use it and pull them again",
                    Quoted(name),
                    snapshot.id
                );
                continue;
            }
            Kind::Active => Shape::UpperAndWork,
            Kind::View => Shape::UpperOnly,
        };
        match dirs.create(snapshot.id, shape, Owner { uid: 0, gid: 0 }) {
            Ok(made) => {
                made.keep();
                log::warn!(
                    "snapshot {} had no directory on the {volume} volume: it starts empty",
                    Quoted(name)
                );
            }
            Err(error) => log::error!(
                "snapshot {} has no directory: {}",
                Quoted(name),
                error.chain()
            ),
        }
    }
}
