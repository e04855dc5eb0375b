//! What can be wrong between the database and the disks, in words.

use std::fmt;

use crate::types::{Content, Kind, ProjectId, Quoted, SnapshotId, Volume};

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong.
    pub problem: Problem,
    /// The key or name of the snapshot it is about.
    pub name: Option<String>,
    /// The snapshot's number, or that of a directory.
    pub id: Option<SnapshotId>,
    /// Where.
    pub volume: Option<Volume>,
}

/// What can be wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// A directory that no snapshot owns.
    Orphan {
        /// Its name in `snapshots/`.
        entry: String,
    },
    /// An active snapshot or a view has not all of its directory.
    NoDirectory(Kind),
    /// A layer's directory is not there.
    LayerMissing,
    /// A layer holds less than when it was committed.
    LayerDamaged {
        /// Then.
        recorded: Recorded,
        /// Now.
        counted: Content,
    },
    /// A layer holds something else than when it was committed, but not less.
    LayerChanged {
        /// Then.
        recorded: Recorded,
        /// Now.
        counted: Content,
    },
    /// A layer has moved home, and the database does not say so yet.
    MoveNotRecorded,
    /// A layer's directory cannot be read.
    LayerUnreadable {
        /// What the disk says.
        why: String,
    },
    /// A layer on the writable volume is not named by a link on the image volume.
    WrongLink {
        /// Where the link has to lead.
        target: String,
    },
    /// A snapshot stands on something that cannot be a parent.
    BadParent {
        /// What that is.
        why: String,
    },
    /// The writable volume cannot be used.
    VolumeMissing {
        /// Why, and what to do.
        why: String,
    },
    /// The writable directory has snapshots of this database, but not the mark.
    MarkMissing,
    /// A snapshot's directories are not charged to its project.
    NotCharged {
        /// The project.
        project: ProjectId,
    },
    /// The limits of a snapshot's project are others than those recorded.
    LimitsDiffer {
        /// The project.
        project: ProjectId,
    },
    /// There are directories of snapshots that the database has not come to yet.
    DatabaseOlder {
        /// The highest number it has given out.
        highest: u64,
    },
    /// The database says that it is not the latest state of itself.
    DatabaseIncomplete {
        /// What it is.
        what: String,
    },
}

/// What the database has of a layer's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recorded {
    /// Inodes.
    pub inodes: u64,
    /// [`Content::data_bytes`], if it is known.
    pub data_bytes: Option<u64>,
}

impl Problem {
    /// A word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Problem::Orphan { .. } => "orphan",
            Problem::NoDirectory(_) => "no-directory",
            Problem::LayerMissing => "layer-missing",
            Problem::LayerDamaged { .. } => "layer-damaged",
            Problem::LayerChanged { .. } => "layer-changed",
            Problem::MoveNotRecorded => "move-not-recorded",
            Problem::LayerUnreadable { .. } => "layer-unreadable",
            Problem::WrongLink { .. } => "wrong-link",
            Problem::BadParent { .. } => "bad-parent",
            Problem::VolumeMissing { .. } => "volume-missing",
            Problem::MarkMissing => "mark-missing",
            Problem::NotCharged { .. } => "not-charged",
            Problem::LimitsDiffer { .. } => "limits-differ",
            Problem::DatabaseOlder { .. } => "database-older",
            Problem::DatabaseIncomplete { .. } => "database-incomplete",
        }
    }

    /// What a repair does about it; `None` if it cannot do anything.
    pub fn remedy(&self) -> Option<&'static str> {
        match self {
            Problem::Orphan { .. } => Some("moves it to the trash, as the next start does"),
            Problem::NoDirectory(_) => Some("makes an empty one, as the next start does"),
            Problem::LayerMissing | Problem::LayerDamaged { .. } | Problem::BadParent { .. } => {
                Some("drops it and everything that stands on it")
            }
            Problem::LayerChanged { .. } => Some("records what it holds now"),
            Problem::MoveNotRecorded => Some("records it, as the next start does"),
            Problem::WrongLink { .. } => Some("makes the link, as the next start does"),
            Problem::MarkMissing => Some("marks it anew"),
            Problem::NotCharged { .. } => {
                Some("charges them, and what is in them, as the next start does")
            }
            Problem::LimitsDiffer { .. } => Some("sets those recorded, as the next start does"),
            Problem::DatabaseOlder { .. } | Problem::DatabaseIncomplete { .. } => {
                Some("goes on with it as it is")
            }
            Problem::VolumeMissing { .. } | Problem::LayerUnreadable { .. } => None,
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
        match &self.problem {
            Problem::Orphan { entry } => write!(
                out,
                "{volume} volume: snapshots/{entry} belongs to no snapshot"
            ),
            Problem::NoDirectory(kind) => write!(
                out,
                "the {kind} snapshot {name} has no whole directory on the {volume} volume"
            ),
            Problem::LayerMissing => {
                write!(out, "layer {name} is missing from the {volume} volume")
            }
            Problem::LayerDamaged { recorded, counted } => write!(
                out,
                "layer {name} on the {volume} volume is damaged: it holds {}, and held {recorded} \
                 when it was committed",
                Recorded::from(*counted)
            ),
            Problem::LayerChanged { recorded, counted } => write!(
                out,
                "layer {name} on the {volume} volume has changed since its commit: it holds {}, \
                 and held {recorded}",
                Recorded::from(*counted)
            ),
            Problem::MoveNotRecorded => write!(
                out,
                "layer {name} has moved to the image volume, which was not recorded"
            ),
            Problem::LayerUnreadable { why } => {
                write!(
                    out,
                    "layer {name} on the {volume} volume cannot be read: {why}"
                )
            }
            Problem::WrongLink { target } => write!(
                out,
                "layer {name} is on the writable volume, and there is no link to {target} for it"
            ),
            Problem::BadParent { why } => write!(out, "snapshot {name} stands on {why}"),
            Problem::VolumeMissing { why } => write!(out, "{why}"),
            Problem::MarkMissing => write!(
                out,
                "the writable directory has snapshots of this database, but no file .volume that \
                 says so"
            ),
            Problem::NotCharged { project } => write!(
                out,
                "the directories of snapshot {name} are not charged to its project {project}"
            ),
            Problem::LimitsDiffer { project } => write!(
                out,
                "project {project} of snapshot {name} has other limits than those recorded"
            ),
            Problem::DatabaseOlder { highest } => write!(
                out,
                "the database is older than the directories: it has given out numbers up to \
                 {highest}, and there are higher ones"
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
        }
    }
}

impl fmt::Display for Recorded {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} inodes", self.inodes)?;
        if let Some(bytes) = self.data_bytes {
            write!(out, " and {bytes} bytes")?;
        }
        Ok(())
    }
}
