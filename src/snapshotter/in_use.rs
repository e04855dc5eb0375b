//! Which snapshots are mounted now, according to the kernel's lists of mounts.
//!
//! Owns: recognising that a mount shows a directory of a snapshot. The directory may have
//! had another name when it was mounted. A bind mount is therefore recognised by its file
//! system and the path there, and an overlay by the inode to which its path leads. If
//! that path leads nowhere, the number in it decides: when in doubt, a directory counts
//! as mounted.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Stat, fstat, stat};

use crate::error::Result;
use crate::mount::ByHand;
use crate::mount::mountinfo::{self, Mounted, Part};
use crate::store::{Rows, Store};
use crate::types::{SnapshotId, Volume};
use crate::volume::{Dirs, Identity, Volumes, replaced_id};

/// The snapshots of this root that persons have mounted. Another root on this
/// machine uses the same numbers.
pub(super) fn mounted_by_hand(store: &Store) -> Result<Vec<ByHand>> {
    let identity = store.read()?.fact(Identity::FACT)?;
    ByHand::of_root(identity.as_deref())
}

/// The mounts of one moment, in all mount namespaces that can be read.
pub(super) struct Mounts<'a> {
    volumes: &'a Volumes,
    mounts: Vec<Mounted>,
    by_hand: Vec<SnapshotId>,
    /// `None` if the kernel does not show the path of the image volume.
    image: Option<Location>,
    /// `None` if the writable volume is not there.
    writable: Option<Location>,
}

/// The place of a volume's `snapshots/` in the kernel's list.
struct Location {
    dirs: Arc<Dirs>,
    /// The device of the file system.
    device: String,
    /// The path on that file system.
    root: PathBuf,
}

impl<'a> Mounts<'a> {
    pub(super) fn read(store: &Store, volumes: &'a Volumes) -> Result<Mounts<'a>> {
        let by_hand = mounted_by_hand(store)?.into_iter();
        let writable = match volumes.open(Volume::Writable) {
            Ok(dirs) => location(dirs)?,
            Err(_) => None,
        };
        let mut read = Mounts {
            volumes,
            mounts: Vec::new(),
            by_hand: by_hand.map(|mounted| mounted.id).collect(),
            image: location(Arc::clone(volumes.image().dirs()))?,
            writable,
        };
        let mut mounts = mountinfo::read_everywhere()?;
        for mounted in &mut mounts {
            if read.is_another_snapshotters(mounted) {
                mounted.overlay.retain(|(_, path)| path.is_absolute());
            }
        }
        read.mounts = mounts;
        Ok(read)
    }

    /// Whether the upper directory of an overlay is a snapshot's, `snapshots/<id>/fs`, and
    /// none of ours. The numbers in its relative paths are then that snapshotter's.
    fn is_another_snapshotters(&self, mounted: &Mounted) -> bool {
        let mut parts = mounted.overlay.iter();
        let Some((_, upper)) = parts.find(|it| it.0 == Part::Upper) else {
            return false;
        };
        let snapshots = upper.ancestors().nth(2).and_then(Path::file_name);
        let volumes = [Volume::Image, Volume::Writable];
        upper.is_absolute()
            && snapshots.is_some_and(|name| name == "snapshots")
            && stat(upper).is_ok()
            && volumes
                .iter()
                .all(|volume| self.snapshot_at(*volume, upper).is_none())
    }

    /// The snapshots whose directory on the writable volume is mounted so that it can be
    /// written to, and all that persons have mounted, because a person who looks into a
    /// layer needs it to stay.
    fn on_writable(&self) -> HashSet<SnapshotId> {
        let mut found: HashSet<_> = self.by_hand.iter().copied().collect();
        for mounted in &self.mounts {
            let bound = bound(self.writable.as_ref(), mounted);
            found.extend(bound.filter(|_| !mounted.is_read_only));
            let uppers = mounted.overlay.iter().filter(|it| it.0 == Part::Upper);
            found.extend(uppers.filter_map(|(_, path)| self.snapshot_at(Volume::Writable, path)));
        }
        found
    }

    /// The snapshots whose directory is the upper directory of an overlay.
    pub(super) fn writers(&self) -> HashSet<SnapshotId> {
        let parts = self.mounts.iter().flat_map(|mounted| &mounted.overlay);
        let uppers = parts.filter(|(part, _)| *part == Part::Upper);
        let on = |path: &Path, volume| self.snapshot_at(volume, path);
        uppers
            .flat_map(|(_, path)| [Volume::Image, Volume::Writable].map(|volume| on(path, volume)))
            .flatten()
            .collect()
    }

    /// Layers that were committed while they were mounted, and still are, and the layers
    /// below them. containerd requires that a snapshot is not in use after its commit,
    /// but `ctr snapshot commit` permits the commit of a running container, which then
    /// goes on writing.
    pub(super) fn layers(&self, rows: &Rows) -> Result<HashSet<SnapshotId>> {
        rows.layers_of(&self.on_writable().into_iter().collect::<Vec<_>>())
    }

    /// The mounts that may show the directory that a moved layer has left on the
    /// writable volume. An overlay does not show whether it was mounted before the layer
    /// moved.
    pub(super) fn of_leftover(&self, id: SnapshotId) -> Vec<&Mounted> {
        let layer_of = |part: Part, path: &Path| match part {
            Part::Upper => self.snapshot_at(Volume::Writable, path),
            Part::Lower => self.snapshot_at(Volume::Image, path),
        };
        let shows = |mounted: &&Mounted| {
            let mut parts = mounted.overlay.iter();
            bound(self.writable.as_ref(), mounted) == Some(id)
                || parts.any(|(part, path)| layer_of(*part, path) == Some(id))
        };
        self.mounts.iter().filter(shows).collect()
    }

    /// Whether a directory that a healed layer has taken the place of may be mounted, or
    /// among the lower directories of an overlay.
    pub(super) fn may_show_replaced(&self, id: SnapshotId) -> bool {
        self.image.is_none() || !self.of_replaced(id).is_empty()
    }

    /// The mounts that show, or may have been made of, the directory that a healed layer has
    /// taken the place of. An overlay does not say whether it was mounted before that.
    pub(super) fn of_replaced(&self, id: SnapshotId) -> Vec<&Mounted> {
        let shows = |mounted: &&Mounted| {
            let mut lowers = mounted.overlay.iter().filter(|it| it.0 == Part::Lower);
            let name = bound_name(self.image.as_ref(), mounted);
            name.and_then(|name| replaced_id(name.as_encoded_bytes())) == Some(id)
                || lowers.any(|(_, path)| self.snapshot_at(Volume::Image, path) == Some(id))
        };
        self.mounts.iter().filter(shows).collect()
    }

    /// The snapshot on that volume whose directory a path in an overlay's options leads
    /// to.
    fn snapshot_at(&self, volume: Volume, path: &Path) -> Option<SnapshotId> {
        let snapshot = path.parent()?;
        let id = number(snapshot.file_name()?)?;
        if snapshot.parent() == Some(Path::new(&self.volumes.snapshots_path(volume))) {
            return Some(id);
        }
        let is_fs = path.file_name()? == "fs";
        // The mounting program has shortened the path by a directory that only
        // it knows.
        let is_relative = !path.is_absolute();
        (is_fs && (is_relative || self.may_be_it(volume, id, path))).then_some(id)
    }

    fn may_be_it(&self, volume: Volume, id: SnapshotId, path: &Path) -> bool {
        let own = match (volume, &self.writable) {
            (Volume::Image, _) => stat(self.volumes.image().layer_path(id)).ok(),
            (_, Some(writable)) => {
                let upper = writable.dirs.open_upper(id);
                upper.ok().and_then(|upper| fstat(upper).ok())
            }
            (_, None) => None,
        };
        let inode = |stat: Stat| (stat.st_dev, stat.st_ino);
        match (own.map(inode), stat(path).map(inode)) {
            (Some(own), Ok(found)) => own == found,
            (None, Ok(_)) => false,
            (_, Err(_)) => true,
        }
    }
}

/// The snapshot of whose directory on a volume this is a bind mount, or of something in it.
fn bound(volume: Option<&Location>, mounted: &Mounted) -> Option<SnapshotId> {
    number(bound_name(volume, mounted)?)
}

/// The name in a volume's `snapshots/` of which this is a bind mount, or of something in it.
/// A directory that was replaced after it was mounted has another name now.
fn bound_name<'a>(volume: Option<&Location>, mounted: &'a Mounted) -> Option<&'a OsStr> {
    let volume = volume.filter(|volume| volume.device == mounted.device)?;
    let below = mounted.root.strip_prefix(&volume.root).ok()?;
    Some(below.components().next()?.as_os_str())
}

fn number(name: &OsStr) -> Option<SnapshotId> {
    SnapshotId::from_directory_name(name.as_encoded_bytes())
}

/// `None` if the kernel does not show the path of the directory.
fn location(dirs: Arc<Dirs>) -> Result<Option<Location>> {
    let snapshots = dirs.snapshots_fd();
    let Some(mounted) = mountinfo::of_file(snapshots)? else {
        return Ok(None);
    };
    let Some(path) = mountinfo::path_of_file(snapshots) else {
        return Ok(None);
    };
    Ok(path
        .strip_prefix(&mounted.point)
        .ok()
        .map(|below| Location {
            root: mounted.root.join(below),
            device: mounted.device,
            dirs: Arc::clone(&dirs),
        }))
}

/// Whether a snapshot is mounted, so that a program may still write into it.
pub(super) fn is_mounted(
    store: &Store,
    volumes: &Volumes,
    id: SnapshotId,
    volume: Volume,
) -> Result<bool> {
    // containerd unmounts the directory of an unpack before it commits the
    // layer.
    Ok(volume == Volume::Writable && Mounts::read(store, volumes)?.on_writable().contains(&id))
}

/// The result of [`Mounts::layers`] for this moment.
pub(super) fn mounted_layers(store: &Store, volumes: &Volumes) -> Result<HashSet<SnapshotId>> {
    Mounts::read(store, volumes)?.layers(&*store.read()?)
}
