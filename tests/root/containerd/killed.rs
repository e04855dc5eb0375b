//! The daemon is killed by SIGKILL again and again, while containerd works with
//! it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use registered::registered;

use super::{layers, left};
use crate::support::containerd::{AtEnd, Containerd, IMAGE, wait_for};
use crate::support::daemon::Split;
use crate::support::random::Random;

/// The results of the rounds of containerd's work: how often each step was
/// done, and the errors of the other times.
#[derive(Debug, Default)]
struct Work {
    done: [u32; 6],
    refusals: Vec<String>,
}

fn work_until(is_over: &AtomicBool, refusals: &AtomicUsize, containerd: &Containerd) -> Work {
    let mut work = Work::default();
    for round in 0.. {
        if is_over.load(Ordering::Relaxed) {
            break;
        }
        let (id, layer, next) = (
            format!("web-{round}"),
            format!("layer-{round}"),
            format!("next-{round}"),
        );
        let steps = [
            containerd.try_import(),
            // Large enough to be moved while it is in use.
            containerd.try_start(&id, "head -c 4194304 /dev/zero >/written"),
            containerd.try_ctr(&["snapshot", "commit", &layer, &id]),
            containerd.try_ctr(&["snapshot", "prepare", &next, &layer]),
            containerd.try_run(&format!("{id}-short"), "echo written >/written"),
            // The image is removed so that the next round has something to
            // unpack.
            containerd.try_ctr(&["image", "rm", "--sync", IMAGE]),
        ];
        for (step, done) in steps.into_iter().zip(&mut work.done) {
            match step {
                Ok(_) => *done += 1,
                Err(said) => {
                    work.refusals.push(said);
                    refusals.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        let _ = containerd.try_ctr(&["task", "rm", "--force", &id]);
        for key in [&id, &next, &layer] {
            let _ = containerd.try_ctr(&["container", "rm", key]);
            let _ = containerd.try_ctr(&["snapshot", "rm", key]);
        }
    }
    work
}

/// Removes all containers, images and snapshots that containerd knows.
fn remove_everything(containerd: &Containerd) {
    for list in ["task", "container"] {
        let names = containerd.ctr(&[list, "ls", "--quiet"]);
        for name in names.lines() {
            let force: &[&str] = if list == "task" { &["--force"] } else { &[] };
            containerd.ctr(&[&[list, "rm"], force, &[name]].concat());
        }
    }
    containerd.ctr(&["image", "rm", "--sync", IMAGE]);
    // Children are removed first.
    wait_for("end of removals", || {
        let snapshots = containerd.snapshots();
        for listed in &snapshots {
            let _ = containerd.try_ctr(&["snapshot", "rm", &listed.key]);
        }
        snapshots.is_empty().then_some(()).ok_or(snapshots)
    });
}

#[registered(crate::Test)]
fn a_daemon_killed_at_any_moment_goes_on() {
    // Layers of containers move at once, so that moves are interrupted as well.
    let mut split = Split::start(&["--relocate-after", "0"]);
    let containerd = Containerd::start(split.daemon.address());
    // The kills should come a few times during each import.
    let begun = Instant::now();
    containerd.import();
    let import = begun.elapsed();
    let (is_over, refusals) = (AtomicBool::new(false), AtomicUsize::new(0));
    let work = std::thread::scope(|scope| {
        let worker = scope.spawn(|| work_until(&is_over, &refusals, &containerd));
        let end = AtEnd(|| is_over.store(true, Ordering::Relaxed));
        let mut random = Random::new(1);
        let begun = Instant::now();
        // On a busy machine, the daemon is idle most of the time, so this waits
        // until a kill has hit a request.
        let is_due = || match refusals.load(Ordering::Relaxed) {
            0 => begun.elapsed() > Duration::from_secs(180),
            _ => begun.elapsed() > Duration::from_secs(20),
        };
        while !is_due() && !worker.is_finished() {
            let percent = u32::try_from(30 + random.below(120)).unwrap();
            std::thread::sleep(import * percent / 100);
            // After a refused connection, containerd does not try again for a
            // second or more, and the daemon would be idle all that time.
            containerd.freeze_while(|| {
                split.daemon.kill();
                split.daemon.restart();
            });
        }
        drop(end);
        worker.join().unwrap()
    });
    // Every step was done at times, some were interrupted, and others failed
    // because of that.
    assert!(!work.done.contains(&0), "{work:#?}");
    let is_expected = |said: &String| said.contains("unavailable") || said.contains("not found");
    assert!(!work.refusals.is_empty());
    assert!(work.refusals.iter().all(is_expected), "{work:#?}");

    // containerd goes on after all this.
    wait_for("import", || containerd.try_import());
    assert_eq!(layers(&containerd).len(), 5);
    let seen = containerd.run("last", "cat /etc/motd; ls /opt/app");
    assert_eq!(seen, "motd of layer 5\nonly.txt\n");

    // Nothing was lost, and nothing is left.
    remove_everything(&containerd);
    containerd.collect_garbage();
    assert_eq!(split.client().names(&[]).unwrap(), [""; 0]);
    wait_for("end of a move that was going on", || {
        split.client().cleanup().unwrap();
        let left = left(&split);
        left.is_empty().then_some(()).ok_or(left)
    });
    let log = split.daemon.log();
    let bad: Vec<_> = log
        .lines()
        .filter(|line| line.contains("is lost") || line.contains("ERROR"))
        .collect();
    assert!(bad.is_empty(), "{bad:#?}");
}
