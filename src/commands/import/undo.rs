//! Undoes an import: gives the root directory back to the Go original.
//!
//! First the databases are exchanged, by one rename, and then the disks are restored. If the
//! command is killed before the rename, the daemon finds everything as it was. If the command
//! is killed later, the original finds everything except the directories that were set aside.
//! The new database, which is a draft again, records the steps that have to be undone. Running
//! `import` or `import --undo` again undoes them, as after an interrupted import.

use std::fs::File;

use super::draft::take_for_draft;
use super::files::{self, Paths, is_one_file};
use super::preconditions::{is_half_placed, open_source, require_unknown, require_unmounted};
use super::report::print_undone;
use super::{TRANSACTION, WRITABLE_DIR};
use crate::commands::import::bolt;
use crate::config::{Config, Format};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::root::{state, writable};
use crate::store::{Completeness, FileFormat, Store, probe_format, remove_companions};
use crate::types::{Kind, Volume};
use crate::util::fault_point::fault_point;
use crate::volume::{Claim, Filled, Image, Lifetime, Root};

/// The name of a fact: the mark of the writable volume is being removed. As long as the fact is
/// recorded, a writable directory without a mark does not mean that its disk is not mounted.
const UNDOING: &str = "undoing";

/// Undoes a complete import, or the steps of an interrupted one.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if there is nothing to undo, if snapshots were changed
/// since the import, or if a disk is missing.
pub(super) fn run(root: &Root, config: &Config, format: Format) -> Result<()> {
    let paths = Paths::new(config);
    undo(root, config, &paths).map_err(|error| match error.kind() {
        ErrorKind::ResourceExhausted => error.while_doing(
            "undo the import (make a few MiB of room on the full disk, and run `import --undo` \
             again)",
        ),
        _ => error,
    })?;
    print_undone(format, &paths.source);
    Ok(())
}

fn undo(root: &Root, config: &Config, paths: &Paths) -> Result<()> {
    let imported = look(root, config, paths)?;
    // The original's database is locked to the end, because the original must not find the
    // disks half restored.
    let lock = open_source(match imported {
        Some(_) => &paths.kept,
        None => &paths.source,
    })?;
    let volumes = [
        Filled::open(Volume::Image, &config.root)?,
        Filled::open(Volume::Writable, &config.writable)?,
    ];
    require_unmounted(volumes.iter().flatten())?;
    if let Some(store) = imported {
        require_unchanged(&lock, paths, &store)?;
        require_writable(config, &store)?;
        exchange(config, paths, store)?;
    }
    take_back(root, config, paths)
}

/// Opens the database of a complete import. Returns `None` for an interrupted import, during
/// which the original's database stays in its place. Changes nothing.
fn look(root: &Root, config: &Config, paths: &Paths) -> Result<Option<Store>> {
    let nothing = || {
        Error::refused(format!(
            "there is nothing to undo: nothing was imported into {}",
            config.root
        ))
    };
    let (source, target) = (probe_format(&paths.source)?, probe_format(&paths.target)?);
    match source {
        FileFormat::Bolt => {
            if !paths.has_draft()? {
                return require_unknown(root, config).and(Err(nothing()));
            }
            let may_be_replaced = paths.is_one_place()
                || target == FileFormat::Absent
                || target == FileFormat::Ours && is_half_placed(root, config, paths)?;
            match may_be_replaced {
                true => Ok(None),
                false => Err(Error::refused(format!(
                    "{} is not the database of an interrupted import into {}: give the \
                     --state-dir of that import",
                    paths.target.display(),
                    config.root
                ))),
            }
        }
        FileFormat::Ours if !paths.is_one_place() => Err(Error::refused(format!(
            "{} is in the place of the original's database: give the --state-dir of the import",
            paths.source.display()
        ))),
        FileFormat::OtherSqlite | FileFormat::Unknown => Err(Error::refused(format!(
            "{} is in the place of the original's database, and is not a database of this \
             program: move it away",
            paths.source.display()
        ))),
        FileFormat::Ours | FileFormat::Absent if target != FileFormat::Ours => Err(nothing()),
        FileFormat::Ours | FileFormat::Absent => {
            if probe_format(&paths.kept)? != FileFormat::Bolt {
                return Err(Error::refused(format!(
                    "{} is not there: there is no database of the Go original to go back to",
                    paths.kept.display()
                )));
            }
            open_unwritten(root, config).map(Some)
        }
    }
}

fn open_unwritten(root: &Root, config: &Config) -> Result<Store> {
    let (store, completeness) = state::open_existing(root, config, Store::open)?;
    if completeness != Completeness::Whole || store.read()?.copied()?.is_some() {
        return Err(Error::refused(
            "the import cannot be undone: the latest changes are missing from the database, so it \
             does not show what has changed since the import",
        ));
    }
    let is_as_imported = store.read()?.is_as_imported()?;
    match is_as_imported {
        Some(true) => Ok(store),
        Some(false) => Err(Error::refused(
            "the import cannot be undone: snapshots were created, changed, removed or moved \
             since the import, so the original's database does not describe the disks any more",
        )),
        None => Err(Error::refused(
            "there is nothing to undo: the database was not created by an import",
        )),
    }
}

/// Returns an error if the original's database was written to since the import.
fn require_unchanged(kept: &File, paths: &Paths, store: &Store) -> Result<()> {
    let shown = paths.kept.display();
    let now = kept
        .try_clone()
        .context(|| "open the file once more")
        .and_then(bolt::Database::open)
        .context(|| format!("read {shown}"))?
        .transaction();
    let imported = store.read()?.fact(TRANSACTION)?;
    match imported {
        Some(imported) if imported != now.to_string() => Err(Error::refused(format!(
            "{shown} was written to after the import (its last transaction is {now}, and was \
             {imported}): a Go snapshotter that was started during the import has used this \
             database, which does not describe the disks any more"
        ))),
        _ => Ok(()),
    }
}

/// Puts the original's database in its place. The new database becomes a draft again.
fn exchange(config: &Config, paths: &Paths, store: Store) -> Result<()> {
    // The disk may be full, so the ballast is deleted.
    store.make_room();
    store.together(|transaction| {
        transaction.forget_fact(UNDOING)?;
        transaction.record_fact(WRITABLE_DIR, &config.writable)
    })?;
    // Closing moves everything from the log into the file, because only the file gets another
    // name.
    store.close()?;
    drop(store);
    // An interrupted undoing may have left a draft.
    paths.remove_draft()?;
    paths.make_draft()?;
    files::link(&paths.target, &paths.draft_database())?;
    files::flush(&paths.draft)?;
    fault_point("undo-linked");
    files::rename(&paths.kept, &paths.source)?;
    paths.flush()?;
    fault_point("undo-exchanged");
    Ok(())
}

/// Undoes all steps of an import that a draft records, except the exchange of the databases,
/// because the original's database is in its place. This function can be repeated.
///
/// # Errors
///
/// [`ErrorKind::FailedPrecondition`] if the writable directory is not that of the interrupted
/// import.
pub(super) fn take_back(root: &Root, config: &Config, paths: &Paths) -> Result<()> {
    take_for_draft(paths)?;
    // These files are removed first, because a full disk may need their space.
    remove_companions(&paths.target)?;
    match probe_format(&paths.draft_database())? {
        FileFormat::Ours => give_back(config, paths)?,
        // The command was killed before the database was created.
        FileFormat::Absent => {}
        FileFormat::Bolt | FileFormat::OtherSqlite | FileFormat::Unknown => {
            return Err(Error::refused(format!(
                "{} is not a database of this program: move it away",
                paths.draft_database().display()
            )));
        }
    }
    if paths.is_source_kept()? {
        files::remove_file(&paths.kept)?;
    }
    let has_two_names =
        !paths.is_one_place() && is_one_file(&paths.target, &paths.draft_database())?;
    if has_two_names {
        files::remove_file(&paths.target)?;
    }
    state::forget(root)?;
    paths.flush()?;
    fault_point("undo-forgotten");
    // The draft is removed last, because as long as it is there, all steps can
    // be repeated.
    paths.remove_draft()
}

/// Restores both volumes to their state before the import.
fn give_back(config: &Config, paths: &Paths) -> Result<()> {
    let store = Store::open(&paths.draft_database()).context(|| {
        format!(
            "read which steps have to be undone; if the file cannot be read any more, move the \
             directories in left-out back to snapshots on both volumes, and remove {}/.volume, \
             {}/state and {}",
            config.writable,
            config.root,
            paths.draft.display()
        )
    })?;
    store.make_room();
    let writable = require_writable(config, &store)?;
    let known = writable::known(&store)?;
    // An import records the identity before it probes the directory, so files of a probe may be
    // left.
    if known.is_some() {
        writable::clear_probe(&config.writable)?;
    }
    let image = Filled::open(Volume::Image, &config.root)?.ok_or_else(|| {
        Error::refused(format!(
            "{}/snapshots is missing: mount the disk of the image volume",
            config.root
        ))
    })?;
    // An import creates links only after it has entered the snapshots into the database.
    if store.read()?.is_as_imported()?.is_some() {
        remove_links(config, &store)?;
    }
    fault_point("undo-unlinked");
    let filled = || [&image].into_iter().chain(&writable);
    filled().try_for_each(Filled::put_back)?;
    fault_point("undo-put-back");
    // This comes before the mark is removed, because a repetition then skips the writable
    // volume.
    filled().for_each(Filled::leave);
    if let Some(writable) = &writable {
        store.together(|transaction| transaction.record_fact(UNDOING, "yes"))?;
        fault_point("undo-noted");
        if let Some((identity, _)) = known {
            identity.unmark(writable.top(), writable.path())?;
        }
    }
    fault_point("undo-unmarked");
    store.close()
}

/// Removes the links to layers on the writable volume. All of them were created by the import,
/// because the links of other programs were set aside.
fn remove_links(config: &Config, store: &Store) -> Result<()> {
    let image = Image::open(Image::open_existing_root(&config.root)?)?;
    let places = store.read()?.inventory()?;
    let away = places.iter().filter(|(place, _)| {
        place.kind == Kind::Committed && place.volume == Some(Volume::Writable)
    });
    for (place, _) in away {
        image.remove_link(place.id)?;
    }
    image.dirs().settle_names()
}

/// Opens the writable volume that the database has recorded. Returns `None` if nothing on this
/// volume has to be restored.
fn require_writable(config: &Config, store: &Store) -> Result<Option<Filled>> {
    let path: &str = &config.writable;
    let (is_undoing, given) = {
        let rows = store.read()?;
        (rows.fact(UNDOING)?.is_some(), rows.fact(WRITABLE_DIR)?)
    };
    let Some((identity, is_claimed)) = writable::known(store)? else {
        return Ok(None);
    };
    let filled = Filled::open(Volume::Writable, path)?;
    let claim = match &filled {
        Some(filled) => identity.look(filled.top(), path)?,
        None => Claim::Free,
    };
    let is_needless =
        !is_claimed || is_undoing || config.writable_lifetime == Lifetime::UntilReboot;
    match claim {
        Claim::Ours => Ok(filled),
        Claim::Free if is_needless && given.as_deref() == Some(path) => Ok(None),
        Claim::Free | Claim::Foreign(_) => {
            let was = given
                .filter(|given| given.as_str() != path)
                .map_or(String::new(), |given| {
                    format!(", or give --writable-dir {given}, as before")
                });
            Err(Error::refused(format!(
                "{path} is not the writable volume of this import (volume {identity}): mount the \
                 disk that was there{was}"
            )))
        }
    }
}
