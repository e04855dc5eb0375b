//! Checks the conditions for an import or its undoing, before anything is changed.
//!
//! Never: changes anything.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;

use super::files::{Paths, is_one_file, look};
use super::plan::{Disks, LeftOut, Plan, Reason, belongs_to};
use crate::commands::import::bolt::snapshots::Contents;
use crate::config::Config;
use crate::error::{Context, Error, Result};
use crate::mount::mountinfo::{self, Mounted};
use crate::root::state;
use crate::store::{FileFormat, Store, find_remains, probe_format, require_short};
use crate::types::{Quoted, QuotedPath, SnapshotId, Volume};
use crate::volume::{Claim, Filled, Identity, Lifetime, Root};

/// Returns an error if an import or its undoing was interrupted, because its steps have to be
/// undone first.
pub(super) fn require_nothing_half_done(paths: &Paths) -> Result<()> {
    if probe_format(&paths.source)? != FileFormat::Bolt || !paths.has_draft()? {
        return Ok(());
    }
    Err(Error::refused(format!(
        "an import or its undoing was interrupted, because {} exists: run `import` or `import \
         --undo`",
        paths.draft.display()
    )))
}

/// Returns an error if there is nothing to import, or if the name of a file that the
/// import creates is taken.
pub(super) fn require_importable(root: &Root, config: &Config, paths: &Paths) -> Result<()> {
    let (path, shown) = (&config.root, paths.source.display());
    require_short(&paths.draft_database())?;
    match probe_format(&paths.source)? {
        FileFormat::Bolt => {}
        FileFormat::Ours => {
            return Err(Error::refused(format!(
                "{shown} is a database of this program already: there is nothing to import"
            )));
        }
        FileFormat::Absent if probe_format(&paths.target)? == FileFormat::Ours => {
            return Err(Error::refused(format!(
                "{} is a database of this program already, and {path} has none of the Go \
                 original: there is nothing to import",
                paths.target.display()
            )));
        }
        FileFormat::Absent => {
            return Err(Error::refused(format!(
                "{path} has no metadata.db of the Go original: give the --root-dir that the \
                 original had"
            )));
        }
        FileFormat::OtherSqlite | FileFormat::Unknown => {
            return Err(Error::refused(format!(
                "{shown} is not a database of the Go original (bbolt): give the --root-dir that \
                 the original had"
            )));
        }
    }
    let has_draft = paths.has_draft()?;
    if !paths.is_one_place() {
        require_replaceable(root, config, paths)?;
    }
    if look(&paths.kept)?.is_some() && !paths.is_source_kept()? {
        return Err(Error::refused(format!(
            "{} is there already, from an earlier import: move it away",
            paths.kept.display()
        )));
    }
    match has_draft {
        // The new database exists already, so the files beside it are its own.
        true => Ok(()),
        false => require_unknown(root, config).and_then(|()| require_no_remains(paths)),
    }
}

/// Returns an error if files of another database of this program are where the new database
/// goes, because they would have to be deleted.
fn require_no_remains(paths: &Paths) -> Result<()> {
    let Some(remains) = find_remains(&paths.target)? else {
        return Ok(());
    };
    Err(Error::refused(format!(
        "{} is there, but not the database of this program to which it belongs: move this file \
         away and keep it, because it may be all that is left of that database",
        remains.display()
    )))
}

/// Returns an error if the root records a database of this program. This database may be
/// elsewhere, or on a disk that is not mounted, with an unfinished import beside it.
pub(super) fn require_unknown(root: &Root, config: &Config) -> Result<()> {
    let Some(database) = state::recorded(root, config)? else {
        return Ok(());
    };
    Err(Error::refused(format!(
        "{path}/state says that the database of this program is {}: mount the disk of this \
         database and give the --state-dir that it had, or, if the database is not needed any \
         more, remove {path}/state",
        database.display(),
        path = config.root
    )))
}

/// Returns an error if the path of the new database, which differs from the original's, is
/// taken. After an import that was killed between the two steps of the exchange, the new
/// database may already have this path, which is not an error.
fn require_replaceable(root: &Root, config: &Config, paths: &Paths) -> Result<()> {
    let target = &paths.target;
    let is_free = match probe_format(target)? {
        FileFormat::Absent => true,
        FileFormat::Ours => is_half_placed(root, config, paths)?,
        FileFormat::Bolt | FileFormat::OtherSqlite | FileFormat::Unknown => false,
    };
    if is_free {
        return Ok(());
    }
    Err(Error::refused(format!(
        "{} is there already, beside the original's {}: move the database away that is not \
         needed, or give another --state-dir",
        target.display(),
        paths.source.display()
    )))
}

/// Whether the new database has its final path only because an import or its undoing was
/// interrupted at this step. Then no daemon has written to this database.
pub(super) fn is_half_placed(root: &Root, config: &Config, paths: &Paths) -> Result<bool> {
    let target = &paths.target;
    if !paths.has_draft()? {
        return Ok(false);
    }
    // The database has two names. It may have a log under the other name, so it must not be
    // opened under this one.
    if is_one_file(target, &paths.draft_database())? {
        return Ok(true);
    }
    Ok(state::is_at_rest(root, config, target)?
        && Store::open_read_only(target)?.read()?.is_as_imported()? == Some(true))
}

/// Opens the original's database. The original cannot use it as long as the
/// file is open.
pub(super) fn open_source(path: &Path) -> Result<File> {
    let opening = || format!("open {}", path.display());
    if look(path)?.is_some_and(|found| !found.is_file()) {
        return Err(Error::refused(format!(
            "{} is not a regular file: put the original's database file there",
            path.display()
        )));
    }
    let file = File::options()
        .read(true)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
        .context(opening)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(Error::refused(format!(
            "{} is in use: stop the Go snapshotter first",
            path.display()
        ))),
        locked => locked.context(opening).map(|()| file),
    }
}

/// Returns an error if a snapshotter answers on the socket. The lock cannot show this, because
/// the original does not take this program's lock, and opens its database only when it needs
/// it.
pub(super) fn require_nobody_serves(config: &Config) -> Result<()> {
    let usual = format!("{}/grpc.socks", config.root);
    for address in [&config.address, &usual] {
        if UnixStream::connect(address).is_ok() {
            return Err(Error::refused(format!(
                "a snapshotter answers on {address}: stop this snapshotter first"
            )));
        }
    }
    Ok(())
}

/// Returns an error if a snapshot of one of the volumes is mounted, because files that a
/// container uses can be neither counted nor moved.
pub(super) fn require_unmounted<'a>(volumes: impl Iterator<Item = &'a Filled>) -> Result<()> {
    let mounts = mountinfo::read()?;
    for filled in volumes {
        let stat = filled.stat_snapshots()?;
        let is_snapshots = |directory: &Path| {
            let found = fs::metadata(directory);
            found.is_ok_and(|found| (found.dev(), found.ino()) == (stat.st_dev, stat.st_ino))
        };
        let is_of = |mounted: &Mounted| {
            let mut directories = overlaid(mounted).into_iter();
            let is_inside = |path: PathBuf| path.ancestors().nth(2).is_some_and(is_snapshots);
            directories.any(is_inside) || is_bound(mounted, filled)
        };
        if let Some(mounted) = mounts.iter().find(|mounted| is_of(mounted)) {
            return Err(Error::refused(format!(
                "a snapshot of {} is mounted at {}: stop the containers first",
                filled.path(),
                QuotedPath(&mounted.point)
            )));
        }
    }
    Ok(())
}

/// The upper and lower directories of an overlay mount. Relative ones (mount(8) was run
/// inside a directory) cannot be resolved, and are left out.
fn overlaid(mounted: &Mounted) -> Vec<PathBuf> {
    if mounted.file_system != "overlay" {
        return Vec::new();
    }
    let options = mounted.options.split(',');
    let lists = options.filter_map(|option| match option.split_once('=') {
        Some(("upperdir" | "lowerdir" | "lowerdir+", list)) => Some(list),
        _ => None,
    });
    lists
        .flat_map(|list| list.split(':'))
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .collect()
}

/// Whether a mount is a bind mount of a snapshot's `fs`, as for a snapshot without a parent.
fn is_bound(mounted: &Mounted, filled: &Filled) -> bool {
    let mut parts = mounted.root.iter().rev().filter_map(|part| part.to_str());
    let (Some("fs"), Some(id), Some("snapshots")) = (parts.next(), parts.next(), parts.next())
    else {
        return false;
    };
    let Some(id) = SnapshotId::from_directory_name(id.as_bytes()) else {
        return false;
    };
    let (ours, theirs) = (filled.stat_upper(id), fs::metadata(&mounted.point).ok());
    ours.zip(theirs)
        .is_some_and(|(ours, theirs)| (ours.st_dev, ours.st_ino) == (theirs.dev(), theirs.ino()))
}

/// Returns an error if the disks do not belong to this database.
pub(super) fn require_disks(contents: &Contents, disks: &Disks) -> Result<()> {
    let mut inodes = HashSet::new();
    for found in disks.present() {
        let (volume, path) = (found.filled.volume(), found.filled.path());
        let stat = found.filled.stat_snapshots()?;
        if !inodes.insert((stat.st_dev, stat.st_ino)) {
            return Err(Error::refused(format!(
                "the writable directory {path} is the root directory under another path: give the \
                 --writable-dir that the original had"
            )));
        }
        // One directory may be newer than the database, because the original creates a
        // directory before it enters the snapshot.
        let known = contents.highest_id;
        if let Some(newest) = found.newest().filter(|id| id.number() > known + 1) {
            return Err(Error::refused(format!(
                "{path} has snapshots/{newest}, but the highest id in the database is {known}: put \
                 the latest metadata.db into the root directory, or give the directories that \
                 belong to this database"
            )));
        }
        if let [id, ..] = found.filled.left_out()?.as_slice() {
            return Err(Error::refused(format!(
                "{path}/left-out/{id} is there already, from an earlier import: move \
                 {path}/left-out away"
            )));
        }
        if volume == Volume::Writable {
            require_unmarked(&found.filled)?;
        }
    }
    Ok(())
}

fn require_unmarked(writable: &Filled) -> Result<()> {
    let path = writable.path();
    // The identity is random, so no volume has its mark.
    match Identity::random()?.look(writable.top(), path)? {
        Claim::Free => Ok(()),
        Claim::Ours | Claim::Foreign(_) => Err(Error::refused(format!(
            "{path} is the writable volume of another root: give the --writable-dir that the \
             original had, or, if no other root uses this directory, remove {path}/.volume"
        ))),
    }
}

/// Returns an error if a volume has none of the directories that it should have, because this
/// volume's disk may not be mounted.
pub(super) fn require_volumes(plan: &Plan, are_there: &[Volume], config: &Config) -> Result<()> {
    let is_missing = |found: &&LeftOut| found.why == Reason::Missing && found.volumes.is_empty();
    let missing = || plan.left_out.iter().filter(is_missing);
    // This count includes layers, because the original leaves a layer that it commits from a
    // container's snapshot on the writable volume.
    let on_writable = missing().count();
    let may_be_gone = config.writable_lifetime == Lifetime::UntilReboot;
    if on_writable > 0 && !are_there.contains(&Volume::Writable) && !may_be_gone {
        return Err(Error::refused(format!(
            "{}/snapshots has none of the {on_writable} snapshots that are not on the image volume \
             {}: mount the writable volume's disk, or give the right --writable-dir; if what \
             containers had written is lost for good, give --writable-volatile, and they start \
             again from their images",
            config.writable, config.root
        )));
    }
    let belongs_on_image = |found: &&LeftOut| belongs_to(&found.snapshot) == Volume::Image;
    let on_image = missing().filter(belongs_on_image).count();
    if on_image > 0 && !are_there.contains(&Volume::Image) {
        return Err(Error::refused(format!(
            "{}/snapshots has none of the {on_image} snapshots that have to be there: mount the \
             image volume's disk. If the snapshots are lost for good, there is nothing to import: \
             move metadata.db and snapshots away, and start the daemon without an import",
            config.root
        )));
    }
    Ok(())
}

/// Returns an error if the directory of a snapshot is on neither volume. Even if other
/// directories exist, the disk may not be mounted, because the original creates
/// directories even on a bare mount point.
pub(super) fn require_directories(plan: &Plan, config: &Config) -> Result<()> {
    let left_out = plan.left_out.iter();
    let mut missing = left_out.filter(|found| found.why == Reason::Missing);
    let Some(first) = missing.next() else {
        return Ok(());
    };
    let others = match missing.count() {
        0 => String::new(),
        more => format!(" (and {more} more)"),
    };
    Err(Error::refused(format!(
        "neither {root}/snapshots nor {writable}/snapshots has {id}/fs of the snapshot \
         {name}{others}: mount both disks, or give the directories that the original had; if the \
         snapshot is lost for good, --leave-out-missing imports the others without it",
        root = config.root,
        writable = config.writable,
        id = first.snapshot.id,
        name = Quoted(&first.snapshot.info.name),
    )))
}
