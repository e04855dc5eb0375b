//! The mount of a snapshot by a person, without containerd, to look at its files or to
//! rescue them.

use std::path::Path;
use std::time::Duration;

use rustix::fd::{AsFd, OwnedFd};

use super::Snapshotter;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::mount::mountinfo::Mounted;
use crate::mount::{self, ByHand};
use crate::store::Snapshot;
use crate::types::{Kind, Quoted, QuotedPath, SnapshotId, SnapshotPaths, Volume};
use crate::volume::{Identity, UPPER};

/// How many of the matching keys an error message lists.
const NAMED: usize = 10;

/// How to mount a snapshot for a person.
#[derive(Debug)]
pub struct Rescue {
    pub key: String,
    pub id: SnapshotId,
    pub kind: Kind,
    /// Whether containers on the snapshot see host directories, which this mount leaves
    /// out.
    pub has_host_directories: bool,
    /// The snapshot's own directories; `None` for a read-only mount.
    pub own: Option<SnapshotPaths>,
    /// The lower directories, the topmost first. A read-only mount has at least two.
    pub lowers: Vec<String>,
    /// Further mount options, the same as for containers.
    pub options: Vec<String>,
    /// As long as this file is open, [`Snapshotter::mounts`] returns an error for the
    /// snapshot. `None` for a read-only mount.
    pub mark: Option<OwnedFd>,
}

impl Snapshotter {
    /// Plans the mount of a snapshot of any kind. The mount of an active snapshot is for
    /// reading and writing, unless `is_read_only` is set; layers and views are read-only.
    /// The mount of a layer shows the image up to that layer. Ids are not mapped, and host
    /// directories are left out. From now on, [`Snapshotter::mounts`] returns an error for
    /// a snapshot that is to be written to, as long as it is mounted with the device name
    /// of [`Snapshotter::source_by_hand`].
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] if no key is `name`, and none or several end in `/name`;
    /// [`ErrorKind::FailedPrecondition`] if a snapshot that is to be written to is mounted
    /// elsewhere, or if the writable volume is needed and missing; [`ErrorKind::DataLoss`]
    /// if a layer is missing.
    pub fn rescue(&self, name: &str, is_read_only: bool) -> Result<Rescue> {
        let snapshot = self.find_by_name(name)?;
        self.plan_rescue(snapshot, is_read_only)
            .context(|| format!("mount snapshot {}", Quoted(name)))
    }

    fn plan_rescue(&self, snapshot: Snapshot, is_read_only: bool) -> Result<Rescue> {
        let info = &snapshot.info;
        let ancestors = match snapshot.parent_id {
            Some(parent) => self.store.read()?.chain(parent)?,
            None => Vec::new(),
        };
        let is_active = info.kind == Kind::Active;
        // The path of a layer is on the image volume, wherever the bytes of the layer are.
        let volume = match (info.kind, snapshot.volume) {
            (Kind::Committed, Some(volume)) => {
                self.volumes.open(volume)?;
                Some(Volume::Image)
            }
            (_, volume) => volume,
        };
        let own = volume.map(|volume| self.volumes.snapshot_paths(volume, snapshot.id));
        let is_written_to = is_active && !is_read_only;
        let mut mark = None;
        if let (true, Some(volume)) = (is_active, volume) {
            let upper = self.volumes.open(volume)?.open_upper(snapshot.id)?;
            if is_written_to {
                mark = self.volumes.image().mark_mounted_by_hand(snapshot.id)?;
                require_unmounted(upper, snapshot.id, None)?;
            }
        }
        for layer in &ancestors {
            self.volumes.open(layer.volume)?;
            self.volumes.image().layer_owner(layer.id)?;
        }

        let mut lowers = Vec::new();
        if let (false, Some(own)) = (is_written_to, &own) {
            lowers.push(own.upper.clone());
        }
        let image = self.volumes.image();
        lowers.extend(ancestors.iter().map(|layer| image.layer_path(layer.id)));
        let least = if is_written_to { 1 } else { 2 };
        if lowers.len() < least {
            lowers.push(self.volumes.image().empty_path());
        }
        Ok(Rescue {
            id: snapshot.id,
            kind: info.kind,
            own: own.filter(|_| is_written_to),
            has_host_directories: info.kind != Kind::Committed
                && self.has_host_directories(&snapshot)?,
            lowers,
            options: self.overlay_options(snapshot.volume, &ancestors, false),
            mark,
            key: snapshot.info.name,
        })
    }

    /// Checks a snapshot that a person has just mounted at `point` to write to it. Returns
    /// an error if the snapshot was removed before it was mounted, or if it is mounted
    /// elsewhere, too, now or within a second: containerd may have asked for its mounts
    /// before [`Snapshotter::mounts`] began to refuse them, and mount them later. A
    /// snapshot that is removed after this check keeps its files as long as it is mounted.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`] for a removed snapshot; [`ErrorKind::FailedPrecondition`]
    /// with the other mount point.
    pub fn require_mounted_once(&self, rescue: &Rescue, point: &Path) -> Result<()> {
        const LOOKS: u32 = 10;
        const BETWEEN: Duration = Duration::from_millis(100);
        let place = self.store.read()?.place(rescue.id)?;
        let Some(volume) = place.and_then(|place| place.volume) else {
            let what = format!("snapshot {} was removed meanwhile", Quoted(&rescue.key));
            return Err(Error::new(ErrorKind::NotFound, what));
        };
        let upper = self.volumes.open(volume)?.open_upper(rescue.id)?;
        for look in 0..LOOKS {
            if look > 0 {
                std::thread::sleep(BETWEEN);
            }
            require_unmounted(&upper, rescue.id, Some(point))?;
        }
        Ok(())
    }

    /// The device name for an overlay that a person mounts. The name identifies the
    /// snapshot and this root.
    pub fn source_by_hand(&self, id: SnapshotId) -> Result<String> {
        let identity = self.store.read()?.fact(Identity::FACT)?;
        Ok(ByHand::source(&identity.unwrap_or_default(), id))
    }

    /// Finds the snapshot whose key is `name`, or the only one whose key ends in `/name`:
    /// containerd puts `<namespace>/<number>/` in front of its clients' keys.
    fn find_by_name(&self, name: &str) -> Result<Snapshot> {
        let not_found = |what: String| Err(Error::new(ErrorKind::NotFound, what));
        if let Some(snapshot) = self.store.read()?.find(name)? {
            return Ok(snapshot);
        }
        let suffix = format!("/{name}");
        let mut found = self.all_snapshots()?;
        found.retain(|snapshot| snapshot.info.name.ends_with(&suffix));
        match (found.pop(), found.as_slice()) {
            (Some(snapshot), []) => Ok(snapshot),
            (None, _) => not_found(format!(
                "no snapshot's key is {}, alone or after a slash: 'ctr snapshot ls' and 'status' \
                 list the keys",
                Quoted(name)
            )),
            (Some(last), others) => {
                let keys = others.iter().chain([&last]).take(NAMED);
                let keys: Vec<_> = keys
                    .map(|snapshot| Quoted(&snapshot.info.name).to_string())
                    .collect();
                not_found(format!(
                    "{} snapshots have a key that ends in {}: give one of these keys in full: {}",
                    others.len() + 1,
                    Quoted(name),
                    keys.join(", ")
                ))
            }
        }
    }
}

/// Returns an error if the snapshot is mounted already: two overlays on one upper directory
/// damage its contents (Documentation/filesystems/overlayfs.rst, "Sharing and copying
/// layers"). The overlay at the mount point `own` does not count, even if it is also
/// visible elsewhere.
fn require_unmounted(upper: impl AsFd, id: SnapshotId, own: Option<&Path>) -> Result<()> {
    let mounts = mount::mounts_of_upper(upper, UPPER)?;
    let own = mounts.iter().rfind(|mounted| Some(&*mounted.point) == own);
    let is_own = |mounted: &Mounted| own.is_some_and(|own| own.device == mounted.device);
    match mounts.iter().find(|mounted| !is_own(mounted)) {
        None => Ok(()),
        Some(mounted) => Err(Error::refused(format!(
            "snapshot {id} is mounted already, at {}: stop its container, or give --read-only",
            QuotedPath(&mounted.point)
        ))),
    }
}
