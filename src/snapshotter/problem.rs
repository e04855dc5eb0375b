//! Descriptions of everything that can be wrong between the database and the disks.

use std::fmt;

use crate::tree::Differences;
use crate::types::{Content, Kind, ProjectId, Quoted, SnapshotId, Volume};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub problem: Problem,
    /// The key or name of the snapshot that the finding is about.
    pub name: Option<String>,
    /// The id of the snapshot, or of a directory that no snapshot owns.
    pub id: Option<SnapshotId>,
    pub volume: Option<Volume>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// A directory that no snapshot owns.
    Orphan {
        /// Whether the directory holds files, and nothing proves that they are
        /// not needed.
        is_kept: bool,
    },
    /// The directory of an active snapshot or a view is missing, or is not
    /// whole.
    NoDirectory(Kind),
    /// A layer's directory is missing.
    LayerMissing,
    /// The directory of a hollow layer, one without any content in its files, is missing.
    HollowLayerMissing,
    /// A layer holds less than when it was committed.
    LayerDamaged {
        recorded: Recorded,
        counted: Content,
    },
    /// A layer has changed since it was committed, but does not hold less.
    LayerChanged {
        recorded: Recorded,
        counted: Content,
    },
    /// A layer differs from the content that it was unpacked from.
    LayerDiffers(Differences),
    /// A layer has moved to the image volume, but the database does not record the move.
    MoveNotRecorded,
    /// The image volume has a directory with the id of an unmoved layer, but the directory
    /// is not that layer.
    OtherDirectory,
    /// A layer's directory cannot be read.
    LayerUnreadable { why: String },
    /// The link on the image volume to an unmoved layer is missing or wrong.
    WrongLink { target: String },
    /// A snapshot stands on something that cannot be a parent.
    BadParent { why: String },
    /// The writable volume cannot be used.
    VolumeMissing { why: String },
    /// The writable directory has snapshots of this database, but no mark.
    MarkMissing,
    /// A snapshot's directories are not charged to its project.
    NotCharged { project: ProjectId },
    /// The limits of a snapshot's project differ from the recorded ones.
    LimitsDiffer { project: ProjectId },
    /// A volume has failed to write data while snapshots were being filled.
    DiskFailed,
    /// On a volume, ids were used that this database has not given out.
    OtherHistory,
    /// There are directories of snapshots with ids that the database has not
    /// given out.
    DatabaseOlder { highest: u64 },
    /// The database records that it is not the latest state of itself.
    DatabaseIncomplete { what: String },
}

/// What the database records of a layer's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    pub inodes: u64,
    /// How many bytes of data the layer had, if known; see [`Content::data_bytes`].
    pub data_bytes: Option<u64>,
    /// How many extended attributes the layer had, if known; see
    /// [`crate::types::Marks::attributes`].
    pub attributes: Option<u64>,
}

impl Problem {
    /// The code of the finding, for programs.
    pub fn code(&self) -> &'static str {
        self.code_and_remedy().0
    }

    /// What a repair does about the problem: the end of a sentence that begins with "a
    /// repair". `None` if no repair can help.
    pub fn remedy(&self) -> Option<&'static str> {
        self.code_and_remedy().1
    }

    fn code_and_remedy(&self) -> (&'static str, Option<&'static str>) {
        const DROPS: Option<&str> = Some("drops this snapshot and everything that stands on it");
        const GOES_ON: Option<&str> = Some("goes on with the database and the volumes as they are");
        const TRASHES: &str = "moves the directory to the trash, as the next start does";
        const SETS_ASIDE: &str = "sets the directory aside in left-out/, where only you delete \
             it, as the next start does";
        const CHARGES: &str =
            "charges the directories and all files in them, as the next start does";
        match self {
            Problem::Orphan { is_kept: false } => ("orphan", Some(TRASHES)),
            Problem::Orphan { is_kept: true } => ("orphan", Some(SETS_ASIDE)),
            Problem::NoDirectory(_) => (
                "no-directory",
                Some("creates an empty directory, as the next start does"),
            ),
            Problem::LayerMissing => ("layer-missing", DROPS),
            Problem::HollowLayerMissing => (
                "empty-layer-missing",
                Some("creates an empty layer in its place, as the next start does"),
            ),
            Problem::LayerDamaged { .. } => ("layer-damaged", DROPS),
            Problem::LayerChanged { .. } => {
                ("layer-changed", Some("records what the layer holds now"))
            }
            Problem::LayerDiffers(_) => ("layer-differs", None),
            Problem::MoveNotRecorded => (
                "move-not-recorded",
                Some("records the move, as the next start does"),
            ),
            Problem::OtherDirectory => ("other-directory", Some(SETS_ASIDE)),
            Problem::LayerUnreadable { .. } => ("layer-unreadable", None),
            Problem::WrongLink { .. } => (
                "wrong-link",
                Some("creates the link, as the next start does"),
            ),
            Problem::BadParent { .. } => ("bad-parent", DROPS),
            Problem::VolumeMissing { .. } => ("volume-missing", None),
            Problem::MarkMissing => (
                "mark-missing",
                Some("writes the file .volume again, and does nothing else: then check again"),
            ),
            Problem::NotCharged { .. } => ("not-charged", Some(CHARGES)),
            Problem::LimitsDiffer { .. } => (
                "limits-differ",
                Some("sets the recorded limits, as the next start does"),
            ),
            Problem::DiskFailed => (
                "disk-failed",
                Some("permits commits of these snapshots all the same"),
            ),
            Problem::OtherHistory => ("other-history", GOES_ON),
            Problem::DatabaseOlder { .. } => ("database-older", GOES_ON),
            Problem::DatabaseIncomplete { .. } => ("database-incomplete", GOES_ON),
        }
    }

    /// What healing does about the problem: the end of a sentence that begins with "`check
    /// --heal`". `None` if healing cannot help.
    pub fn healing(&self) -> Option<&'static str> {
        match self {
            Problem::LayerDiffers(_) => Some("unpacks the layer again from containerd's content"),
            Problem::LayerMissing
            | Problem::LayerDamaged { .. }
            | Problem::LayerUnreadable { .. } => {
                Some("unpacks the layer again, if containerd still has its content")
            }
            _ => None,
        }
    }

    /// Whether the only repair is to drop the snapshot.
    pub(super) fn is_fatal(&self) -> bool {
        matches!(
            self,
            Problem::LayerMissing | Problem::LayerDamaged { .. } | Problem::BadParent { .. }
        )
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Quoted(self.name.as_deref().unwrap_or_default());
        let volume = self.volume.unwrap_or(Volume::Image);
        let layer = format!("layer {name} on the {volume} volume");
        match &self.problem {
            Problem::Orphan { is_kept } => {
                let id = self.id.map_or(0, SnapshotId::number);
                let files = if *is_kept { ", and holds files" } else { "" };
                write!(
                    out,
                    "{volume} volume: snapshots/{id} belongs to no snapshot{files}"
                )
            }
            Problem::NoDirectory(kind) => write!(
                out,
                "the directory of the {kind} snapshot {name} is missing or incomplete on the \
                 {volume} volume"
            ),
            Problem::LayerMissing => {
                write!(out, "layer {name} is missing from the {volume} volume")
            }
            Problem::HollowLayerMissing => write!(
                out,
                "layer {name}, which held nothing but empty files and directories, is missing \
                 from the {volume} volume"
            ),
            Problem::LayerDamaged { recorded, counted } => write!(
                out,
                "{layer} is damaged: it holds {}, and held {recorded} \
                 when it was committed",
                Recorded::from(*counted)
            ),
            Problem::LayerChanged { recorded, counted } => write!(
                out,
                "{layer} has changed since its commit: it holds {}, \
                 and held {recorded}",
                Recorded::from(*counted)
            ),
            Problem::LayerDiffers(how) => write!(out, "{layer} is damaged: {how}"),
            Problem::MoveNotRecorded => write!(
                out,
                "layer {name} has moved to the image volume, but the database does not record the \
                 move"
            ),
            Problem::OtherDirectory => write!(
                out,
                "layer {name} is on the writable volume, and the directory with its id on the \
                 image volume is not that layer"
            ),
            Problem::LayerUnreadable { why } => write!(out, "{layer} cannot be read: {why}"),
            Problem::WrongLink { target } => write!(
                out,
                "layer {name} is on the writable volume, and its link on the image volume, to \
                 {target}, is missing or wrong"
            ),
            Problem::BadParent { why } => write!(out, "snapshot {name} stands on {why}"),
            Problem::VolumeMissing { why } => write!(out, "{why}"),
            Problem::MarkMissing => write!(
                out,
                "the writable directory has snapshots of this database, but its file .volume \
                 is missing"
            ),
            Problem::NotCharged { project } => write!(
                out,
                "the directories of snapshot {name} are not charged to its project {project}"
            ),
            Problem::LimitsDiffer { project } => write!(
                out,
                "project {project} of snapshot {name} has other limits than those recorded"
            ),
            Problem::DiskFailed => write!(
                out,
                "the {volume} volume has failed to write data, and snapshots that were being \
                 filled then, by pulls, builds or commits, may have lost data and cannot be \
                 committed: check the disk, then repeat the pulls, builds and commits"
            ),
            Problem::OtherHistory => write!(
                out,
                "the {volume} volume and the database are in states of different times, or do not \
                 belong together: a container may show another container's files. Rather than \
                 repair this, put back the volume and the database that belong together"
            ),
            Problem::DatabaseOlder { highest } => write!(
                out,
                "the database is older than the directories: it has given out ids up to {highest}, \
                 and there are directories with higher ids"
            ),
            Problem::DatabaseIncomplete { what } => write!(out, "{what}"),
        }
    }
}

impl From<Content> for Recorded {
    fn from(content: Content) -> Recorded {
        Recorded {
            inodes: content.usage.inodes,
            data_bytes: Some(content.data_bytes),
            attributes: content.marks.map(|marks| marks.attributes),
        }
    }
}

impl fmt::Display for Recorded {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} inodes", self.inodes)?;
        if let Some(bytes) = self.data_bytes {
            write!(out, " and {bytes} bytes")?;
        }
        if let Some(attributes) = self.attributes {
            write!(out, ", with {attributes} extended attributes")?;
        }
        Ok(())
    }
}
