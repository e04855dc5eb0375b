//! What the flush of a slow disk means for requests, directly after a start and
//! later.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use crate::fuse::{DISKS, Devices, Served};
use crate::support::client::Client;
use crate::support::daemon::{Daemon, command};
use crate::support::disk::Disk;

const BYTES: usize = 256 << 20;
/// How many requests count as the first after a start.
const FIRST: usize = 100;
const CALLERS: usize = 8;

/// Two disks in memory whose flushes take this long.
struct Slow {
    disks: [Mutex<Vec<u8>>; DISKS],
    flush: Duration,
}

impl Devices for Slow {
    fn size(&self) -> u64 {
        BYTES as u64
    }

    fn read(&self, disk: usize, offset: usize, length: usize) -> Vec<u8> {
        let bytes = self.disks[disk].lock().unwrap();
        let end = BYTES.min(offset + length);
        bytes[offset.min(end)..end].to_vec()
    }

    fn write(&self, disk: usize, offset: usize, bytes: &[u8]) {
        self.disks[disk].lock().unwrap()[offset..][..bytes.len()].copy_from_slice(bytes);
    }

    fn flush(&self, _: usize) {
        sleep(self.flush);
    }
}

/// Prepare, View and Remove on disks that flush in 1, 5 and 12 ms.
pub fn with_slow_flushes() {
    println!(
        "\nRequests on disks whose flush takes so many milliseconds. One caller: median and 99th\n\
         percentile, milliseconds; {CALLERS} callers: requests a second. First: the first {FIRST} \
         after a start\n"
    );
    println!(
        "{:>5} {:<8} {:<14} {:>12} {:>12} {:>8} {:>8}",
        "flush", "request", "8 callers", "first p50", "p99", "p50", "p99"
    );
    for flush in [1, 5, 12] {
        on_disks(Duration::from_millis(flush));
    }
}

fn on_disks(flush: Duration) {
    let dir = tempfile::tempdir().unwrap();
    let slow = Slow {
        disks: std::array::from_fn(|_| Mutex::new(vec![0; BYTES])),
        flush,
    };
    let served = Served::mount(Arc::new(slow), dir.path());
    let disk = |number| {
        let arguments = ["-q", "-F", "-m", "0", "-b", "4096"];
        Disk::on(&served.file(number), "ext4", &arguments)
    };
    let (image, writable) = (disk(0), disk(1));
    let mut daemon = Daemon::start(&command(&image, &writable, &["--sync", "none"]));
    let client = daemon.client();
    client.prepare("extract", "", &[]).unwrap();
    client.commit("extract", "base", &[]).unwrap();
    await_log(&image.path());
    for round in 0..4 * FIRST {
        client
            .prepare(&format!("old-{round}"), "base", &[])
            .unwrap();
    }
    for (name, request) in [
        ("Prepare", prepare as fn(&Client, usize)),
        ("View", view),
        ("Remove", remove),
    ] {
        daemon.stop();
        daemon.restart();
        let first = measure(&daemon, request, 0..FIRST);
        if name != "Remove" {
            measure(&daemon, request, 4 * FIRST..8 * FIRST);
        }
        let later = measure(&daemon, request, FIRST..2 * FIRST);
        let rate = together(&daemon, request, 2 * FIRST..4 * FIRST);
        println!(
            "{:>5} {name:<8} {rate:>12.0}/s {:>12.2} {:>12.2} {:>8.2} {:>8.2}",
            flush.as_millis(),
            first.0,
            first.1,
            later.0,
            later.1
        );
    }
}

fn await_log(root: &Path) {
    let log = root.join("root/metadata.db-wal");
    while std::fs::metadata(&log).unwrap().len() < 4 << 20 {
        sleep(Duration::from_millis(10));
    }
}

fn prepare(client: &Client, number: usize) {
    let key = format!("new-{number}");
    client.prepare(&key, "base", &[]).unwrap();
}

fn view(client: &Client, number: usize) {
    client.view(&format!("view-{number}"), "base", &[]).unwrap();
}

fn remove(client: &Client, number: usize) {
    client.remove(&format!("old-{number}")).unwrap();
}

/// The median and the 99th percentile of one caller, in milliseconds.
fn measure(
    daemon: &Daemon,
    request: fn(&Client, usize),
    numbers: std::ops::Range<usize>,
) -> (f64, f64) {
    let client = daemon.client();
    client.stat("base").unwrap();
    let mut times: Vec<_> = numbers
        .map(|number| {
            let begun = Instant::now();
            request(&client, number);
            begun.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

/// The requests per second of several callers.
fn together(daemon: &Daemon, request: fn(&Client, usize), numbers: std::ops::Range<usize>) -> f64 {
    let count = numbers.len();
    let begun = Instant::now();
    scope(|scope| {
        for caller in 0..CALLERS {
            let numbers = numbers.clone().skip(caller).step_by(CALLERS);
            scope.spawn(move || {
                let client = daemon.client();
                numbers.for_each(|number| request(&client, number));
            });
        }
    });
    count as f64 / begun.elapsed().as_secs_f64()
}
