//! Decides which snapshots of the original can be taken over, by looking at the disks.
//!
//! Owns: this decision. A layer must have at least as many inodes as at its commit. A
//! container's snapshot must have its directory. All layers below a snapshot must be taken over
//! too. Never: changes anything.

use std::collections::{HashMap, HashSet};
use std::fmt;

use rustix::fs::FileType;

use crate::commands::import::bolt::snapshots::{Contents, Original};
use crate::commands::progress::Progress;
use crate::error::{Context, ErrorKind, Result};
use crate::store::{DataBytes, Snapshot};
use crate::tree;
use crate::types::{Content, Kind, Quoted, SnapshotId, Usage, Volume};
use crate::volume::Filled;

/// The decision about every snapshot in the original's database.
#[derive(Debug)]
pub(super) struct Plan {
    /// The snapshots to be entered, in the order of their ids.
    pub(super) kept: Vec<Snapshot>,
    /// The snapshots that are left out, in the order of their ids.
    pub(super) left_out: Vec<LeftOut>,
    /// The last transaction of the original's database.
    pub(super) transaction: u64,
    /// No id up to this one may be given out.
    pub(super) highest_id: u64,
    /// The entries with a number as their name that are not the directory of a snapshot that is
    /// taken over, in order. They are set aside, because a start would treat them as strays.
    pub(super) aside: Vec<(Volume, SnapshotId)>,
    /// Layers that are taken over, but take far less space than at their commit.
    pub(super) shrunk: Vec<Shrunk>,
    /// Entries of the volumes' `snapshots` whose name is not a number. The original was
    /// creating or removing them, or another program has put them there. They stay.
    pub(super) others: Vec<(Volume, String)>,
}

/// A snapshot that cannot be taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LeftOut {
    pub(super) snapshot: Original,
    pub(super) why: Reason,
    /// The volumes on which the snapshot has a directory nevertheless.
    pub(super) volumes: Vec<Volume>,
}

/// A layer that has all its inodes, but may have files that a power cut has emptied, because
/// the original does not flush a layer that it commits.
#[derive(Debug)]
pub(super) struct Shrunk {
    pub(super) name: String,
    pub(super) recorded_bytes: u64,
    pub(super) counted_bytes: u64,
}

impl Shrunk {
    /// How much space a layer takes can vary with the time and the file system, but not by more
    /// than half.
    fn find(snapshot: &Original, content: Option<Content>) -> Option<Shrunk> {
        let recorded_bytes = snapshot.usage?.size_bytes;
        let counted_bytes = content?.usage.size_bytes;
        (counted_bytes < recorded_bytes / 2).then(|| Shrunk {
            name: snapshot.info.name.clone(),
            recorded_bytes,
            counted_bytes,
        })
    }
}

/// The reason why a snapshot cannot be taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// The snapshot has no directory, or one without `fs`.
    Missing,
    /// Some of the layer's inodes are missing.
    Incomplete { recorded: u64, counted: u64 },
    /// The snapshot's parent is not a layer of this database.
    BadParent(String),
    /// The snapshot's parent is left out.
    StandsOn(String),
}

/// One volume and its entries.
pub(super) struct Found {
    pub(super) filled: Filled,
    entries: HashMap<SnapshotId, FileType>,
    others: Vec<String>,
}

impl Found {
    fn look(volume: Volume, path: &str) -> Result<Option<Found>> {
        let Some(filled) = Filled::open(volume, path)? else {
            return Ok(None);
        };
        let (entries, others) = filled.numbered()?;
        Ok(Some(Found {
            filled,
            entries,
            others,
        }))
    }

    fn has(&self, id: SnapshotId) -> bool {
        self.entries.get(&id) == Some(&FileType::Directory)
    }

    /// The highest id in use.
    pub(super) fn newest(&self) -> Option<SnapshotId> {
        self.entries.keys().max().copied()
    }
}

/// The volumes that exist, the image volume first.
pub(super) struct Disks(Vec<Found>);

impl Disks {
    /// Looks at both volumes, and changes nothing.
    pub(super) fn look(image: &str, writable: &str) -> Result<Disks> {
        let image = Found::look(Volume::Image, image)?;
        let writable = Found::look(Volume::Writable, writable)?;
        Ok(Disks(image.into_iter().chain(writable).collect()))
    }

    pub(super) fn on(&self, volume: Volume) -> Option<&Found> {
        self.present().find(|found| found.filled.volume() == volume)
    }

    pub(super) fn present(&self) -> impl Iterator<Item = &Found> {
        self.0.iter()
    }

    /// Whether a volume has a directory of any of these snapshots.
    pub(super) fn has_any(&self, volume: Volume, contents: &Contents) -> bool {
        self.on(volume).is_some_and(|found| {
            let mut ids = contents.snapshots.iter().map(|snapshot| snapshot.id);
            ids.any(|id| found.has(id))
        })
    }

    /// The volumes with a directory of this snapshot, in the order in which the
    /// original looks for it.
    fn places(&self, snapshot: &Original) -> Vec<Volume> {
        let order = match belongs_to(snapshot) {
            Volume::Image => [Volume::Image, Volume::Writable],
            Volume::Writable => [Volume::Writable, Volume::Image],
        };
        let has = |volume: &Volume| self.on(*volume).is_some_and(|found| found.has(snapshot.id));
        order.into_iter().filter(has).collect()
    }
}

/// The volume on which the original looks for a snapshot. It looks for every layer on the image
/// volume, even if it has committed the layer on the writable volume and left it there.
pub(super) fn belongs_to(snapshot: &Original) -> Volume {
    let key = &snapshot.info.name;
    let last = key.rsplit('/').next().unwrap_or(key);
    match snapshot.info.kind {
        Kind::Committed => Volume::Image,
        Kind::Active | Kind::View if last.starts_with("extract-") => Volume::Image,
        Kind::Active | Kind::View => Volume::Writable,
    }
}

/// The decision about a snapshot without regard to its parent.
struct Judged {
    volume: Option<Volume>,
    content: Option<Content>,
}

/// Decides which snapshots are taken over. If `volatile` is set, a reboot deletes what
/// containers have written, so their snapshots are taken over without directories.
pub(super) fn plan(contents: Contents, disks: &Disks, volatile: bool) -> Result<Plan> {
    let newest = disks.present().filter_map(Found::newest).max();
    let highest_id = newest
        .map_or(0, SnapshotId::number)
        .max(contents.highest_id);
    let mut reasons: HashMap<String, Reason> = HashMap::new();
    let mut judged = HashMap::new();
    for snapshot in Progress::over("looking through layers", &contents.snapshots) {
        let name = &snapshot.info.name;
        let found = judge(snapshot, disks, volatile)
            .context(|| format!("look at the snapshot {}", Quoted(name)))?;
        match found {
            Ok(found) => drop(judged.insert(snapshot.id, found)),
            Err(why) => drop(reasons.insert(snapshot.info.name.clone(), why)),
        }
    }
    leave_out_upon(&contents.snapshots, &mut reasons);

    let ids: HashMap<String, SnapshotId> = contents
        .snapshots
        .iter()
        .map(|snapshot| (snapshot.info.name.clone(), snapshot.id))
        .collect();
    let (mut kept, mut left_out, mut shrunk) = (Vec::new(), Vec::new(), Vec::new());
    for snapshot in contents.snapshots {
        if let Some(why) = reasons.remove(&snapshot.info.name) {
            let volumes = disks.places(&snapshot);
            left_out.push(LeftOut {
                snapshot,
                why,
                volumes,
            });
            continue;
        }
        let found = judged
            .remove(&snapshot.id)
            .expect("what has no reason was judged");
        shrunk.extend(Shrunk::find(&snapshot, found.content));
        kept.push(Snapshot {
            id: snapshot.id,
            parent_id: ids.get(&snapshot.info.parent).copied(),
            volume: found.volume,
            usage: usage(snapshot.usage, found.content),
            marks: found.content.and_then(|content| content.marks),
            data_bytes: found.content.map_or(DataBytes::Unknown, |content| {
                DataBytes::Counted(content.data_bytes)
            }),
            info: snapshot.info,
        });
    }
    let others = disks.present().flat_map(|found| {
        let names = found.others.iter();
        names.map(|name| (found.filled.volume(), name.clone()))
    });
    let others = others.collect();
    kept.sort_by_key(|snapshot| snapshot.id);
    left_out.sort_by_key(|left_out| left_out.snapshot.id);
    Ok(Plan {
        aside: aside(&kept, disks),
        others,
        kept,
        left_out,
        highest_id,
        shrunk,
        transaction: contents.transaction,
    })
}

/// The usage of a layer: the recorded one if the number of inodes is still the same. A layer
/// with more inodes was written to after its commit, by a container that went on running.
fn usage(recorded: Option<Usage>, counted: Option<Content>) -> Usage {
    match (recorded, counted) {
        (Some(recorded), Some(counted)) if recorded.inodes == counted.usage.inodes => recorded,
        (_, Some(counted)) => counted.usage,
        (_, None) => Usage::default(),
    }
}

/// The decision about a snapshot. The inner result is an error if the snapshot cannot be taken
/// over.
type Judgement = Result<std::result::Result<Judged, Reason>>;

fn judge(snapshot: &Original, disks: &Disks, volatile: bool) -> Judgement {
    let mut places = Vec::new();
    for volume in disks.places(snapshot) {
        let found = disks.on(volume).expect("it was found there");
        if found.filled.has_upper(snapshot.id)? {
            places.push(found);
        }
    }
    let volume = places.first().map(|found| found.filled.volume());
    let by_name = |volume| {
        Ok(Judged {
            volume,
            content: None,
        })
    };
    Ok(match (snapshot.info.kind, volume) {
        (Kind::Committed, _) => return judge_layer(snapshot, &places),
        // A view shows the directory of its parent, so it may have none of its own.
        (Kind::View, _) if !snapshot.info.parent.is_empty() => by_name(volume),
        (Kind::Active | Kind::View, Some(_)) => by_name(volume),
        (Kind::Active, None) if volatile && belongs_to(snapshot) == Volume::Writable => {
            by_name(Some(Volume::Writable))
        }
        (Kind::Active | Kind::View, None) => Err(Reason::Missing),
    })
}

/// Chooses the first volume that holds the whole layer. If there is none, the reason
/// describes the volume on which the original looks for the layer.
fn judge_layer(snapshot: &Original, places: &[&Found]) -> Judgement {
    let mut why = None;
    for found in places {
        match judge_layer_in(snapshot, found)? {
            Ok(judged) => return Ok(Ok(judged)),
            Err(reason) => drop(why.get_or_insert(reason)),
        }
    }
    Ok(Err(why.unwrap_or(Reason::Missing)))
}

/// Decides about a layer on one volume. An unreadable layer is an error, and is not left out,
/// because it may be whole.
fn judge_layer_in(snapshot: &Original, found: &Found) -> Judgement {
    let filled = &found.filled;
    let content = match filled.open_upper(snapshot.id).and_then(tree::count_layer) {
        Ok(content) => content,
        Err(error) if error.kind() == ErrorKind::DataLoss => return Ok(Err(Reason::Missing)),
        Err(error) => {
            let (path, id) = (filled.path(), snapshot.id);
            return Err(error.while_doing(format!(
                "look through {path}/snapshots/{id}/fs (if that disk has lost it for good, move \
                 {path}/snapshots/{id} away and give --leave-out-missing)"
            )));
        }
    };
    let counted = content.usage.inodes;
    Ok(match snapshot.usage {
        Some(usage) if counted < usage.inodes => Err(Reason::Incomplete {
            recorded: usage.inodes,
            counted,
        }),
        _ => Ok(Judged {
            volume: Some(filled.volume()),
            content: Some(content),
        }),
    })
}

/// Leaves out every snapshot that has a left-out layer below it.
fn leave_out_upon(snapshots: &[Original], reasons: &mut HashMap<String, Reason>) {
    let by_name: HashMap<&str, &Original> = snapshots
        .iter()
        .map(|snapshot| (snapshot.info.name.as_str(), snapshot))
        .collect();
    let mut sound = HashSet::new();
    for snapshot in snapshots {
        // Goes down the parents to the first snapshot that is decided already, and then up
        // again.
        let mut chain = Vec::new();
        let mut met = HashSet::new();
        let mut next = Some(snapshot);
        while let Some(above) = next {
            let name = above.info.name.as_str();
            if sound.contains(name) || reasons.contains_key(name) {
                break;
            }
            let parent = above.info.parent.as_str();
            if !met.insert(name) {
                reasons.insert(name.to_owned(), Reason::BadParent(parent.to_owned()));
                break;
            }
            chain.push(above);
            next = match by_name.get(parent) {
                None if parent.is_empty() => None,
                Some(layer) if layer.info.kind == Kind::Committed => Some(layer),
                _ => {
                    reasons.insert(name.to_owned(), Reason::BadParent(parent.to_owned()));
                    break;
                }
            };
        }
        while let Some(above) = chain.pop() {
            let (name, parent) = (above.info.name.as_str(), above.info.parent.as_str());
            if reasons.contains_key(name) {
                continue;
            }
            match reasons.contains_key(parent) {
                true => drop(reasons.insert(name.to_owned(), Reason::StandsOn(parent.to_owned()))),
                false => drop(sound.insert(name)),
            }
        }
    }
}

/// All numbered entries except the directories of snapshots that are taken over. Symbolic links
/// are always set aside, so that the user who has created them can find them again.
fn aside(kept: &[Snapshot], disks: &Disks) -> Vec<(Volume, SnapshotId)> {
    let places: HashMap<SnapshotId, Option<Volume>> = kept
        .iter()
        .map(|snapshot| (snapshot.id, snapshot.volume))
        .collect();
    let mut aside = Vec::new();
    for found in disks.present() {
        let volume = found.filled.volume();
        let belongs = |id: &SnapshotId| places.get(id) == Some(&Some(volume)) && found.has(*id);
        let ids = found.entries.keys().filter(|id| !belongs(id));
        aside.extend(ids.map(|id| (volume, *id)));
    }
    aside.sort_by_key(|(volume, id)| (*volume == Volume::Writable, *id));
    aside
}

impl Reason {
    /// The reason's code, for programs.
    pub(super) fn code(&self) -> &'static str {
        match self {
            Reason::Missing => "missing",
            Reason::Incomplete { .. } => "incomplete",
            Reason::BadParent(_) => "bad-parent",
            Reason::StandsOn(_) => "parent-left-out",
        }
    }
}

impl fmt::Display for LeftOut {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let id = self.snapshot.id;
        match &self.why {
            Reason::Missing => {
                let volume = belongs_to(&self.snapshot);
                write!(out, "the {volume} volume has no snapshots/{id}/fs")
            }
            Reason::Incomplete { recorded, counted } => write!(
                out,
                "snapshots/{id} is damaged: it has {counted} inodes, and had {recorded} when it \
                 was committed"
            ),
            Reason::BadParent(parent) => {
                write!(out, "its parent {} is not a layer", Quoted(parent))
            }
            Reason::StandsOn(parent) => {
                write!(out, "its parent {} cannot be taken over", Quoted(parent))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Info, Labels, Timestamp};

    fn snapshot(id: u64, kind: Kind, name: &str, parent: &str) -> Original {
        Original {
            id: SnapshotId::new(id),
            info: Info {
                name: name.to_owned(),
                parent: parent.to_owned(),
                kind,
                created: Timestamp::from_nanos(1),
                updated: Timestamp::from_nanos(1),
                labels: Labels::new(),
            },
            usage: None,
        }
    }

    #[test]
    fn what_stands_on_nothing_sound_is_left_out() {
        use Kind::{Active, Committed};
        let snapshots = [
            snapshot(9, Active, "web", "upper"),
            snapshot(1, Committed, "base", ""),
            snapshot(2, Committed, "middle", "base"),
            snapshot(3, Committed, "upper", "middle"),
            snapshot(4, Active, "on active", "web"),
            snapshot(5, Active, "on nothing", "unknown"),
            snapshot(6, Committed, "one", "other"),
            snapshot(7, Committed, "other", "one"),
            snapshot(8, Active, "on a circle", "one"),
            snapshot(10, Active, "sound", "base"),
        ];
        let mut reasons = HashMap::from([("middle".to_owned(), Reason::Missing)]);
        leave_out_upon(&snapshots, &mut reasons);
        let codes = |name: &str| reasons.get(name).map(Reason::code);
        for (name, code) in [
            ("base", None),
            ("sound", None),
            ("middle", Some("missing")),
            ("upper", Some("parent-left-out")),
            ("web", Some("parent-left-out")),
            ("on active", Some("bad-parent")),
            ("on nothing", Some("bad-parent")),
            ("on a circle", Some("parent-left-out")),
        ] {
            assert_eq!(codes(name), code, "{name}");
        }
        assert!(codes("one").is_some() && codes("other").is_some());
    }

    #[test]
    fn the_original_looks_where_its_keys_say() {
        for (key, volume) in [
            ("default/1/extract-1 sha256:x", Volume::Image),
            ("extract-1", Volume::Image),
            ("default/extract-1/web", Volume::Writable),
            ("web", Volume::Writable),
        ] {
            assert_eq!(
                belongs_to(&snapshot(1, Kind::Active, key, "")),
                volume,
                "{key}"
            );
        }
        let layer = snapshot(1, Kind::Committed, "web", "");
        assert_eq!(belongs_to(&layer), Volume::Image);
    }
}
