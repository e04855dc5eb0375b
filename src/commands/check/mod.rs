//! The command `check`, which finds differences between the database and the disks, and repairs
//! them.
//!
//! Owns: the order of inspecting, reporting, asking and repairing. Never: decides what is wrong
//! with a snapshot, or how to repair it, which is the snapshotter's task. While a daemon runs,
//! the command only reads, and asks the daemon to replace layers. A repair needs the root's
//! lock.

mod deep;
mod report;

use std::io::{BufRead, IsTerminal, Write};
use std::thread;
use std::time::Duration;

use crate::commands::progress::Progress;
use crate::config::{CheckOptions, Config, Depth, Format, Mending};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::mount::ByHand;
use crate::root::lock::Lock;
use crate::root::open::{Purpose, Visit, visit};
use crate::root::writable;
use crate::service::HealingClient;
use crate::snapshotter::{Finding, Inspection, Problem, Snapshotter};
use crate::store::{Completeness, Store};
use crate::types::QuotedPath;
use crate::util::descriptors;
use crate::volume::{Identity, Image, Lifetime, Volumes};
use deep::{Deep, Layers, Task, Writer};
use report::CheckReport;

/// While a daemon runs, only a finding that this many inspections see is reported, because the
/// daemon's own work looks like a finding for a moment.
const LOOKS: u32 = 3;
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);

/// Checks, repairs on request, and prints a report. Returns whether the database and
/// the disks agree in the end.
pub fn run(config: &Config, options: CheckOptions) -> Result<bool> {
    descriptors::raise_limit();
    let mends = options.mending != Mending::Never || options.depth == Depth::Heal;
    let purpose = match (options.mending, options.depth) {
        (Mending::Never, Depth::Heal) => Purpose::ChangeOrAsk,
        (Mending::Never, _) => Purpose::Look,
        _ => Purpose::Change,
    };
    let Visit {
        // The lock is held to the end, so that no daemon starts during the inspection.
        lock,
        completeness,
        store,
        volumes,
    } = visit(config, purpose)?;
    let identity = store.read()?.fact(Identity::FACT)?;
    let by_hand = ByHand::of_root(identity.as_deref())?;
    if mends && let Some(ByHand { id, point, .. }) = by_hand.first() {
        return Err(Error::refused(format!(
            "snapshot {id} is mounted by hand at {}, and a repair may remove its files: unmount \
             the snapshot first",
            QuotedPath(point)
        )));
    }
    let volumes = match options.resets_writable {
        false => volumes,
        true => give_up(config, &options, volumes, &store)?,
    };
    let snapshotter = Snapshotter::new(store, volumes, config.options.for_this_kernel());

    let inspection = inspect(&snapshotter, &completeness, lock.is_none())?;
    if options.depth != Depth::Counts {
        return look_deep(
            config,
            &snapshotter,
            &completeness,
            lock,
            inspection,
            &options,
        );
    }
    if options.mending != Mending::Never {
        return mend(&snapshotter, &completeness, inspection, &options);
    }
    let doomed = snapshotter.doomed(&inspection.findings)?;
    let report = CheckReport::new(lock.is_none(), inspection, doomed, None);
    report.print(options.format);
    Ok(report.is_clean())
}

/// Repairs what was found, after asking. Layers that can be healed are healed first, and
/// the other damaged layers are dropped. The caller holds the root's lock.
fn mend(
    snapshotter: &Snapshotter,
    completeness: &Completeness,
    inspection: Inspection,
    options: &CheckOptions,
) -> Result<bool> {
    let reported = |inspection: Inspection, deep: Option<Deep>| {
        let doomed = snapshotter.doomed(&inspection.findings)?;
        let report = CheckReport::new(false, inspection, doomed, deep);
        if options.format == Format::Human || report.is_clean() {
            report.print(options.format);
        }
        Ok(report)
    };
    let findings = inspection.findings.clone();
    let can_heal = require_latest(&inspection).is_ok();
    let mut report = reported(inspection, None)?;
    let number = findings
        .iter()
        .filter(|finding| finding.problem.healing().is_some())
        .count();
    let question = format!(
        "{number} of these can perhaps be healed without any loss, if the containerd at {} still \
         has their content. Healing drops nothing.",
        options.containerd_address
    );
    if can_heal && number > 0 && asked(options, &question)? {
        let healing = Task {
            layers: Layers::Broken,
            heals: true,
            writer: Some(&Writer::Alone(snapshotter)),
        };
        let deep = match deep::run(snapshotter, &findings, healing, options) {
            Err(error) if error.kind() == ErrorKind::Cancelled => return Err(error),
            Err(error) => Deep::failed(&error),
            Ok(deep) => deep,
        };
        report = reported(inspect(snapshotter, completeness, false)?, Some(deep))?;
    }
    if report.is_clean() {
        return Ok(true);
    }
    if !asked(options, &report.question())? {
        return Ok(false);
    }
    snapshotter.repair(report.findings())?;
    report.mended(look(snapshotter)?);
    report.print(options.format);
    Ok(report.is_clean())
}

/// Compares layers with containerd's content, heals them on request, and prints one
/// report of this and of the check that counts files.
fn look_deep(
    config: &Config,
    snapshotter: &Snapshotter,
    completeness: &Completeness,
    lock: Option<Lock>,
    mut inspection: Inspection,
    options: &CheckOptions,
) -> Result<bool> {
    let is_running = lock.is_none();
    let heals = options.depth == Depth::Heal;
    if heals {
        require_latest(&inspection)?;
    }
    let daemon = || HealingClient::connect(&config.address, snapshotter.store());
    let (writer, _lock) = match &lock {
        Some(_) if heals => (Some(Writer::Alone(snapshotter)), lock),
        // The comparison may take hours, so the lock is released and a daemon may start.
        Some(_) => (None, None),
        None if heals => {
            let daemon = daemon().context(|| "heal beside the daemon")?;
            (Some(Writer::Daemon(daemon)), None)
        }
        None => {
            let unrecorded = |error: Error| {
                log::warn!(
                    "the results of this check are not recorded, so the metrics do not show them: \
                     {}",
                    error.chain()
                );
            };
            (daemon().map_err(unrecorded).ok().map(Writer::Daemon), None)
        }
    };
    let task = Task {
        layers: Layers::All,
        heals,
        writer: writer.as_ref(),
    };
    let mut deep = deep::run(snapshotter, &inspection.findings, task, options)?;
    if let Some(writer) = &writer
        && let Err(error) = writer.record_result(&deep)
    {
        log::warn!(
            "the result of this check is not recorded, so the metrics do not show it: {}",
            error.chain()
        );
    }
    if options.depth == Depth::Heal {
        inspection = inspect(snapshotter, completeness, is_running)?;
    }
    // A layer that both checks have found damaged is reported once.
    let differs = |finding: &Finding| {
        let counts = matches!(
            finding.problem,
            Problem::LayerDamaged { .. } | Problem::LayerChanged { .. } | Problem::LayerMissing
        );
        counts && deep.findings.iter().any(|found| found.id == finding.id)
    };
    inspection.findings.retain(|finding| !differs(finding));
    inspection.findings.append(&mut deep.findings);
    let doomed = snapshotter.doomed(&inspection.findings)?;
    let report = CheckReport::new(is_running, inspection, doomed, Some(deep));
    report.print(options.format);
    Ok(report.is_clean())
}

/// Returns an error if the database may lack its latest changes. Such a database may assign a
/// directory to the wrong layer, and healing would replace that directory.
fn require_latest(inspection: &Inspection) -> Result<()> {
    let is_unsure = |finding: &&Finding| {
        matches!(
            finding.problem,
            Problem::OtherHistory
                | Problem::DatabaseOlder { .. }
                | Problem::DatabaseIncomplete { .. }
        )
    };
    match inspection.findings.iter().find(is_unsure) {
        None => Ok(()),
        Some(finding) => Err(Error::refused(format!(
            "{finding}: no layer is healed before this is repaired, because a directory may \
             belong to another snapshot than the database says"
        ))),
    }
}

/// Inspects the snapshots. If a daemon runs, inspects them repeatedly, so that the daemon's own
/// work is not reported.
fn inspect(
    snapshotter: &Snapshotter,
    completeness: &Completeness,
    is_running: bool,
) -> Result<Inspection> {
    let mut inspection = look(snapshotter)?;
    let mut looks = 1;
    while is_running && looks < LOOKS && !inspection.findings.is_empty() {
        thread::sleep(BETWEEN_LOOKS);
        let again = look(snapshotter)?;
        inspection.snapshots = again.snapshots;
        inspection
            .findings
            .retain(|seen| again.findings.contains(seen));
        looks += 1;
    }
    // After an interrupted repair, a copy may have a log of its own, but it is still marked as
    // a copy.
    let copied = snapshotter.store().read()?.copied()?;
    let completeness = match (completeness, copied) {
        (Completeness::Whole, Some(made)) => &Completeness::Copy(made),
        _ => completeness,
    };
    if let Some(what) = incomplete(completeness) {
        let finding = Finding {
            problem: Problem::DatabaseIncomplete { what },
            name: None,
            id: None,
            volume: None,
        };
        inspection.findings.insert(0, finding);
    }
    Ok(inspection)
}

/// Inspects the snapshots once.
fn look(snapshotter: &Snapshotter) -> Result<Inspection> {
    let mut progress = Progress::new("checking");
    snapshotter.inspect(|done, all| progress.show(done, all))
}

fn incomplete(completeness: &Completeness) -> Option<String> {
    match completeness {
        Completeness::Whole => None,
        Completeness::LogMissing => Some(
            "the database was in use, and its log with the latest changes is missing or empty"
                .to_owned(),
        ),
        Completeness::Copy(made) | Completeness::CopyWithLog(made) => Some(format!(
            "the database is a copy of an earlier state, made {made}"
        )),
    }
}

/// Makes the writable directory a new volume that replaces the missing writable volume.
fn give_up(
    config: &Config,
    options: &CheckOptions,
    volumes: Volumes,
    store: &Store,
) -> Result<Volumes> {
    let question = format!(
        "Everything that containers have written on the writable volume is given up, and {} \
         becomes a new writable volume.",
        config.writable
    );
    if !asked(options, &question)? {
        return Err(Error::refused("nothing was changed"));
    }
    let mount_options = config.options.overlay_options(false);
    writable::give_up(&volumes, store, &mount_options)?;
    let root = Image::open_existing_root(&config.root)?;
    let anew = Volumes::new(Image::open(root)?, config.writable.clone());
    writable::set_up(&anew, store, Lifetime::Lasting, &mount_options)?;
    Ok(anew)
}

fn asked(options: &CheckOptions, question: &str) -> Result<bool> {
    if options.mending == Mending::AtOnce {
        return Ok(true);
    }
    if !std::io::stdin().is_terminal() {
        return Err(Error::refused(
            "the command cannot ask whether to go on, because standard input is not a terminal: \
             give --yes with --repair or --reset-writable",
        ));
    }
    print!("\n{question}\nGo on? [y/N] ");
    let mut answer = String::new();
    std::io::stdout()
        .flush()
        .and_then(|()| std::io::stdin().lock().read_line(&mut answer))
        .map_err(|error| Error::caused(ErrorKind::Internal, "ask", error))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
