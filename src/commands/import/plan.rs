//! What of the original's snapshots can be taken over, by what is on the disks.
//!
//! Owns: that decision. A layer has to be there with as many inodes as when it
//! was committed; a container's snapshot has to have its directory; and all that
//! a snapshot stands on has to be taken over too. Never: changes anything.

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

/// What becomes of everything that the original knows.
#[derive(Debug)]
pub(super) struct Plan {
    /// As they will be entered, in order of id.
    pub(super) kept: Vec<Snapshot>,
    /// In order of id.
    pub(super) left_out: Vec<LeftOut>,
    /// The last transaction of the original's database.
    pub(super) transaction: u64,
    /// No id up to this one may be given out.
    pub(super) highest_id: u64,
    /// Whatever has a number on a volume without being where a snapshot that is
    /// taken over belongs, in order: a start would take it for a stray.
    pub(super) aside: Vec<(Volume, SnapshotId)>,
    /// Layers that are taken over, but take far less of their disk than at their
    /// commit.
    pub(super) shrunk: Vec<Shrunk>,
    /// Entries without a number, as names in their volumes' `snapshots`: what the original
    /// was making or removing, and what other programs have put there. They stay.
    pub(super) others: Vec<(Volume, String)>,
}

/// A snapshot that cannot be taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LeftOut {
    pub(super) snapshot: Original,
    pub(super) why: Reason,
    /// Where it has a directory nevertheless.
    pub(super) volumes: Vec<Volume>,
}

/// A layer with all its inodes, of which files may have been emptied: the
/// original does not flush what it commits.
#[derive(Debug)]
pub(super) struct Shrunk {
    pub(super) name: String,
    pub(super) recorded_bytes: u64,
    pub(super) counted_bytes: u64,
}

impl Shrunk {
    /// How much a layer takes differs with the moment and the file system; half
    /// of it gone is no such difference.
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

/// Why not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// It has no directory, or none with `fs`.
    Missing,
    /// Of a layer's inodes some are gone.
    Incomplete { recorded: u64, counted: u64 },
    /// What it stands on is no layer of this database.
    BadParent(String),
    /// What it stands on is left out.
    StandsOn(String),
}

/// One volume as it is.
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

    /// The highest number in use.
    pub(super) fn newest(&self) -> Option<SnapshotId> {
        self.entries.keys().max().copied()
    }
}

/// The volumes that are there, the image volume first.
pub(super) struct Disks(Vec<Found>);

impl Disks {
    /// Looks at both volumes; changes nothing.
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

    /// Whether a volume has a directory of any of these.
    pub(super) fn has_any(&self, volume: Volume, contents: &Contents) -> bool {
        self.on(volume).is_some_and(|found| {
            let mut ids = contents.snapshots.iter().map(|snapshot| snapshot.id);
            ids.any(|id| found.has(id))
        })
    }

    /// Where there is a directory of that number, in the order in which the
    /// original would look for it.
    fn places(&self, snapshot: &Original) -> Vec<Volume> {
        let order = match belongs_to(snapshot) {
            Volume::Image => [Volume::Image, Volume::Writable],
            Volume::Writable => [Volume::Writable, Volume::Image],
        };
        let has = |volume: &Volume| self.on(*volume).is_some_and(|found| found.has(snapshot.id));
        order.into_iter().filter(has).collect()
    }
}

/// Where the original looks for a snapshot: for every layer on the image
/// volume, also for one that it had made on the other, where it stayed.
pub(super) fn belongs_to(snapshot: &Original) -> Volume {
    let key = &snapshot.info.name;
    let last = key.rsplit('/').next().unwrap_or(key);
    match snapshot.info.kind {
        Kind::Committed => Volume::Image,
        Kind::Active | Kind::View if last.starts_with("extract-") => Volume::Image,
        Kind::Active | Kind::View => Volume::Writable,
    }
}

/// What a snapshot has been found to be, by itself.
struct Judged {
    volume: Option<Volume>,
    content: Option<Content>,
}

/// Decides. `volatile` says that what containers wrote is meant to be lost at a
/// reboot: then they start again from their images without their directories.
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

/// As the original recorded it at the commit. One that has more inodes by now
/// was written to by a container that went on running.
fn usage(recorded: Option<Usage>, counted: Option<Content>) -> Usage {
    match (recorded, counted) {
        (Some(recorded), Some(counted)) if recorded.inodes == counted.usage.inodes => recorded,
        (_, Some(counted)) => counted.usage,
        (_, None) => Usage::default(),
    }
}

/// `Err` within `Ok` if it cannot be taken over.
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
        // What it shows is its parent's; some have no directory.
        (Kind::View, _) if !snapshot.info.parent.is_empty() => by_name(volume),
        (Kind::Active | Kind::View, Some(_)) => by_name(volume),
        (Kind::Active, None) if volatile && belongs_to(snapshot) == Volume::Writable => {
            by_name(Some(Volume::Writable))
        }
        (Kind::Active | Kind::View, None) => Err(Reason::Missing),
    })
}

/// Takes the first place that holds the whole layer. Without one, the reason is what is
/// wrong with the layer in the place where it belongs.
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

/// What cannot be read at the moment may be whole, and is no reason to go on
/// without it.
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

/// Adds what stands on nothing sound.
fn leave_out_upon(snapshots: &[Original], reasons: &mut HashMap<String, Reason>) {
    let by_name: HashMap<&str, &Original> = snapshots
        .iter()
        .map(|snapshot| (snapshot.info.name.as_str(), snapshot))
        .collect();
    let mut sound = HashSet::new();
    for snapshot in snapshots {
        // From here down to what is decided already; then up again.
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

/// All numbered entries except the directories of kept snapshots on their volumes. A
/// link is always set aside, so that its owner finds it again.
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
    /// A word for programs.
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
                "snapshots/{id} is damaged: it holds {counted} inodes, and held {recorded} when \
                 it was committed"
            ),
            Reason::BadParent(parent) => {
                write!(out, "it stands on {}, which is no layer", Quoted(parent))
            }
            Reason::StandsOn(parent) => {
                write!(
                    out,
                    "it stands on {}, which cannot be taken over",
                    Quoted(parent)
                )
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
