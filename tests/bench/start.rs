//! How long a start takes, by the number of snapshots.

use std::thread;

use crate::support::daemon::{Daemon, command};
use crate::support::disk::Disk;
use crate::{ROUNDS, median};

/// The time from the start of the program to its readiness, as it logs it, with
/// this number of snapshots: one half layers, the other half containers on
/// them.
pub fn with_snapshots() {
    let (image, writable) = (Disk::ext4(1024), Disk::ext4(1024));
    let mut daemon = Daemon::start(&command(&image, &writable, &["--sync", "none"]));
    println!("\nFrom the program's beginning to ready, median of {ROUNDS}, milliseconds\n");
    for snapshots in [0, 10_000] {
        populate(&daemon, snapshots / 2);
        for (how, restart) in [
            ("after a stop", Daemon::stop as fn(&mut Daemon)),
            ("after a kill", Daemon::kill),
        ] {
            let taken = median(|| {
                restart(&mut daemon);
                daemon.restart();
                ready_after(&daemon)
            });
            println!("{snapshots:>6} snapshots, {how:<14} {taken:>8.0}");
        }
    }
}

fn ready_after(daemon: &Daemon) -> std::time::Duration {
    let log = daemon.log();
    let line = log
        .lines()
        .rfind(|line| line.contains("serving on"))
        .unwrap();
    let (_, rest) = line.split_once(" after ").unwrap();
    let (milliseconds, _) = rest.split_once(" ms").unwrap();
    std::time::Duration::from_millis(milliseconds.parse().unwrap())
}

fn populate(daemon: &Daemon, pairs: usize) {
    const CLIENTS: usize = 8;
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || {
                let api = daemon.client();
                for number in (client..pairs).step_by(CLIENTS) {
                    let (key, name) = (format!("extract-{number}"), format!("layer-{number}"));
                    api.prepare(&key, "", &[]).unwrap();
                    api.commit(&key, &name, &[]).unwrap();
                    api.prepare(&format!("web-{number}"), &name, &[]).unwrap();
                }
            });
        }
    });
}
