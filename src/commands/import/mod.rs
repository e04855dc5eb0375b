//! The command `import`: the Go original's snapshots become ours, and, as long
//! as nothing was written since, the original's again.
//!
//! Owns: the order of steps. Never: the format of either database.
//!
//! The new database is made in `<state>/metadata.db.import/`, with all there is to
//! it. The old one then gets a second name, `metadata.db.bbolt`, and the new one
//! is renamed over the first: before that step the original finds its database as
//! it was, after it the daemon finds ours. Directories stay where they are, but
//! for those that belong to no snapshot that is taken over: they are set aside,
//! so that no start takes them for strays. Undoing goes the same way backwards:
//! first the databases, by one rename, then the disks.
//!
//! As long as the draft's directory is there, something is half done, and what it
//! holds says what: running the command again begins by taking that back. A
//! killed import leaves the original's database in use until the one rename, and
//! ours after it; so does a killed undoing, the other way round. A draft's directory
//! without a database, beside ours in use, is of an import that has done everything
//! else.
//!
//! A layer that the original made out of a container's snapshot is on the
//! writable volume, where the original never finds it: nothing could be made to
//! stand on it. Its bytes are whole, and to us it is a layer that is not home
//! yet, so it is taken over as that.

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

/// The fact with the writable directory of the import or undoing that is under way: with
/// another directory it would be finished on the wrong disk.
const WRITABLE_DIR: &str = "import_writable_dir";

/// The fact with the last transaction of the original's database. An original that was
/// started during the import has waited for that file, and then writes to it under its
/// second name.
const TRANSACTION: &str = "import_transaction";

/// Imports, looks what an import would do, or undoes one, and prints a report. Returns
/// whether no snapshot was left out. After an error nothing was done, or the command
/// can be run again.
pub fn run(config: &Config, options: ImportOptions) -> Result<bool> {
    descriptors::raise_limit();
    let root = Image::open_existing_root(&config.root)?;
    // Held to the end: no daemon starts on what is half done.
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
    // Open, and so locked, to the end.
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
        log::info!("what an import or its undoing had left half done has been taken back");
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

/// After a failure; once the databases are exchanged there is nothing to be taken
/// back.
fn take_back_failed(root: &Root, config: &Config, paths: &Paths) {
    if !matches!(probe_format(&paths.source), Ok(FileFormat::Bolt)) {
        return;
    }
    if let Err(error) = undo::take_back(root, config, paths) {
        log::warn!(
            "not everything could be taken back, run `import --undo`: {}",
            error.chain()
        );
    }
}

fn is_away(snapshot: &Snapshot) -> bool {
    snapshot.info.kind == Kind::Committed && snapshot.volume == Some(Volume::Writable)
}
