//! How long a Commit takes, and how much of that is the disk's.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::client::Client;
use crate::support::daemon::{Daemon, command};
use crate::support::disk::Disk;
use crate::{ROUNDS, median};

/// How a layer is filled before its commit.
#[derive(Clone, Copy)]
enum Fill {
    /// This number of bytes of data.
    Data(u64),
    /// A file of this length that is one hole.
    Hole(u64),
}

/// Commits of a container's snapshot, by its size.
pub fn of_a_container() {
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

/// How many bytes per second of the next benchmark's layer are unpacked.
const PACE: u64 = 100 << 20;
/// The size of that layer.
const LAYER: u64 = 1 << 30;

/// A layer that is unpacked at the pace of a good connection: with the
/// background flush, and, if the daemon does not recognise the unpack, with the
/// kernel's flushes only.
pub fn of_an_unpacked_layer() {
    let (image, writable) = (Disk::ext4(4 * 1024), Disk::ext4(1024));
    let daemon = Daemon::start(&command(&image, &writable, &[]));
    let client = daemon.client();
    println!(
        "\nCommit of a layer of {} MiB, unpacked at {} MiB/s, median of {ROUNDS}, milliseconds\n",
        LAYER >> 20,
        PACE >> 20
    );
    let volume = "containerd.io/snapshot/overlay-read-write-splitting.volume";
    for (what, key, labels) in [
        ("flushed while unpacking", "extract-1 layer", &[][..]),
        (
            "flushed by the commit alone",
            "layer-key",
            &[(volume, "image")],
        ),
    ] {
        let taken = median(|| unpack(&client, &image, key, labels));
        println!("{what:<28} {taken:>14.2}");
    }
}

fn unpack(client: &Client, disk: &Disk, key: &str, labels: &[(&str, &str)]) -> Duration {
    client.prepare(key, "", labels).unwrap();
    let newest = std::fs::read_dir(disk.path().join("root/snapshots"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .max()
        .unwrap();
    let begun = Instant::now();
    let block = vec![1; 1 << 20];
    for number in 0..LAYER >> 20 {
        let mut file = File::create(newest.join(format!("fs/{number}"))).unwrap();
        file.write_all(&block).unwrap();
        let due = Duration::from_secs_f64(((number + 1) << 20) as f64 / PACE as f64);
        std::thread::sleep(due.saturating_sub(begun.elapsed()));
    }
    let begun = Instant::now();
    client.commit(key, "layer", &[]).unwrap();
    let taken = begun.elapsed();
    client.remove("layer").unwrap();
    client.cleanup().unwrap();
    disk.sync();
    taken
}

/// Fills a snapshot, flushes the disk first or not, and returns the duration of
/// the commit alone.
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
