//! The load that is recorded, during several lives of the daemon.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use super::Case;
use super::disks::Disks;
use crate::content;
use crate::load::{Load, snapshot};
use crate::model::{History, Record};
use crate::support::client::Client;
use crate::support::daemon::Daemon;

/// How often the daemon is started, at least.
const LIVES: u32 = 7;
/// There are up to as many lives more until so many layers have moved, and for the control of
/// healing as many have healed.
const LEAST: usize = 2;
/// The steps of a move at which a daemon is killed.
const STEPS: [&str; 6] = [
    "begun",
    "copied",
    "durable",
    "exchanged",
    "recorded",
    "trashed",
];

/// How a life of the daemon ends.
enum End {
    /// SIGTERM, with nothing under way.
    Stop,
    /// SIGTERM in the middle of requests.
    Term,
    /// SIGKILL in the middle of requests.
    Kill,
    /// SIGKILL at that step.
    Step(&'static str),
}

/// Loads a daemon until this number of flushes is recorded, without those of its
/// starts. Returns how many layers have moved, and how many have healed.
pub fn load(disks: &Disks, case: &Case, seed: u64, flushes: usize) -> [usize; 2] {
    disks.mount().unwrap();
    let history = Mutex::new(History::default());
    let say = |record: Record| {
        history.lock().unwrap().take(record.clone());
        disks.content.mark(record);
    };
    let left_out = [("SNAPSHOTTER_LEFT_OUT", case.left_out)];
    let mut random = content::random(seed, case.name);
    let mut daemon = Daemon::start_in(&arguments(disks, case, 0), &left_out);
    let count = |daemon: &Daemon| {
        let log = daemon.log();
        [" bytes copied in ", " has healed"].map(|words| log.matches(words).count())
    };
    for boot in 0..2 * LIVES {
        let [moves, healings] = count(&daemon);
        let has_healed = case.left_out != "heal" || healings >= LEAST;
        if boot >= LIVES && moves >= LEAST && has_healed {
            break;
        }
        let end = match random.below(4) {
            // No layer can move in the first life.
            _ if boot == 0 => End::Stop,
            0 => End::Term,
            1 => End::Kill,
            _ => End::Step(STEPS[random.index(STEPS.len())]),
        };
        if boot > 0 {
            daemon.set_arguments(arguments(disks, case, boot));
            let settled = |daemon: &Daemon| settle(&daemon.client(), &history, &say);
            let lives = match end {
                End::Step(step) => daemon.restart_perhaps_to_die_at(step) && settled(&daemon),
                _ => false,
            };
            if !lives {
                daemon.kill();
                daemon.restart();
                assert!(settled(&daemon), "{}", daemon.log());
            }
        }
        let load = Load {
            seed,
            boot,
            most_layers: 8,
            most_active: 4,
            healings: if case.left_out == "heal" { 50 } else { 10 },
            has_quotas: disks.format.has_quotas(),
        };
        let goal = disks.content.flushes() + flushes / LIVES as usize;
        let is_reached = || disks.content.flushes() >= goal;
        let address = daemon.address().to_owned();
        thread::scope(|scope| {
            let is_over = || matches!(end, End::Stop) && is_reached();
            let loading = scope.spawn(move || load.run(&address, &say, &is_over));
            let wait_for = |goal| {
                while disks.content.flushes() < goal && !loading.is_finished() {
                    thread::sleep(Duration::from_millis(1));
                }
            };
            if boot == 0 && case.wrong.is_some() {
                // A database that is never flushed would be lost as a whole in each state.
                // One that goes back by a whole life is refused at the start.
                wait_for(goal - flushes / LIVES as usize / 2);
                disks.flush();
            }
            wait_for(goal);
            match end {
                End::Stop => {}
                End::Term => daemon.terminate(),
                End::Kill | End::Step(_) => daemon.kill(),
            }
        });
        match end {
            End::Stop => daemon.stop(),
            End::Term => assert!(daemon.wait().success()),
            End::Kill | End::Step(_) => {}
        }
    }
    disks.unmount();
    count(&daemon)
}

fn arguments(disks: &Disks, case: &Case, boot: u32) -> Vec<String> {
    let mut arguments = case.places(disks);
    let relocate_after = if boot % 3 == 2 { "1" } else { "0" };
    let flags = ["--sync", case.sync, "--relocate-after", relocate_after];
    arguments.extend(flags.map(str::to_owned));
    if boot % 3 == 1 {
        arguments.push("--async-remove=false".to_owned());
    }
    arguments
}

/// A request that was under way when the daemon ended may be done or not. From now
/// on, what the daemon's next life shows counts as acknowledged. Returns `false`
/// if that life has ended as well.
fn settle(client: &Client, history: &Mutex<History>, say: &dyn Fn(Record)) -> bool {
    let History {
        state, under_way, ..
    } = history.lock().unwrap().clone();
    let Ok(all) = client.list_pages(&[]) else {
        return false;
    };
    let found: BTreeMap<_, _> = all
        .iter()
        .flatten()
        .map(|info| (info.name.clone(), snapshot(info)))
        .collect();
    for (thread, request) in under_way {
        let mut after = state.clone();
        request.apply(&mut after);
        let is_done = request
            .keys()
            .iter()
            .all(|key| after.get(*key) == found.get(*key));
        say(match is_done {
            true => Record::Done(thread),
            false => Record::NotDone(thread),
        });
    }
    true
}
