//! The command `check`: do the database and the disks agree, and if not, what
//! can be done about it.
//!
//! Owns: the order of looking, telling, asking and mending. Never: what is wrong
//! with a snapshot, or how it is mended; that is the snapshotter's. Beside a
//! running daemon it only reads; to mend, or to heal, it takes the root's lock.

mod deep;
mod report;

use std::io::{BufRead, IsTerminal, Write};
use std::thread;
use std::time::Duration;

use crate::commands::progress::Progress;
use crate::config::{CheckOptions, Config, Depth, Format, Mending};
use crate::error::{Error, ErrorKind, Result};
use crate::mount::ByHand;
use crate::root::lock::Lock;
use crate::root::open::{Purpose, Visit, visit};
use crate::root::writable;
use crate::snapshotter::{Finding, Inspection, Problem, Snapshotter};
use crate::store::{Completeness, Store};
use crate::util::descriptors;
use crate::volume::{Identity, Image, Lifetime, Volumes};
use report::CheckReport;

/// How often a finding must be seen beside a running daemon, whose own work
/// looks like one for a moment, and how long apart.
const LOOKS: u32 = 3;
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);

/// Checks, repairs if that is asked for, and prints a report. Returns whether database
/// and disks agree in the end.
pub fn run(config: &Config, options: CheckOptions) -> Result<bool> {
    descriptors::raise_limit();
    let mends = options.mending != Mending::Never || options.depth == Depth::Heal;
    let purpose = if mends {
        Purpose::Change
    } else {
        Purpose::Look
    };
    let Visit {
        // Held to the end: no daemon starts on what is being looked at.
        lock,
        completeness,
        store,
        volumes,
    } = visit(config, purpose)?;
    let identity = store.read()?.fact(Identity::FACT)?;
    let by_hand = ByHand::of_root(identity.as_deref())?;
    if mends && let Some(ByHand { id, point, .. }) = by_hand.first() {
        return Err(Error::refused(format!(
            "snapshot {id} is mounted by hand at {}, and a repair may remove its files: unmount it first",
            point.display()
        )));
    }
    let volumes = match options.resets_writable {
        false => volumes,
        true => give_up(config, &options, volumes, &store)?,
    };
    let snapshotter = Snapshotter::new(store, volumes, config.options.for_this_kernel());

    let inspection = inspect(&snapshotter, &completeness, lock.is_none())?;
    if options.depth != Depth::Counts {
        return look_deep(&snapshotter, &completeness, lock, inspection, &options);
    }
    let doomed = snapshotter.doomed(&inspection.findings)?;
    let mut report = CheckReport::new(lock.is_none(), inspection, doomed, None);
    if !mends || report.is_clean() {
        report.print(options.format);
        return Ok(report.is_clean());
    }
    if options.format == Format::Human {
        report.print(options.format);
    }
    if !asked(&options, &report.question())? {
        return Ok(false);
    }
    snapshotter.repair(report.findings())?;
    report.mended(look(&snapshotter)?);
    report.print(options.format);
    Ok(report.is_clean())
}

/// Compares layers with containerd's content, heals them if that is asked for, and prints
/// the report of that with that of the counts.
fn look_deep(
    snapshotter: &Snapshotter,
    completeness: &Completeness,
    lock: Option<Lock>,
    mut inspection: Inspection,
    options: &CheckOptions,
) -> Result<bool> {
    let is_running = lock.is_none();
    let _lock = match options.depth {
        Depth::Heal => {
            require_latest(&inspection)?;
            lock
        }
        // It may take hours, and a daemon may start meanwhile.
        _ => None,
    };
    let mut deep = deep::run(snapshotter, &inspection.findings, options)?;
    if options.depth == Depth::Heal {
        inspection = inspect(snapshotter, completeness, is_running)?;
    }
    // The same damage is named once.
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

/// A directory of a layer is only replaced if the database knows what it is.
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
            "{finding}: nothing is healed before that is repaired, because a directory may be \
             another snapshot's"
        ))),
    }
}

/// What is found, as often as need be to leave out the daemon's own work.
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
    // A repair that was cut short may have given it a log, which then says so.
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

/// Looks once.
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

/// Takes the writable directory as a new volume in the place of the missing one.
fn give_up(
    config: &Config,
    options: &CheckOptions,
    volumes: Volumes,
    store: &Store,
) -> Result<Volumes> {
    let question = format!(
        "Everything that containers have written on the writable volume is given up, and {} \
         becomes a new one.",
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
            "nobody is there to be asked: give --yes with --repair",
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
