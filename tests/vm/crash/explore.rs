//! Looking at each state: what a daemon does with it.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::thread;
use std::time::Instant;

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;

use super::Case;
use super::disks::{Disks, Event, Format};
use super::record;
use super::states::{self, Replay};
use crate::support::daemon::Daemon;
use crate::support::random::Random;
use crate::verify::{Verdict, problem_of, verify};

/// After this number of wrong states, no more are looked at.
const MOST_WRONG: usize = 5;

/// The result of looking at all states.
pub struct Explored {
    pub summary: String,
    /// What is wrong, with the position of the state.
    pub findings: Vec<String>,
}

/// Records a load and looks at its states, in a thread with mounts of its own. A
/// process that copies the host's mounts at that moment would otherwise keep a
/// disk's file system in use.
pub fn explore(
    case: &Case,
    format: &'static Format,
    seed: u64,
    count: usize,
    files: [&Path; 2],
) -> Explored {
    let explored = thread::scope(|scope| {
        let exploring = scope.spawn(|| {
            #[allow(deprecated)]
            rustix::thread::unshare(UnshareFlags::NEWNS).unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private).unwrap();
            look_at_all(case, format, seed, count, files)
        });
        exploring.join()
    });
    explored.unwrap_or_else(|panic| resume_unwind(panic))
}

fn look_at_all(
    case: &Case,
    format: &'static Format,
    seed: u64,
    count: usize,
    files: [&Path; 2],
) -> Explored {
    let disks = Disks::new(format);
    let begun = Instant::now();
    let [moves, healings] = record::load(&disks, case, seed, count / 2);
    let recorded = begun.elapsed();
    let events = disks.rewind();
    let is_flush = |event: &&Event| matches!(event, Event::Flush { .. });
    let flushes = events.iter().filter(is_flush).count();
    let states = states::choose(&events, count, &mut Random::new(seed));
    let mut replay = Replay::new(events, disks.content.clone());

    let (mut tried, mut layers, mut wrong, mut findings) = (0, 0, 0, Vec::new());
    for state in &states {
        replay.show(state);
        let verdict = look(&disks, case, seed, &replay);
        tried += 1;
        layers += verdict.layers;
        if verdict.findings.is_empty() {
            continue;
        }
        wrong += 1;
        if case.wrong.is_none() && wrong == 1 {
            replay.show(state);
            disks.content.lock().save(files);
        }
        let describe = |finding| format!("--seed {seed}, {state}: {finding}");
        findings.extend(verdict.findings.into_iter().map(describe));
        let is_found = |words| findings.iter().any(|one: &String| one.contains(words));
        if case.wrong.map_or(wrong == MOST_WRONG, is_found) {
            break;
        }
    }
    let summary = format!(
        "--seed {seed}: {flushes} flushes, {moves} moves and {healings} healings recorded in {:.1} \
         s, {tried} states tried, {wrong} wrong, {layers} layers verified, {} s",
        recorded.as_secs_f64(),
        begun.elapsed().as_secs()
    );
    Explored { summary, findings }
}

/// Starts a daemon on the contents of the disks, and compares. An unexpected
/// failure is a panic.
fn look(disks: &Disks, case: &Case, seed: u64, replay: &Replay) -> Verdict {
    let looked = catch_unwind(AssertUnwindSafe(|| try_to_look(disks, case, seed, replay)));
    disks.unmount();
    let problem = match looked {
        Ok(Ok(verdict)) => return verdict,
        Ok(Err(problem)) => problem,
        Err(panic) => match panic.downcast_ref::<String>() {
            Some(text) => text.clone(),
            None => "a panic".to_owned(),
        },
    };
    Verdict {
        findings: vec![problem],
        ..Verdict::default()
    }
}

fn try_to_look(disks: &Disks, case: &Case, seed: u64, replay: &Replay) -> Result<Verdict, String> {
    disks.mount()?;
    let places = case.places(disks);
    let mut looking = places.clone();
    // Nothing may move during the comparison.
    looking.extend(["--relocate", "never", "--upperdir-label"].map(str::to_owned));
    let mut daemon = Daemon::try_start(&looking)?;
    let mut verdict = verify(&daemon.client(), seed, &mut replay.history.clone());
    daemon.stop();
    // No directory with files may have lost its snapshot.
    let log = daemon.log();
    let set_aside = log.lines().filter(|line| line.contains("is set aside as"));
    verdict.findings.extend(set_aside.map(str::to_owned));
    if verdict.findings.is_empty() {
        verdict.findings.extend(problem_of(&places));
    }
    Ok(verdict)
}
