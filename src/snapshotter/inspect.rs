//! Comparing the database with the disks, without changing either.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use rustix::fs::FileType;

use super::prepare::shape_of;
use super::problem::{Finding, Problem, Recorded};
use super::relocator::Namesake;
use super::trash::{Found, GivenOut, entries_of, known_on};
use super::{Snapshotter, in_use};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{DataBytes, Snapshot};
use crate::text::filter::Filters;
use crate::tree;
use crate::types::{Content, History, Kind, Quoted, SnapshotId, Volume};
use crate::volume::Dirs;

/// The result of an inspection.
pub struct Inspection {
    pub snapshots: usize,
    /// The problems that were found, in a stable order.
    pub findings: Vec<Finding>,
    /// The paths of all entries of `left-out/`, whether this program or an import has put
    /// them there.
    pub left_out: Vec<String>,
}

/// The contents of the database at one moment.
struct Rows {
    by_id: HashMap<SnapshotId, Snapshot>,
    leftover: HashSet<SnapshotId>,
    ids: GivenOut,
    /// The ids in tombstones: directories that may be deleted. In order: image,
    /// writable volume.
    buried: [HashSet<SnapshotId>; 2],
}

impl Snapshotter {
    /// Looks at every snapshot, directory and link, and counts every layer. If a daemon is
    /// running, its changes can cause findings that a second inspection does not have.
    /// `progress` is called with the number of snapshots that are inspected, and the number
    /// of all snapshots.
    pub fn inspect(&self, mut progress: impl FnMut(usize, usize)) -> Result<Inspection> {
        // The disks are read before the database, because the row of a snapshot is entered
        // after its directory is created.
        let image = self.volumes.open(Volume::Image)?;
        let on_image = entries_of(&image)?;
        let writable = self.volumes.open(Volume::Writable);
        let on_writable = writable
            .as_ref()
            .ok()
            .map(|dirs| entries_of(dirs))
            .transpose()?;
        let rows = self.rows()?;
        let held = in_use::mounted_layers(&self.store, &self.volumes)?;

        let mut findings = Vec::new();
        let mut left_out = Vec::new();
        let mut is_older = false;
        let seen = writable.as_ref().ok().zip(on_writable.as_ref());
        for (dirs, entries) in seen.into_iter().chain([(&image, &on_image)]) {
            let forgotten = rows.ids.first_forgotten(dirs, entries.keys().copied())?;
            is_older |= forgotten.is_some();
            findings.extend(self.other_history(dirs, entries)?);
            findings.extend(self.failed_disk(dirs.volume())?);
            let names = dirs.left_out()?;
            left_out.extend(names.iter().map(|name| dirs.left_out_path(name)));
        }
        if let Err(error) = &writable {
            findings.push(self.missing_volume(error)?);
        }
        if is_older {
            let highest = rows.ids.entered;
            findings.push(about_all(Problem::DatabaseOlder { highest }));
        }
        let mut snapshots: Vec<&Snapshot> = rows.by_id.values().collect();
        snapshots.sort_by_key(|snapshot| snapshot.id);
        for (done, snapshot) in snapshots.into_iter().enumerate() {
            progress(done, rows.by_id.len());
            if let Some(why) = rows.bad_parent(snapshot) {
                findings.push(about(snapshot, Problem::BadParent { why }));
            }
            let Some(volume) = snapshot.volume else {
                continue;
            };
            let on = |entries: &Found| entries.get(&snapshot.id) == Some(&FileType::Directory);
            let is_held = held.contains(&snapshot.id);
            let is_unmoved = snapshot.place().is_unmoved();
            let is_other = is_unmoved && on(&on_image) && {
                if self.relocator.judge_namesake(snapshot)? != Namesake::Other {
                    findings.push(about(snapshot, Problem::MoveNotRecorded));
                    let found = self.inspect_directory(snapshot, Volume::Image, true, is_held)?;
                    findings.extend(found);
                    continue;
                }
                findings.push(about(snapshot, Problem::OtherDirectory));
                true
            };
            let is_there = match (volume, &on_writable) {
                (Volume::Image, _) => on(&on_image),
                (Volume::Writable, Some(entries)) => on(entries),
                (Volume::Writable, None) => continue,
            };
            // A move within one file system is two renames, and a crash may have come
            // between them.
            if is_unmoved && !is_there && self.volumes.image().is_renamed_layer(snapshot.id)? {
                findings.push(about(snapshot, Problem::MoveNotRecorded));
                continue;
            }
            findings.extend(self.inspect_directory(snapshot, volume, is_there, is_held)?);
            if is_unmoved && !is_other && !self.is_linked(snapshot.id)? {
                let target = self.volumes.link_target(snapshot.id);
                findings.push(about(snapshot, Problem::WrongLink { target }));
            }
        }
        findings.extend(rows.orphans(&image, &on_image)?);
        if let (Ok(writable), Some(on_writable)) = (&writable, &on_writable) {
            findings.extend(rows.orphans(writable, on_writable)?);
        }
        findings.extend(self.projects.inspect(&rows.by_id)?);
        Ok(Inspection {
            snapshots: rows.by_id.len(),
            findings,
            left_out,
        })
    }

    fn failed_disk(&self, volume: Volume) -> Result<Option<Finding>> {
        let has_failed = self.flusher.has_recorded_failure(volume)?;
        Ok(has_failed.then(|| Finding {
            volume: Some(volume),
            ..about_all(Problem::DiskFailed)
        }))
    }

    fn rows(&self) -> Result<Rows> {
        let reader = self.store.read()?;
        let mut by_id = HashMap::new();
        reader.list(&Filters::all(), |snapshot| {
            by_id.insert(snapshot.id, snapshot);
            Ok(())
        })?;
        Ok(Rows {
            by_id,
            leftover: reader.retired()?.iter().map(|left| left.id).collect(),
            ids: GivenOut::read(&reader)?,
            buried: [
                reader.tombstones(Volume::Image)?,
                reader.tombstones(Volume::Writable)?,
            ],
        })
    }

    /// Returns a finding if ids were used on this volume that the database has not given
    /// out.
    fn other_history(&self, dirs: &Dirs, entries: &Found) -> Result<Option<Finding>> {
        let is_other = match dirs.newest_block() {
            Ok(block) => {
                let history = self.store.read()?.judge(dirs.volume(), block.as_ref())?;
                history != History::Same && !entries.is_empty()
            }
            Err(error) if error.kind() == ErrorKind::DataLoss => true,
            Err(error) => return Err(error),
        };
        Ok(is_other.then(|| Finding {
            volume: Some(dirs.volume()),
            ..about_all(Problem::OtherHistory)
        }))
    }

    /// The finding for a writable volume that is missing, or has only lost its mark. Only
    /// the mark is lost if the newest block of ids on the volume is from this database.
    fn missing_volume(&self, error: &Error) -> Result<Finding> {
        let block = self.volumes.block_of_unmarked().ok().flatten();
        let is_ours = match block {
            None => false,
            Some(block) => {
                let history = self.store.read()?.judge(Volume::Writable, Some(&block))?;
                history == History::Same
            }
        };
        Ok(about_all(match is_ours {
            true => Problem::MarkMissing,
            false => Problem::VolumeMissing { why: error.chain() },
        }))
    }

    fn inspect_directory(
        &self,
        snapshot: &Snapshot,
        volume: Volume,
        is_there: bool,
        is_held: bool,
    ) -> Result<Option<Finding>> {
        let dirs = self.volumes.open(volume)?;
        let shape = match snapshot.info.kind {
            Kind::Committed => {
                let problem = inspect_layer(&dirs, snapshot, is_there, is_held)?;
                return Ok(problem.map(|problem| about(snapshot, problem)));
            }
            kind => shape_of(kind),
        };
        let is_whole = is_there && dirs.is_whole(snapshot.id, shape);
        let problem = Problem::NoDirectory(snapshot.info.kind);
        Ok((!is_whole).then(|| about(snapshot, problem)))
    }

    fn is_linked(&self, id: SnapshotId) -> Result<bool> {
        let target = self.volumes.link_target(id);
        self.volumes.image().links_to(id, &target)
    }
}

/// Compares a layer with the counts that were recorded at its commit. `is_held` means that
/// the layer is mounted as the upper directory of a container, which may write to the
/// layer. Differences of the layer then do not count.
pub(super) fn inspect_layer(
    dirs: &Arc<Dirs>,
    snapshot: &Snapshot,
    is_there: bool,
    is_held: bool,
) -> Result<Option<Problem>> {
    let missing = match snapshot.is_hollow() {
        true => Problem::HollowLayerMissing,
        false => Problem::LayerMissing,
    };
    let counted = match is_there {
        false => return Ok(Some(missing)),
        true => dirs.open_upper(snapshot.id).and_then(tree::count_layer),
    };
    let counted = match counted {
        Ok(counted) => counted,
        Err(error) if error.kind() == ErrorKind::DataLoss => {
            return Ok(Some(Problem::LayerMissing));
        }
        Err(error) => {
            let why = error.chain();
            return Ok(Some(Problem::LayerUnreadable { why }));
        }
    };
    let recorded = Recorded {
        inodes: snapshot.usage.inodes,
        data_bytes: match snapshot.data_bytes {
            DataBytes::Counted(bytes) => Some(bytes),
            DataBytes::Unknown => None,
            // A container may have changed the layer after its commit.
            DataBytes::WasMounted => return Ok(None),
        },
        attributes: snapshot.marks.map(|marks| marks.attributes),
    };
    Ok(match compare(recorded, counted) {
        _ if is_held => None,
        Comparison::Same => None,
        Comparison::Less => Some(Problem::LayerDamaged { recorded, counted }),
        Comparison::Other => Some(Problem::LayerChanged { recorded, counted }),
    })
}

#[derive(Debug, PartialEq, Eq)]
enum Comparison {
    Same,
    Less,
    Other,
}

fn compare(recorded: Recorded, counted: Content) -> Comparison {
    let recorded_bytes = recorded.data_bytes.unwrap_or(counted.data_bytes);
    let (inodes, bytes) = (counted.usage.inodes, counted.data_bytes);
    let attributes = counted.marks.map_or(0, |marks| marks.attributes);
    let recorded_attributes = recorded.attributes.unwrap_or(attributes);
    if inodes < recorded.inodes || bytes < recorded_bytes || attributes < recorded_attributes {
        Comparison::Less
    } else if inodes > recorded.inodes || bytes > recorded_bytes || attributes > recorded_attributes
    {
        Comparison::Other
    } else {
        Comparison::Same
    }
}

impl Rows {
    /// The reason why a snapshot's parent cannot be a parent; `None` if it can.
    fn bad_parent(&self, snapshot: &Snapshot) -> Option<String> {
        let parent_id = snapshot.parent_id?;
        let Some(parent) = self.by_id.get(&parent_id) else {
            return Some(format!("snapshot {parent_id}, which does not exist"));
        };
        if parent.info.kind != Kind::Committed {
            let (name, kind) = (Quoted(&parent.info.name), parent.info.kind);
            return Some(format!("{name}, which is {kind}, not committed"));
        }
        // The chain is longer than the number of snapshots only if it is a
        // circle.
        let mut above = Some(parent);
        for _ in 0..=self.by_id.len() {
            match above.and_then(|layer| layer.parent_id) {
                None => return None,
                Some(id) => above = self.by_id.get(&id),
            }
        }
        Some("itself".to_owned())
    }

    fn orphans(&self, dirs: &Dirs, entries: &Found) -> Result<Vec<Finding>> {
        let volume = dirs.volume();
        let places = self.by_id.values().map(Snapshot::place);
        let known = known_on(volume, places, &self.leftover);
        let buried = &self.buried[volume as usize];
        let mut orphans: Vec<_> = entries
            .iter()
            .filter(|(id, _)| !known.contains(id))
            .collect();
        orphans.sort_by_key(|(id, _)| **id);
        let finding = |(id, file_type): (&SnapshotId, &FileType)| {
            // A link on the image volume is the link of a layer, and holds no files.
            let is_link = volume == Volume::Image && *file_type == FileType::Symlink;
            let is_kept = !buried.contains(id) && !is_link && !dirs.is_unfilled(*id)?;
            Ok(Finding {
                problem: Problem::Orphan { is_kept },
                name: None,
                id: Some(*id),
                volume: Some(volume),
            })
        };
        orphans.into_iter().map(finding).collect()
    }
}

fn about(snapshot: &Snapshot, problem: Problem) -> Finding {
    Finding {
        problem,
        name: Some(snapshot.info.name.clone()),
        id: Some(snapshot.id),
        volume: snapshot.volume,
    }
}

fn about_all(problem: Problem) -> Finding {
    Finding {
        problem,
        name: None,
        id: None,
        volume: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Marks, Usage};

    #[test]
    fn less_of_anything_is_damage() {
        let recorded = |inodes, data_bytes| Recorded {
            inodes,
            data_bytes,
            attributes: Some(2),
        };
        let counted_with = |inodes, data_bytes, attributes| Content {
            usage: Usage {
                size_bytes: 0,
                inodes,
            },
            data_bytes,
            marks: Some(Marks {
                attributes,
                is_hollow: false,
            }),
        };
        let counted = |inodes, data_bytes| counted_with(inodes, data_bytes, 2);
        use Comparison::{Less, Other, Same};
        let table = [
            (recorded(5, Some(100)), counted(5, 100), Same),
            (recorded(5, Some(100)), counted(5, 99), Less),
            (recorded(5, Some(100)), counted(4, 200), Less),
            (recorded(5, Some(100)), counted(6, 99), Less),
            (recorded(5, Some(100)), counted(6, 100), Other),
            (recorded(5, Some(100)), counted(5, 101), Other),
            (recorded(5, None), counted(5, 7), Same),
            (recorded(5, None), counted(4, 7), Less),
            (recorded(5, Some(7)), counted_with(6, 7, 1), Less),
            (recorded(5, Some(7)), counted_with(5, 7, 3), Other),
        ];
        for (recorded, counted, expected) in table {
            assert_eq!(
                compare(recorded, counted),
                expected,
                "{recorded} {counted:?}"
            );
        }
    }
}
