//! SIGKILL at any moment, several hundred times, while several clients work and
//! layers move. After each start, everything that was answered is there. A
//! change that was under way is there as a whole or not at all, and there is
//! nothing else, neither in a List nor on the disks.
//!
//! `KILLS` sets the number of kills, and `KILLS_SEED` repeats the choices of a
//! run. Which request a kill hits still depends on the machine.

mod load;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

use overlay_read_write_splitting_snapshotter::proto::snapshots::{Info, Kind};
use overlay_read_write_splitting_snapshotter::types::{LABEL_UPPERDIR, Volume};
use registered::registered;

use crate::support::daemon::{BINARY, Daemon, Split, command};
use crate::support::disk::Disk;
use crate::support::random::{Random, Seed, setting};
use load::{Known, Row, Worker};

const CLIENTS: u64 = 4;
/// After this number of kills, the daemon is stopped and the disks are checked.
const CHECKED_EVERY: u64 = 20;

#[registered(crate::Test)]
fn what_was_answered_is_kept() {
    let seed = Seed::of("KILLS_SEED");
    let kills = setting("KILLS", 200);
    let mut random = seed.random(0);
    let (image, writable) = (Disk::ext4(256), Disk::ext4(256));
    // Moves begin at once, so that they are interrupted as well. The label
    // shows each snapshot's directory.
    let flags = ["--relocate-after", "0", "--upperdir-label"];
    let environment = [("RUST_LOG", "info")];
    let daemon = Daemon::start_in(&command(&image, &writable, &flags), &environment);
    let mut split = Split {
        image,
        writable,
        daemon,
    };
    let mut workers: Vec<_> = (1..=CLIENTS)
        .map(|number| Worker::new(number, seed.random(number)))
        .collect();
    for kill in 1..=kills {
        if random.is_one_in(5) {
            kill_while_starting(&mut split.daemon, &mut random);
        } else {
            kill_at_work(&mut split.daemon, &mut workers, &mut random);
        }
        split.daemon.restart();
        check(&split, &mut workers);
        if kill % CHECKED_EVERY == 0 {
            split.daemon.stop();
            assert_sound(&split);
            split.daemon.restart();
            check(&split, &mut workers);
        }
    }
    split.remove_everything();
    let log = split.daemon.log();
    // No start had to replace a directory either: a kill loses none.
    let bad = ["is lost", "had no whole directory", "ERROR", "panicked"];
    for line in log.lines() {
        assert!(!bad.iter().any(|word| line.contains(word)), "{line}");
    }
    if kills >= 100 {
        assert_all_was_met(&workers, &log);
    }
}

fn kill_at_work(daemon: &mut Daemon, workers: &mut [Worker], random: &mut Random) {
    let is_killing = AtomicBool::new(false);
    thread::scope(|scope| {
        for worker in workers {
            let client = daemon.client();
            let is_killing = &is_killing;
            scope.spawn(move || worker.work(&client, is_killing));
        }
        sleep(Duration::from_millis(random.below(150)));
        // This may fail only after the kill, which the clients wait for.
        let was_running = daemon.is_running();
        is_killing.store(true, Ordering::SeqCst);
        daemon.kill();
        assert!(was_running, "it ended by itself");
    });
}

fn kill_while_starting(daemon: &mut Daemon, random: &mut Random) {
    daemon.kill();
    daemon.begin_restart();
    sleep(Duration::from_millis(random.below(100)));
    assert!(daemon.is_running(), "it ended by itself");
    daemon.kill();
}

/// Fails if `check` finds anything wrong on the disks of a stopped daemon.
fn assert_sound(split: &Split) {
    let output = Command::new(BINARY)
        .arg("check")
        .arg("--root-dir")
        .arg(split.root())
        .arg("--writable-dir")
        .arg(split.writable())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

/// Compares what is listed, and what is on the disks, with what the clients
/// know.
fn check(split: &Split, workers: &mut [Worker]) {
    let client = split.client();
    let (mut listed, mut uppers) = (BTreeMap::new(), BTreeMap::new());
    for info in client.list_pages(&[]).unwrap().into_iter().flatten() {
        let (name, row, upper) = read(info);
        uppers.insert(name.clone(), upper);
        listed.insert(name, row);
    }
    for worker in &mut *workers {
        worker.settle(&mut listed);
    }
    assert!(listed.is_empty(), "nobody's: {listed:?}");

    let known = || workers.iter().flat_map(|worker| &worker.known);
    for (name, known) in known() {
        assert_holds(name, &uppers[name], known);
        if known.row.kind == Kind::ACTIVE {
            client.mounts(name).unwrap();
        }
    }
    let mut owners = [BTreeSet::new(), BTreeSet::new()];
    let mut movable = BTreeSet::new();
    for (name, known) in known() {
        let id = id_of(&uppers[name]);
        let is_layer = known.row.kind == Kind::COMMITTED;
        match known.volume {
            // A layer from the writable volume has an entry here, moved or not,
            // and may have left its old directory for a container.
            Volume::Writable if is_layer => {
                owners[Volume::Image as usize].insert(id.clone());
                movable.insert(id);
            }
            volume => {
                owners[volume as usize].insert(id);
            }
        }
    }
    for (volume, top) in [
        (Volume::Image, split.root()),
        (Volume::Writable, split.writable()),
    ] {
        let entries = || {
            let mut entries = names_in(&top.join("snapshots")).unwrap();
            entries.retain(|entry| match volume {
                Volume::Image => !entry
                    .strip_prefix(".moving-")
                    .is_some_and(|id| movable.contains(id)),
                Volume::Writable => !movable.contains(entry),
            });
            entries
        };
        let owned = &owners[volume as usize];
        // Another test's mount may hold what a removed layer has left.
        let begun = Instant::now();
        while entries() != *owned && begun.elapsed() < Duration::from_secs(60) {
            client.cleanup().unwrap();
            sleep(Duration::from_millis(100));
        }
        assert_eq!(entries(), *owned, "{volume} volume");
    }
}

/// The label was requested for this answer, and is not the snapshot's own.
fn read(info: Info) -> (String, Row, PathBuf) {
    let mut labels: BTreeMap<_, _> = info.labels.into_iter().collect();
    let upper = labels.remove(LABEL_UPPERDIR).expect("a directory");
    let row = Row {
        kind: info.kind.unwrap(),
        parent: info.parent,
        labels,
    };
    (info.name, row, PathBuf::from(upper))
}

/// `<id>` of `<volume>/snapshots/<id>/fs`.
fn id_of(upper: &Path) -> String {
    let id = upper.parent().and_then(Path::file_name).unwrap();
    id.to_str().unwrap().to_owned()
}

/// Fails unless these are exactly the files that were written.
fn assert_holds(name: &str, upper: &Path, known: &Known) {
    let holds = || -> io::Result<bool> {
        let expected: BTreeSet<_> = known.files.keys().cloned().collect();
        let mut is_same = names_in(upper)? == expected;
        for (file, written) in &known.files {
            is_same &= fs::read(upper.join(file))? == written.content();
        }
        Ok(is_same)
    };
    let mut is_same = holds();
    if known.row.kind == Kind::COMMITTED && !matches!(is_same, Ok(true)) {
        // A layer that moves just now may have been deleted in its old place
        // between two looks.
        is_same = holds();
    }
    assert!(
        matches!(is_same, Ok(true)),
        "{name}: {is_same:?}: {} holds {:?}, expected {:?}",
        upper.display(),
        names_in(upper),
        known.files
    );
}

fn names_in(directory: &Path) -> io::Result<BTreeSet<String>> {
    fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().into_string().unwrap()))
        .collect()
}

/// Fails if there was no load, or the kills hit nothing.
fn assert_all_was_met(workers: &[Worker], log: &str) {
    for worker in workers {
        let answered = &worker.answered;
        let counts = [
            answered.prepares,
            answered.commits,
            answered.removes,
            answered.updates,
            answered.cleanups,
            answered.cut,
        ];
        assert!(!counts.contains(&0), "{answered:?}");
    }
    let done: u64 = workers
        .iter()
        .map(|worker| worker.answered.cut_but_done)
        .sum();
    let cut: u64 = workers.iter().map(|worker| worker.answered.cut).sum();
    assert!(0 < done && done < cut, "{done} of {cut} had been done");
    for met in [
        "moved to the image volume: ",
        "dropped the leftovers of an unfinished move",
        "its snapshot was removed before the daemon stopped",
        "it is empty and belongs to no snapshot",
    ] {
        assert!(log.contains(met), "never: {met}");
    }
}
