//! Builds the new database of an import, and puts it in the place of the original's database.

use super::files::{self, Paths};
use super::plan::{Disks, Plan};
use super::{TRANSACTION, WRITABLE_DIR, is_away};
use crate::config::Config;
use crate::error::Result;
use crate::root::{state, writable};
use crate::store::{FileFormat, Store, probe_format, remove_companions, set_space_aside};
use crate::types::SnapshotId;
use crate::util::fault_point::fault_point;
use crate::volume::{Image, Volumes};

/// Carries out the plan of an import. [`super::undo::take_back`] can undo all steps before the
/// exchange of the databases. After an error, the finished steps stay.
pub(super) fn carry_out(config: &Config, paths: &Paths, plan: &Plan, disks: &Disks) -> Result<()> {
    paths.make_draft()?;
    fault_point("import-begun");
    let store = Store::open(&paths.draft_database())?;
    // These facts are recorded before anything in the writable directory is changed.
    store.together(|transaction| {
        transaction.record_fact(WRITABLE_DIR, &config.writable)?;
        transaction.record_fact(TRANSACTION, &plan.transaction.to_string())
    })?;
    fault_point("import-drafted");

    // The root records the path of the database, because the draft is only found with the same
    // state directory.
    let root = Image::open_existing_root(&config.root)?;
    state::record(&root, config, &paths.target, &store)?;
    fault_point("import-recorded");

    let volumes = Volumes::new(Image::open(root)?, config.writable.clone());
    let mount_options = config.options.overlay_options(false);
    writable::adopt(&volumes, &store, &mount_options)?;
    fault_point("import-marked");

    // Entries are set aside first, because a new link may need the name of such an entry.
    for found in disks.present() {
        let volume = found.filled.volume();
        let there = plan.aside.iter().filter(|(on, _)| *on == volume);
        let ids: Vec<SnapshotId> = there.map(|(_, id)| *id).collect();
        found.filled.set_aside(&ids)?;
    }
    fault_point("import-set-aside");

    store.together(|transaction| transaction.import(&plan.kept, plan.highest_id))?;
    fault_point("import-entered");

    for snapshot in plan.kept.iter().filter(|snapshot| is_away(snapshot)) {
        volumes.link_home(snapshot.id)?;
    }
    fault_point("import-linked");

    for found in disks.present() {
        found.filled.sync()?;
    }
    store.close()?;
    drop(store);
    exchange(paths)
}

/// Renames the new database to the place of the original's database.
fn exchange(paths: &Paths) -> Result<()> {
    // SQLite would treat the log of another database as the log of this one.
    remove_companions(&paths.target)?;
    if !paths.is_source_kept()? {
        files::link(&paths.source, &paths.kept)?;
    }
    paths.flush()?;
    fault_point("import-kept");
    files::rename(&paths.draft_database(), &paths.target)?;
    paths.flush()?;
    fault_point("import-exchanged");
    if !paths.is_one_place() {
        files::remove_file(&paths.source)?;
        paths.flush()?;
    }
    fault_point("import-complete");
    // The import is complete. A draft that stays does no harm, so a failure is only logged.
    if let Err(error) = paths.remove_draft() {
        log::warn!(
            "the import is complete, but its directory {} is left, which does no harm: run \
             `import` again to remove it: {}",
            paths.draft.display(),
            error.chain()
        );
    }
    set_space_aside(&paths.target);
    Ok(())
}

/// Whether an import was interrupted before its last step, the removal of the draft's
/// directory.
pub(super) fn is_all_but_cleared(paths: &Paths) -> Result<bool> {
    Ok(paths.has_draft()?
        && probe_format(&paths.draft_database())? == FileFormat::Absent
        && probe_format(&paths.target)? == FileFormat::Ours
        && (paths.is_one_place() || probe_format(&paths.source)? == FileFormat::Absent))
}

/// If the new database is in its final place while the original's database still has its old
/// name, moves the new database back into the draft's directory. This is the state after an
/// import with a separate state directory was interrupted between its last two steps.
pub(super) fn take_for_draft(paths: &Paths) -> Result<()> {
    let is_placed = !paths.is_one_place() && probe_format(&paths.target)? == FileFormat::Ours;
    if !is_placed || probe_format(&paths.draft_database())? == FileFormat::Ours {
        return Ok(());
    }
    remove_companions(&paths.target)?;
    files::rename(&paths.target, &paths.draft_database())?;
    paths.flush()
}
