//! The benchmark: `cargo test --release --test bench`, as root. Prints a table
//! and asserts nothing about time: machines differ, compare ratios in one run.

#![allow(clippy::unwrap_used)]

#[path = "../root/support/mod.rs"]
mod support;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use support::client::Client;
use support::daemon::{Daemon, command};
use support::disk::Disk;

const ROUNDS: usize = 5;

/// How a layer is filled before its commit.
#[derive(Clone, Copy)]
enum Fill {
    /// That many bytes of data.
    Data(u64),
    /// A file of that many bytes that is one hole.
    Hole(u64),
}

fn main() {
    assert!(
        rustix::process::geteuid().is_root(),
        "the benchmark mounts disks: run it as root"
    );
    let (image, writable) = (Disk::ext4(1024), Disk::ext4(12 * 1024));
    println!("Commit of a snapshot on the writable volume, median of {ROUNDS}, milliseconds\n");
    println!("{:<28} {:>14} {:>14}", "", "data flushed", "data dirty");
    for sync in ["commit", "none"] {
        let flags = ["--sync", sync, "--relocate", "never"];
        let mut daemon = Daemon::start(&command(&image, &writable, &flags));
        let client = daemon.client();
        for (what, fill) in [
            ("1 MB", Fill::Data(1 << 20)),
            ("4 GB, sparse", Fill::Hole(4 << 30)),
            ("4 GB", Fill::Data(4 << 30)),
        ] {
            let flushed = median(|| commit(&client, &writable, fill, true));
            let dirty = median(|| commit(&client, &writable, fill, false));
            println!("--sync {sync:<8} {what:<12} {flushed:>14.2} {dirty:>14.2}");
        }
        daemon.stop();
    }
}

fn median(mut measure: impl FnMut() -> Duration) -> f64 {
    let mut times: Vec<Duration> = (0..ROUNDS).map(|_| measure()).collect();
    times.sort();
    times[ROUNDS / 2].as_secs_f64() * 1e3
}

/// Fills a snapshot, flushes the disk first or not, and times its commit alone.
fn commit(client: &Client, disk: &Disk, fill: Fill, flush_first: bool) -> Duration {
    let mounts = client.prepare("key", "", &[]).unwrap();
    let mut file = File::create(Path::new(&mounts[0].source).join("file")).unwrap();
    match fill {
        Fill::Data(bytes) => {
            let block = vec![1; 1 << 20];
            for _ in 0..bytes >> 20 {
                file.write_all(&block).unwrap();
            }
        }
        Fill::Hole(bytes) => file.set_len(bytes).unwrap(),
    }
    drop(file);
    if flush_first {
        disk.sync();
    }
    let begun = Instant::now();
    client.commit("key", "layer", &[]).unwrap();
    let taken = begun.elapsed();
    client.remove("layer").unwrap();
    client.cleanup().unwrap();
    disk.sync();
    taken
}
