//! Comparing a layer with the content from which it was unpacked.
//!
//! Owns: the directory in which a layer is unpacked again, its mount, and the rule that
//! differences do not count if the daemon has moved or removed the layer during the
//! comparison. Never: asks containerd; the caller provides a function that unpacks. This
//! module writes only in `snapshots/.unpacked`, and deletes the unpacked layer after the
//! comparison.

use std::cell::Cell;
use std::sync::atomic::AtomicBool;
use std::thread::sleep;
use std::time::Duration;

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::fstat;

use super::Snapshotter;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::mount::overlay::{Plan, plan_mounts};
use crate::store::Snapshot;
use crate::tree::{self, Differences, ReadFrom, Rules};
use crate::types::{Kind, Mount, Usage, Volume};
use crate::volume::{Dirs, Owner, UnpackDir, Unused};

/// The directory in which layers are unpacked to be compared. Dropping this value removes
/// the directory.
pub struct Unpacking<'a> {
    pub(super) snapshotter: &'a Snapshotter,
    /// The directory; `None` only while this value is dropped.
    dir: Option<UnpackDir<'a>>,
    cancel: &'a AtomicBool,
}

/// The result of a comparison.
#[derive(Debug, PartialEq, Eq)]
pub enum Compared {
    /// The files of the layer are the same as those that were unpacked again.
    Sound,
    /// The files of the layer differ from those that were unpacked again.
    Differs(Differences),
    /// The layer was removed or moved during the comparison.
    Gone,
}

impl Snapshotter {
    /// All layers, each after the layers below it.
    pub fn layers_in_order(&self) -> Result<Vec<Snapshot>> {
        let mut layers = self.all_snapshots()?;
        layers.retain(|snapshot| snapshot.info.kind == Kind::Committed);
        let reader = self.store.read()?;
        let height = |layer: &Snapshot| reader.chain(layer.id).map_or(0, |chain| chain.len());
        layers.sort_by_cached_key(|layer| (height(layer), layer.id));
        Ok(layers)
    }

    /// Takes the directory for unpacked layers, so that layers can be compared. Once
    /// `cancel` is set, comparisons end early.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FailedPrecondition`] if another process is comparing layers already.
    pub fn begin_unpacking<'a>(&'a self, cancel: &'a AtomicBool) -> Result<Unpacking<'a>> {
        let unpacking = Unpacking {
            snapshotter: self,
            dir: Some(self.volumes.image().take_unpack_dir()?),
            cancel,
        };
        unpacking.empty()?;
        Ok(unpacking)
    }
}

impl Unpacking<'_> {
    /// Unpacks a layer again with `unpack`, which writes to the given mount, and compares
    /// the result with the layer's directory. While `unpack` writes, it calls the given
    /// function, which returns an error once too much is written for this layer. The
    /// unpacked layer is deleted at the next comparison, or when this value is dropped.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::ResourceExhausted`] if the image volume has no room for the unpacked
    /// layer; [`ErrorKind::Cancelled`] if the comparison was cancelled; errors of `unpack`.
    pub fn compare(
        &self,
        layer: &Snapshot,
        unpack: impl FnOnce(&Mount, &dyn Fn() -> Result<()>) -> Result<()>,
    ) -> Result<Compared> {
        self.empty()?;
        self.require_room(layer)?;
        let lowers = self.lowers(layer)?;
        let image = self.snapshotter.volumes.image();
        let (paths, top) = self.dir()?.begin(self.owner(layer))?;
        let since = fstat(&top)
            .context(|| "read when the unpacked layer was created")?
            .st_mtime;
        let empty = image.empty_path();
        let mount = plan_mounts(&Plan {
            kind: Kind::Active,
            own: &paths,
            lowers: &lowers,
            host_dirs: &[],
            empty: &empty,
            // If the mount is an overlay, containerd writes into its upper directory and
            // mounts nothing, so a killed command leaves no mount.
            over_empty: true,
            options: &self.snapshotter.options.mount_options,
            id_options: &[],
        });
        let growth = Growth::begin(image.dirs(), &top, layer.usage)?;
        if let Some(mount) = mount.first() {
            unpack(mount, &|| growth.check())?;
        }
        let rules = Rules {
            since,
            is_lowest: lowers.is_empty(),
        };
        if rules.is_lowest {
            tree::remove_whiteouts(&top)?;
        }
        let compared = self.compare_with(layer, &top, rules)?;
        let place = self.snapshotter.store.read()?.place(layer.id)?;
        Ok(match compared {
            Compared::Differs(_) if place != Some(layer.place()) => Compared::Gone,
            compared => compared,
        })
    }

    fn compare_with(
        &self,
        layer: &Snapshot,
        expected: impl AsFd,
        rules: Rules,
    ) -> Result<Compared> {
        let volume = layer.volume.unwrap_or(Volume::Image);
        let dirs = self.snapshotter.volumes.open(volume)?;
        let found = match dirs.open_upper(layer.id) {
            Ok(found) => found,
            Err(error) => return Ok(Compared::Differs(Differences::whole(error.chain()))),
        };
        let differences = tree::compare_trees(expected, found, rules, self.cancel)?;
        Ok(match differences.count {
            0 => Compared::Sound,
            _ => Compared::Differs(differences),
        })
    }

    /// The digest of the files that a layer has now; `None` if the layer was removed or
    /// moved meanwhile.
    pub fn digest(&self, layer: &Snapshot) -> Result<Option<String>> {
        let volume = layer.volume.unwrap_or(Volume::Image);
        let top = self.snapshotter.volumes.open(volume)?.open_upper(layer.id);
        let is_lowest = layer.parent_id.is_none();
        let digest =
            top.and_then(|top| tree::digest_tree(top, is_lowest, ReadFrom::Disk, self.cancel));
        let place = self.snapshotter.store.read()?.place(layer.id)?;
        (place == Some(layer.place())).then_some(digest).transpose()
    }

    /// The directories of the layers below a layer, nearest first.
    fn lowers(&self, layer: &Snapshot) -> Result<Vec<String>> {
        let Some(parent) = layer.parent_id else {
            return Ok(Vec::new());
        };
        let image = self.snapshotter.volumes.image();
        let chain = self.snapshotter.store.read()?.chain(parent)?;
        Ok(chain
            .iter()
            .map(|below| image.layer_path(below.id))
            .collect())
    }

    /// The owner of the directory in which a layer is unpacked: the same as at its first
    /// unpack.
    fn owner(&self, layer: &Snapshot) -> Owner {
        let owner = self.snapshotter.owner_for(None, layer.parent_id);
        owner.unwrap_or(Owner { uid: 0, gid: 0 })
    }

    fn require_room(&self, layer: &Snapshot) -> Result<()> {
        let image = self.snapshotter.volumes.image().dirs();
        let (needed, unused) = (layer.usage, image.unused()?);
        if needed.size_bytes <= unused.bytes && needed.inodes <= unused.inodes {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::ResourceExhausted,
            format!(
                "to unpack the layer again takes {} bytes and {} inodes, and {} has {} bytes and \
                 {} inodes free: remove images, or make the volume larger",
                needed.size_bytes,
                needed.inodes,
                image.path(),
                unused.bytes,
                unused.inodes
            ),
        ))
    }

    /// Deletes the unpacked layer. The deletion is tried again for two seconds, because
    /// containerd may go on writing for a moment after an unpack was interrupted.
    fn empty(&self) -> Result<()> {
        const ATTEMPTS: u32 = 20;
        let mut attempt = 1;
        loop {
            match tree::remove_children(self.dir()?.fd()) {
                Err(_) if attempt < ATTEMPTS => sleep(Duration::from_millis(100)),
                removed => {
                    return removed.context(|| "delete the unpacked layer in snapshots/.unpacked");
                }
            }
            attempt += 1;
        }
    }

    pub(super) fn dir(&self) -> Result<&UnpackDir<'_>> {
        let dir = self.dir.as_ref();
        dir.ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                "the directory for unpacked layers was removed already",
            )
        })
    }
}

/// Limits how much an unpack writes to the image volume. Wrong or hostile content may
/// unpack to more than the volume can hold.
struct Growth<'a> {
    dirs: &'a Dirs,
    top: &'a OwnedFd,
    most: Usage,
    /// The unpacked files are counted again only when less than this is free on the volume.
    /// While more is free, the unpacked files cannot take more than `most`.
    floor: Cell<Unused>,
    /// How much of the volume the unpack has to leave free.
    reserve_bytes: u64,
}

/// An unpacked layer may take twice the size recorded for the layer, and this much more.
const SLACK: Usage = Usage {
    size_bytes: 64 << 20,
    inodes: 10_000,
};

impl<'a> Growth<'a> {
    fn begin(dirs: &'a Dirs, top: &'a OwnedFd, recorded: Usage) -> Result<Growth<'a>> {
        let growth = Growth {
            dirs,
            top,
            most: Usage {
                size_bytes: 2 * recorded.size_bytes + SLACK.size_bytes,
                inodes: 2 * recorded.inodes + SLACK.inodes,
            },
            floor: Cell::new(dirs.unused()?),
            reserve_bytes: (64 << 20).min(dirs.room()?.size_bytes / 50),
        };
        growth.lower_floor(growth.most);
        Ok(growth)
    }

    fn lower_floor(&self, by: Usage) {
        let unused = self.floor.get();
        self.floor.set(Unused {
            bytes: unused.bytes.saturating_sub(by.size_bytes),
            inodes: unused.inodes.saturating_sub(by.inodes),
        });
    }

    fn check(&self) -> Result<()> {
        let unused = self.dirs.unused()?;
        if unused.bytes < self.reserve_bytes {
            let what = "the image volume is almost full: remove images, or make it larger";
            return Err(Error::new(ErrorKind::ResourceExhausted, what));
        }
        let floor = self.floor.get();
        if unused.bytes >= floor.bytes && unused.inodes >= floor.inodes {
            return Ok(());
        }
        // Other programs may have filled the volume, so the unpacked files are counted. The
        // count may fail, because containerd is writing them.
        let Ok(counted) = tree::count(self.top) else {
            return Ok(());
        };
        let (found, most) = (counted.usage, self.most);
        if found.size_bytes > most.size_bytes || found.inodes > most.inodes {
            return Err(Error::data_loss(format!(
                "the unpacked content is not the content of this layer: it takes more than {} \
                 bytes or {} inodes",
                most.size_bytes, most.inodes
            )));
        }
        self.floor.set(unused);
        self.lower_floor(Usage {
            size_bytes: (most.size_bytes - found.size_bytes).max(SLACK.size_bytes / 4),
            inodes: (most.inodes - found.inodes).max(SLACK.inodes / 4),
        });
        Ok(())
    }
}

impl Drop for Unpacking<'_> {
    fn drop(&mut self) {
        let emptied = self.empty();
        if let Some(dir) = self.dir.take() {
            dir.remove();
        }
        if let Err(error) = emptied {
            log::warn!(
                "files of a check stay on the image volume until the next check or start: {}",
                error.chain()
            );
        }
    }
}
