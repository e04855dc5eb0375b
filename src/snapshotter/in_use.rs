//! Which snapshots are mounted now, by the kernel's list of mounts.

use std::collections::HashSet;

use crate::error::Result;
use crate::mount::mountinfo::{self, Mounted};
use crate::mount::{self, ByHand};
use crate::store::Store;
use crate::types::{SnapshotId, Volume};
use crate::volume::{Identity, Volumes};

/// The snapshots of this root that persons have mounted. Another root on this
/// machine gives out the same numbers.
pub(super) fn mounted_by_hand(store: &Store) -> Result<Vec<ByHand>> {
    let identity = store.read()?.fact(Identity::FACT)?;
    ByHand::of_root(identity.as_deref())
}

/// The snapshots on the writable volume that are mounted to be written to, and all
/// that persons have mounted: who looks into a layer wants to read it to its end.
pub(super) fn mounted_on_writable(store: &Store, volumes: &Volumes) -> Result<Vec<SnapshotId>> {
    let uppers = mount::upper_directories()?;
    let ids = uppers
        .iter()
        .filter_map(|upper| volumes.snapshot_at(Volume::Writable, upper));
    let by_hand = mounted_by_hand(store)?;
    let by_hand = by_hand.into_iter().map(|mounted| mounted.id);
    Ok(ids.chain(by_hand).collect())
}

/// Whether a snapshot is mounted, so that a program may still write into it.
pub(super) fn is_mounted(
    store: &Store,
    volumes: &Volumes,
    id: SnapshotId,
    volume: Volume,
) -> Result<bool> {
    // containerd unmounts what it unpacked a layer into before it commits it.
    Ok(volume == Volume::Writable && mounted_on_writable(store, volumes)?.contains(&id))
}

/// Whether a layer may be among the lower directories of a mount, or mounted itself, in any
/// mount namespace.
pub(super) fn is_mounted_anywhere(volumes: &Volumes, layer: SnapshotId) -> Result<bool> {
    let image = volumes.image();
    let own = mountinfo::of_file(image.dirs().snapshots_fd())?;
    let is_here = |mounted: &Mounted| {
        let own = own.as_ref();
        own.is_none_or(|own| own.device == mounted.device)
    };
    let is_it = |mounted: &Mounted| match mounted.file_system.as_str() {
        "overlay" => {
            let mut paths = mounted.options.split([',', ':', '=']);
            paths.any(|path| image.may_be_layer(path, layer))
        }
        _ => {
            let root = mounted.root.to_string_lossy();
            is_here(mounted) && image.may_be_bound_layer(&root, layer)
        }
    };
    Ok(mountinfo::read_everywhere()?.iter().any(is_it))
}

/// The snapshots that are mounted to be written to, in any mount namespace.
pub(super) fn writers_anywhere(volumes: &Volumes) -> Result<HashSet<SnapshotId>> {
    let mounts = mountinfo::read_everywhere()?;
    let uppers = mounts.iter().filter_map(mount::upper_of);
    Ok(uppers
        .flat_map(|upper| [Volume::Image, Volume::Writable].map(|volume| (volume, upper)))
        .filter_map(|(volume, upper)| volumes.snapshot_at(volume, upper))
        .collect())
}

/// The layers of all snapshots that were committed while they were mounted and still
/// are, with the layers below them. containerd asks that nobody uses a snapshot after
/// its commit, but `ctr snapshot commit` lets a user do it to a running container,
/// which goes on writing.
pub(super) fn mounted_layers(store: &Store, volumes: &Volumes) -> Result<HashSet<SnapshotId>> {
    let mounted = mounted_on_writable(store, volumes)?;
    store.read()?.layers_of(&mounted)
}
