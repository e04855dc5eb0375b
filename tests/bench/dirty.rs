//! An import beside another program that has written much to the same disk.

use std::fs;
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use crate::support::containerd::Containerd;
use crate::support::daemon::Split;
use crate::support::slow::{SlowDisks, Speed};

const DIRTY: usize = 1500 << 20;

/// How long the import takes, and how long a change of containerd's own database waits
/// meanwhile: containerd holds its lock during a Commit.
pub fn by_another_program() {
    let disks = SlowDisks::new(2048, Speed::default());
    let [image, writable] = disks.format(&["-q", "-F", "-m", "0", "-b", "4096"]);
    let split = Split::on(image, writable, &[]);
    let containerd = Containerd::start(split.daemon.address());
    fs::write(
        split.image.path().join("of-another-program"),
        vec![1; DIRTY],
    )
    .unwrap();
    disks.set_speed(Speed {
        flush: Duration::from_millis(5),
        mebibyte: Duration::from_millis(100),
    });
    let (mut imported, mut slowest) = (Duration::ZERO, Duration::ZERO);
    scope(|scope| {
        let importing = scope.spawn(|| {
            let begun = Instant::now();
            containerd.import();
            begun.elapsed()
        });
        let mut number = 0;
        while !importing.is_finished() {
            number += 1;
            let begun = Instant::now();
            containerd.ctr(&["namespaces", "create", &format!("n{number}")]);
            slowest = slowest.max(begun.elapsed());
            sleep(Duration::from_millis(20));
        }
        imported = importing.join().unwrap();
    });
    disks.set_speed(Speed::default());
    println!(
        "\n{} MiB written by another program, 10 MiB a second, a flush of 5 ms: import of five \
         layers {:.2} s, slowest `ctr namespaces create` {:.2} s",
        DIRTY >> 20,
        imported.as_secs_f64(),
        slowest.as_secs_f64()
    );
}
