//! Which snapshots are mounted now, according to the kernel's lists of mounts.
//!
//! Owns: recognising that a mount shows a directory of a snapshot. The directory may have
//! had another name when it was mounted. A bind mount is therefore recognised by its file
//! system and the path there, and an overlay by the inode to which the path in its options
//! leads. If that path leads nowhere, the id in the path decides: when in doubt, a
//! directory counts as mounted.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{fstat, stat};

use crate::error::{Context, Error, Result};
use crate::mount::ByHand;
use crate::mount::mountinfo::{self, Mounted, Part};
use crate::mount::namespaces::{Inode, Namespace, read_everywhere};
use crate::store::{Rows, Store};
use crate::types::{QuotedPath, SnapshotId, Volume};
use crate::volume::{Dirs, Identity, Volumes, replaced_id};

/// The snapshots of this root that persons have mounted. Another root on this machine may
/// use the same ids.
pub(super) fn mounted_by_hand(store: &Store) -> Result<Vec<ByHand>> {
    let identity = store.read()?.fact(Identity::FACT)?;
    ByHand::of_root(identity.as_deref())
}

/// Returns an error if a person has mounted the snapshot to write to it, or is about to.
pub(super) fn require_not_by_hand(store: &Store, volumes: &Volumes, id: SnapshotId) -> Result<()> {
    let image = volumes.image();
    // The mark is cheap to look for, but may be left from a mount that has ended.
    if !image.is_marked_mounted_by_hand(id)? {
        return Ok(());
    }
    let mut point = None;
    let is_mounted = || {
        let mut mounted = mounted_by_hand(store)?.into_iter();
        point = mounted.find(|by_hand| by_hand.id == id).map(|it| it.point);
        Ok(point.is_some())
    };
    image.unmark_unless_mounted(id, is_mounted)?;
    point.map_or(Ok(()), |point| {
        Err(Error::refused(format!(
            "snapshot {id} is mounted by hand at {}: unmount it there first",
            QuotedPath(&point)
        )))
    })
}

/// The mounts at one moment, in every mount namespace that this process may look into.
pub(super) struct Mounts<'a> {
    volumes: &'a Volumes,
    /// The namespace of this process is the first.
    namespaces: Vec<Namespace>,
    /// For the device of each overlay, the namespaces that show the overlay.
    shown_in: HashMap<String, Vec<usize>>,
    by_hand: Vec<SnapshotId>,
    /// Where the image volume is; `None` if the kernel does not show its path.
    image: Option<Location>,
    /// Where the writable volume is; `None` if it is missing.
    writable: Option<Location>,
}

/// Where the `snapshots/` of a volume is in the kernel's list of mounts.
struct Location {
    dirs: Arc<Dirs>,
    /// The device of the file system.
    device: String,
    /// The path of `snapshots/` within that file system.
    root: PathBuf,
}

/// How sure it is that a mount shows the directory of a snapshot.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Sureness {
    /// The mounted directory has the same inode as the directory of the snapshot.
    Proved,
    /// The path in the mount's options has the snapshot's id, and leads nowhere now.
    Possible,
}

impl<'a> Mounts<'a> {
    pub(super) fn read(store: &Store, volumes: &'a Volumes) -> Result<Mounts<'a>> {
        let by_hand = mounted_by_hand(store)?.into_iter();
        let writable = match volumes.open(Volume::Writable) {
            Ok(dirs) => location(dirs)?,
            Err(_) => None,
        };
        let namespaces = read_everywhere().context(|| "find out what is mounted")?;
        let mut shown_in: HashMap<String, Vec<usize>> = HashMap::new();
        for (number, namespace) in namespaces.iter().enumerate() {
            for mounted in namespace.mounts.iter().filter(|it| !it.overlay.is_empty()) {
                let shown = shown_in.entry(mounted.device.clone()).or_default();
                if shown.last() != Some(&number) {
                    shown.push(number);
                }
            }
        }
        Ok(Mounts {
            volumes,
            namespaces,
            shown_in,
            by_hand: by_hand.map(|mounted| mounted.id).collect(),
            image: location(Arc::clone(volumes.image().dirs()))?,
            writable,
        })
    }

    fn all(&self) -> impl Iterator<Item = &Mounted> {
        self.namespaces
            .iter()
            .flat_map(|namespace| &namespace.mounts)
    }

    /// The snapshots whose directory on the writable volume is mounted for writing, at
    /// least as surely as `least`, and all that persons have mounted, because a person who
    /// looks into a layer needs it to stay.
    fn on_writable(&self, least: Sureness) -> HashSet<SnapshotId> {
        let mut found: HashSet<_> = self.by_hand.iter().copied().collect();
        for mounted in self.all() {
            let bound = bound(self.writable.as_ref(), mounted);
            found.extend(bound.filter(|_| !mounted.is_read_only));
            for upper in parts(mounted, Part::Upper) {
                let shown = self.snapshot_at(Volume::Writable, mounted, upper);
                let is_enough = |sure: Sureness| sure == Sureness::Proved || sure == least;
                found.extend(shown.filter(|it| is_enough(it.1)).map(|it| it.0));
            }
        }
        found
    }

    /// The snapshots whose directory is the upper directory of an overlay.
    pub(super) fn writers(&self) -> HashSet<SnapshotId> {
        let mut found = HashSet::new();
        for mounted in self.all() {
            for upper in parts(mounted, Part::Upper) {
                let on = |volume| self.snapshot_at(volume, mounted, upper);
                let shown = [Volume::Image, Volume::Writable].map(on);
                found.extend(shown.into_iter().flatten().map(|it| it.0));
            }
        }
        found
    }

    /// The layers that were committed while they were mounted for writing, and still are
    /// mounted, and the layers below them. containerd requires that a snapshot is not in
    /// use after its commit, but `ctr snapshot commit` permits the commit of a running
    /// container, which then goes on writing.
    pub(super) fn layers(&self, rows: &Rows) -> Result<HashSet<SnapshotId>> {
        let mounted: Vec<_> = self.on_writable(Sureness::Possible).into_iter().collect();
        rows.layers_of(&mounted)
    }

    /// The mounts that may show the leftover directory of a moved layer. All overlays on
    /// the layer are among them, because the kernel does not show whether an overlay was
    /// mounted before the layer moved.
    pub(super) fn of_leftover(&self, id: SnapshotId) -> Vec<&Mounted> {
        let shows = |mounted: &&Mounted| {
            bound(self.writable.as_ref(), mounted) == Some(id)
                || self.is_part(Volume::Writable, mounted, Part::Upper, id)
                || self.is_part(Volume::Image, mounted, Part::Lower, id)
        };
        self.all().filter(shows).collect()
    }

    fn is_part(&self, volume: Volume, mounted: &Mounted, part: Part, id: SnapshotId) -> bool {
        let mut named = parts(mounted, part).filter(|path| number_in(path) == Some(id));
        named.any(|path| self.snapshot_at(volume, mounted, path).is_some())
    }

    /// Whether the directory that a healed layer has replaced may be mounted, or be among
    /// the lower directories of an overlay.
    pub(super) fn may_show_replaced(&self, id: SnapshotId) -> bool {
        self.image.is_none() || !self.of_replaced(id).is_empty()
    }

    /// The mounts that may show the directory that a healed layer has replaced. All
    /// overlays on the layer are among them, because the kernel does not show whether an
    /// overlay was mounted before the layer healed.
    pub(super) fn of_replaced(&self, id: SnapshotId) -> Vec<&Mounted> {
        let shows = |mounted: &&Mounted| {
            let name = bound_name(self.image.as_ref(), mounted);
            name.and_then(|name| replaced_id(name.as_encoded_bytes())) == Some(id)
                || self.is_part(Volume::Image, mounted, Part::Lower, id)
        };
        self.all().filter(shows).collect()
    }

    /// The snapshot on `volume` to whose directory `path`, from the options of an overlay,
    /// leads.
    fn snapshot_at(
        &self,
        volume: Volume,
        mounted: &Mounted,
        path: &Path,
    ) -> Option<(SnapshotId, Sureness)> {
        let id = number_in(path)?;
        let snapshots = path.ancestors().nth(2);
        let is_named = snapshots == Some(Path::new(&self.volumes.snapshots_path(volume)));
        if path.file_name()? != "fs" && !is_named {
            return None;
        }
        if !path.is_absolute() {
            // The program that mounted the overlay gave a path relative to a directory that
            // only it knows.
            let is_possible = !self.is_another_snapshotters(mounted);
            return is_possible.then_some((id, Sureness::Possible));
        }
        let found = self.inodes_at(mounted, path);
        let own = self.own_inode(volume, id);
        if own.is_some_and(|own| found.contains(&own)) {
            Some((id, Sureness::Proved))
        } else {
            (found.is_empty() || is_named).then_some((id, Sureness::Possible))
        }
    }

    /// Whether an overlay is another snapshotter's: its upper directory is
    /// `snapshots/<id>/fs`, and is not ours. The ids in the overlay's relative paths are
    /// then not ours, either.
    fn is_another_snapshotters(&self, mounted: &Mounted) -> bool {
        let Some(upper) = parts(mounted, Part::Upper).next() else {
            return false;
        };
        let snapshots = upper.ancestors().nth(2).and_then(Path::file_name);
        let is_ours = |volume| self.snapshot_at(volume, mounted, upper).is_some();
        upper.is_absolute()
            && snapshots.is_some_and(|name| name == "snapshots")
            && !self.inodes_at(mounted, upper).is_empty()
            && ![Volume::Image, Volume::Writable].into_iter().any(is_ours)
    }

    /// The inodes to which a path in an overlay's options leads: in this process's mount
    /// namespace, and in each other one that shows the overlay.
    fn inodes_at(&self, mounted: &Mounted, path: &Path) -> Vec<Inode> {
        let others = self.shown_in.get(&mounted.device).into_iter().flatten();
        let numbers = [0]
            .into_iter()
            .chain(others.copied().filter(|number| *number != 0));
        let inode = |number: usize| self.namespaces.get(number)?.inode_at(path);
        numbers.filter_map(inode).collect()
    }

    fn own_inode(&self, volume: Volume, id: SnapshotId) -> Option<Inode> {
        let own = match (volume, &self.writable) {
            (Volume::Image, _) => stat(self.volumes.image().layer_path(id)).ok(),
            (Volume::Writable, Some(writable)) => {
                let upper = writable.dirs.open_upper(id);
                upper.ok().and_then(|upper| fstat(upper).ok())
            }
            (Volume::Writable, None) => None,
        };
        own.map(|own| (own.st_dev, own.st_ino))
    }
}

fn parts(mounted: &Mounted, part: Part) -> impl Iterator<Item = &Path> {
    let of_part = mounted.overlay.iter().filter(move |it| it.0 == part);
    of_part.map(|(_, path)| path.as_path())
}

/// The id in the path `…/<id>/fs` of a snapshot's directory.
fn number_in(path: &Path) -> Option<SnapshotId> {
    number(path.parent()?.file_name()?)
}

/// The snapshot on a volume whose directory, or a part of it, a bind mount shows.
fn bound(volume: Option<&Location>, mounted: &Mounted) -> Option<SnapshotId> {
    number(bound_name(volume, mounted)?)
}

/// The entry of a volume's `snapshots/` that a bind mount shows, or shows a part of. A
/// directory that was replaced after it was mounted has another name now.
fn bound_name<'a>(volume: Option<&Location>, mounted: &'a Mounted) -> Option<&'a OsStr> {
    let volume = volume.filter(|volume| volume.device == mounted.device)?;
    let below = mounted.root.strip_prefix(&volume.root).ok()?;
    Some(below.components().next()?.as_os_str())
}

fn number(name: &OsStr) -> Option<SnapshotId> {
    SnapshotId::from_directory_name(name.as_encoded_bytes())
}

/// Where the `snapshots/` of a volume is; `None` if the kernel does not show its path.
fn location(dirs: Arc<Dirs>) -> Result<Option<Location>> {
    let snapshots = dirs.snapshots_fd();
    let mounted = mountinfo::of_file(snapshots)
        .context(|| format!("find out on which mount {} is", dirs.path()))?;
    let Some(mounted) = mounted else {
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

/// Whether a snapshot on the writable volume is mounted for writing, at least as surely as
/// `least`.
pub(super) fn is_mounted(
    store: &Store,
    volumes: &Volumes,
    id: SnapshotId,
    volume: Volume,
    least: Sureness,
) -> Result<bool> {
    // Snapshots on the image volume are mostly unpacks, which containerd unmounts before it
    // commits them.
    let read = || Mounts::read(store, volumes);
    Ok(volume == Volume::Writable && read()?.on_writable(least).contains(&id))
}

/// The layers that are mounted for writing now, and the layers below them: the result of
/// [`Mounts::layers`] for this moment.
pub(super) fn mounted_layers(store: &Store, volumes: &Volumes) -> Result<HashSet<SnapshotId>> {
    Mounts::read(store, volumes)?.layers(&*store.read()?)
}
