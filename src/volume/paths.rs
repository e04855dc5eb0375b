//! The names on the volumes, and the paths that contain them. No other module builds
//! such a path.

use std::ffi::CStr;

use super::{Image, Volumes};
use crate::types::{SnapshotId, SnapshotPaths, Volume};

pub(super) const SNAPSHOTS: &str = "snapshots";
pub(super) const TRASH: &str = "trash";
pub(super) const LEFT_OUT: &str = "left-out";
/// The directory of links to host directories.
pub(super) const HOST_DIRS: &str = "lowers";
/// The directory of marks for snapshots that may be mounted by hand.
pub(super) const BY_HAND: &str = "mounted";
pub(super) const EMPTY: &str = "empty";
/// The mark of the writable volume, and the file that replaces it when it is written.
pub(super) const MARK: &str = ".volume";
pub(super) const NEW_MARK: &str = ".volume.new";
/// The ids that were used last on a volume, and the file that replaces it when it is
/// written.
pub(super) const IDS: &str = ".ids";
const NEW_IDS: &str = ".ids.new";
/// The directory in which the writable volume is probed.
pub const PROBE: &str = ".probe";

/// The names that this module uses directly in `<root>`.
pub const ROOT_NAMES: [&str; 8] = [
    SNAPSHOTS, HOST_DIRS, BY_HAND, EMPTY, TRASH, LEFT_OUT, IDS, NEW_IDS,
];
/// All names that are used directly in `<writable>`.
pub const WRITABLE_NAMES: [&str; 8] = [
    MARK, NEW_MARK, PROBE, SNAPSHOTS, TRASH, LEFT_OUT, IDS, NEW_IDS,
];

/// In a snapshot's directory: the files of the snapshot. This is the upper directory of its
/// overlay.
pub const UPPER: &CStr = c"fs";
/// In a snapshot's directory: overlayfs's work directory.
pub(super) const WORK: &str = "work";
/// In a snapshot's directory: a short-lived directory of entries that will be renamed into
/// their place.
pub(super) const SCRATCH: &str = "scratch";

/// In `snapshots`: a layer that is unpacked again, to be compared with the existing one.
pub(super) const UNPACKED: &str = ".unpacked";
/// In `snapshots`, followed by two numbers: a layer that was unpacked again and will
/// replace a damaged one.
pub(super) const HANDED_OVER: &str = ".unpacked-";
/// In `snapshots`, followed by an id: a directory that has changed places with a layer
/// that was unpacked again.
pub(super) const REPLACED: &str = ".replaced-";

/// The path of the upper directory in `top`, the directory of a snapshot.
pub(super) fn upper_in(top: &str) -> String {
    format!("{top}/fs")
}

/// The path of a snapshot's upper directory, relative to `snapshots`.
pub(super) fn upper_of(id: SnapshotId) -> String {
    format!("{id}/fs")
}

impl Volumes {
    /// `<volume>/snapshots`.
    pub fn snapshots_path(&self, volume: Volume) -> String {
        match volume {
            Volume::Image => self.image.snapshots_path(),
            Volume::Writable => format!("{}/{SNAPSHOTS}", self.writable_path),
        }
    }

    /// The paths of a snapshot's directories on `volume`. For a layer, callers pass the image
    /// volume, wherever the layer's bytes are.
    pub fn snapshot_paths(&self, volume: Volume, id: SnapshotId) -> SnapshotPaths {
        let snapshots = self.snapshots_path(volume);
        SnapshotPaths {
            upper: format!("{snapshots}/{}", upper_of(id)),
            work: format!("{snapshots}/{id}/{WORK}"),
        }
    }

    /// The target that the link `<root>/snapshots/<id>` of an unmoved layer
    /// must have.
    pub fn link_target(&self, id: SnapshotId) -> String {
        format!("{}/{id}", self.snapshots_path(Volume::Writable))
    }

    /// The writable directory, as configured.
    pub fn writable_path(&self) -> &str {
        &self.writable_path
    }
}

impl Image {
    /// `<root>/snapshots`.
    pub fn snapshots_path(&self) -> String {
        format!("{}/{SNAPSHOTS}", self.path())
    }

    /// `<root>/empty`.
    pub fn empty_path(&self) -> String {
        format!("{}/{EMPTY}", self.path())
    }

    /// The path by which a layer is mounted, wherever its bytes are.
    pub fn layer_path(&self, id: SnapshotId) -> String {
        format!("{}/{}", self.snapshots_path(), upper_of(id))
    }
}
