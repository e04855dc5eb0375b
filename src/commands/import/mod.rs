//! The command `import`, which takes over the snapshots of the Go snapshotter that this program
//! replaces (the *original*). `import --undo` gives them back, as long as nothing was written
//! since the import.
//!
//! Owns: the order of steps. Never: the format of either database.
//!
//! The new database is built completely in `<state>/metadata.db.import/`. The old database then
//! gets a second name, `metadata.db.bbolt`, and the new one is renamed over the first name.
//! Before this rename, the original finds its database as it was; afterwards, the daemon finds
//! the new one. Directories of snapshots stay in their places. Directories that belong to no
//! imported snapshot are set aside, so that no start treats them as strays. Undoing does the
//! same backwards: first it exchanges the databases, by one rename, and then it restores the
//! disks.
//!
//! As long as the draft's directory exists, an import or its undoing is not finished, and the
//! directory's contents show which steps were done. Running the command again begins by undoing
//! these steps. If an import is killed, the original's database stays in use until the rename,
//! and the new one is in use after it; if undoing is killed, it is the other way round. If the
//! draft's directory contains no database and the new database is in use, only the removal of
//! the draft's directory is left to do.
//!
//! The original leaves a layer that it commits from a container's snapshot on the writable
//! volume, and never finds it there again, so nothing can be created on this layer. The layer's
//! files are complete, and this program takes it over as an unmoved layer.

pub mod bolt;
mod draft;
mod files;
mod plan;
mod preconditions;
mod report;
mod undo;

use crate::commands::import::bolt::snapshots::{Contents, read};
use crate::config::{Config, ImportOptions, ImportTask};
use crate::error::{Context, Result};
use crate::root::lock;
use crate::root::open::require_mounts;
use crate::store::{FileFormat, Snapshot, probe_format};
use crate::types::{Kind, Volume};
use crate::util::descriptors;
use crate::volume::{Image, Lifetime, Root};
use files::Paths;
use plan::{Disks, Plan};
use report::ImportReport;

/// The name of a fact: the writable directory of an unfinished import or undoing, which must
/// not be finished on another disk.
const WRITABLE_DIR: &str = "import_writable_dir";

/// The name of a fact: the last transaction of the original's database. If the original was
/// started during the import, it waits for the lock of its database file, and then writes to
/// this file under its second name.
const TRANSACTION: &str = "import_transaction";

/// Imports, reports what an import would do, or undoes an import, and prints a report.
/// Returns `true` if no snapshot was left out. After an error, either nothing was done,
/// or the command can be run again.
pub fn run(config: &Config, options: ImportOptions) -> Result<bool> {
    descriptors::raise_limit();
    let root = Image::open_existing_root(&config.root)?;
    // The lock is held to the end, so that no daemon starts on an unfinished import.
    let _lock = match options.task {
        ImportTask::Look => lock::require_free(&root).map(|()| None)?,
        ImportTask::Import | ImportTask::Undo => Some(lock::require(&root)?),
    };
    preconditions::require_nobody_serves(config)?;
    require_mounts(config)?;
    match options.task {
        ImportTask::Undo => {
            undo::run(&root, config, options.format)?;
            Ok(true)
        }
        ImportTask::Import if draft::is_all_but_cleared(&Paths::new(config))? => {
            Paths::new(config).remove_draft()?;
            report::print_finished(options.format, config);
            Ok(true)
        }
        ImportTask::Import | ImportTask::Look => {
            let report = import(&root, config, options)?;
            report.print(options.format);
            Ok(report.is_whole())
        }
    }
}

fn import<'a>(root: &Root, config: &'a Config, options: ImportOptions) -> Result<ImportReport<'a>> {
    let task = options.task;
    let paths = Paths::new(config);
    if task == ImportTask::Look {
        preconditions::require_nothing_half_done(&paths)?;
    }
    preconditions::require_importable(root, config, &paths)?;
    // The original's database stays open, and so locked, to the end.
    let source = preconditions::open_source(&paths.source)?;
    let contents = source
        .try_clone()
        .context(|| "open the file once more")
        .and_then(read)
        .context(|| format!("read {}", paths.source.display()))?;

    let look = || {
        let disks = Disks::look(&config.root, &config.writable)?;
        preconditions::require_unmounted(disks.present().map(|found| &found.filled))?;
        Ok(disks)
    };
    let mut disks = look()?;
    if paths.has_draft()? {
        undo::take_back(root, config, &paths)?;
        log::info!(
            "took back the steps of an earlier `import` or `import --undo` that was interrupted"
        );
        disks = look()?;
    }
    preconditions::require_disks(&contents, &disks)?;
    let plan = plan(config, contents, &disks, options)?;
    if task == ImportTask::Import {
        draft::carry_out(config, &paths, &plan, &disks).inspect_err(|_| {
            take_back_failed(root, config, &paths);
        })?;
    }
    Ok(ImportReport { plan, task, config })
}

fn plan(
    config: &Config,
    contents: Contents,
    disks: &Disks,
    options: ImportOptions,
) -> Result<Plan> {
    let mut are_there = vec![Volume::Image, Volume::Writable];
    are_there.retain(|volume| disks.has_any(*volume, &contents));
    let is_volatile = config.writable_lifetime == Lifetime::UntilReboot;
    let plan = plan::plan(contents, disks, is_volatile)?;
    preconditions::require_volumes(&plan, &are_there, config)?;
    if !options.leaves_out_missing && !is_volatile {
        preconditions::require_directories(&plan, config)?;
    }
    Ok(plan)
}

/// Undoes the steps of an import that failed before the databases were exchanged: the
/// original's database (bbolt) is then still in its place. Does nothing after the exchange:
/// the import is then complete, and only `import --undo` takes it back.
fn take_back_failed(root: &Root, config: &Config, paths: &Paths) {
    if !matches!(probe_format(&paths.source), Ok(FileFormat::Bolt)) {
        return;
    }
    if let Err(error) = undo::take_back(root, config, paths) {
        log::warn!(
            "some steps of the failed import could not be undone, so run `import --undo`: {}",
            error.chain()
        );
    }
}

fn is_away(snapshot: &Snapshot) -> bool {
    snapshot.info.kind == Kind::Committed && snapshot.volume == Some(Volume::Writable)
}
