//! What a disk's flush makes of requests, imports and containers, beside the snapshotter
//! that is built into containerd.

use std::process::Command;
use std::time::{Duration, Instant};

use crate::images;
use crate::support::containerd::{Containerd, IMAGE};
use crate::support::daemon::Daemon;
use crate::support::disk::Disk;
use crate::support::slow::{SlowDisks, Speed};

/// Of imports and containers; one round takes two minutes on slow disks.
const ROUNDS: usize = 3;
const RUNS: usize = 5;
/// The image disk has room for the inodes of all that is imported.
const MKFS: [&str; 9] = [
    "-q",
    "-F",
    "-m",
    "0",
    "-b",
    "4096",
    "-i",
    "8192",
    "-Elazy_itable_init=0,lazy_journal_init=0",
];

/// Disks and how long a flush takes there.
struct Pair {
    name: &'static str,
    image: Disk,
    writable: Disk,
    /// What they are made of; dropped after them.
    _slow: Option<SlowDisks>,
}

/// Prints all tables. `COMPARE` names the program of `tests/compare`.
pub fn beside_the_built_in() {
    let program = std::env::var("COMPARE").expect("run it by: sudo sh tests/bench.sh --slow");
    let flushes = [("plain", 0), ("1 ms", 1), ("5 ms", 5), ("12 ms", 12)];
    let pairs = flushes.map(|(name, flush)| pair(name, Duration::from_millis(flush)));
    let mut compare = Command::new(program);
    compare.args(["-slow", "-daemon"]);
    compare.arg(env!(
        "CARGO_BIN_EXE_overlay-read-write-splitting-snapshotter"
    ));
    for pair in &pairs {
        compare.args([pair.name, &pair.image.text(), &pair.writable.text()]);
    }
    assert!(compare.status().unwrap().success());
    println!(
        "\nThrough containerd, seconds, median of {ROUNDS}; in brackets the smallest and the \
         largest ratio to the built-in.\n"
    );
    println!(
        "{:<38}{:>9}{:>8}  {:<18}{:>8}  {:<18}",
        "", "built-in", "daemon", "ratio", "--sync none", "ratio"
    );
    for pair in pairs
        .iter()
        .filter(|pair| ["plain", "5 ms"].contains(&pair.name))
    {
        through_containerd(pair);
    }
}

fn pair(name: &'static str, flush: Duration) -> Pair {
    let slow = (!flush.is_zero()).then(|| {
        let mebibyte = Duration::ZERO;
        SlowDisks::new(1024, Speed { flush, mebibyte })
    });
    let [image, writable] = match &slow {
        Some(slow) => slow.format(&MKFS),
        None => [(); 2].map(|()| Disk::make(1024, "ext4", &MKFS)),
    };
    Pair {
        name,
        image,
        writable,
        _slow: slow,
    }
}

/// Imports and containers with the built-in snapshotter and two daemons, in turn.
fn through_containerd(pair: &Pair) {
    let daemons = ["commit", "none"].map(|sync| {
        let root = format!("{}/{sync}", pair.image.text());
        let writable = format!("{}/{sync}", pair.writable.text());
        let arguments = [
            "--root-dir",
            &root,
            "--writable-dir",
            &writable,
            "--sync",
            sync,
        ];
        Daemon::start(&arguments.map(str::to_owned))
    });
    let proxies = [
        ("commit", daemons[0].address()),
        ("none", daemons[1].address()),
    ];
    let containerd = Containerd::start_at(&pair.image.path().join("containerd"), &proxies);
    let directory = tempfile::tempdir().unwrap();
    for (what, name, layers, files) in [
        ("import of 60 layers of 5 files", "split-test", 60, 5),
        ("import of 20 layers of 1,000 files", "many-files", 20, 1000),
    ] {
        let sources = directory.path().join(name);
        std::fs::create_dir(&sources).unwrap();
        let archive = images::archive(&sources, name, layers, files);
        let image = format!("docker.io/library/{name}:latest");
        let import = |snapshotter: &str| {
            let begun = Instant::now();
            let archive = archive.to_str().unwrap();
            containerd.ctr(&["image", "import", "--snapshotter", snapshotter, archive]);
            let taken = begun.elapsed();
            containerd.ctr(&["image", "rm", "--sync", &image]);
            pair.image.sync();
            taken
        };
        print_row(&format!("{}: {what}", pair.name), import);
        if image == IMAGE {
            for snapshotter in SIDES {
                let archive = archive.to_str().unwrap();
                containerd.ctr(&["image", "import", "--snapshotter", snapshotter, archive]);
            }
            let run = |snapshotter: &str| {
                let begun = Instant::now();
                for _ in 0..RUNS {
                    let flags = ["--snapshotter", snapshotter];
                    containerd.try_run_with(&flags, "web", "true").unwrap();
                }
                begun.elapsed() / RUNS as u32
            };
            print_row(&format!("{}: ctr run --rm", pair.name), run);
        }
    }
}

/// The snapshotters, as containerd calls them.
const SIDES: [&str; 3] = ["overlayfs", "commit", "none"];

fn print_row(what: &str, mut measure: impl FnMut(&str) -> Duration) {
    let mut rounds: Vec<[f64; 3]> = Vec::new();
    for round in 0..ROUNDS {
        let mut times = [0.0; 3];
        // Each of them is the first once.
        for turn in 0..SIDES.len() {
            let side = (turn + round) % SIDES.len();
            times[side] = measure(SIDES[side]).as_secs_f64();
        }
        rounds.push(times);
    }
    let sorted = |value: &dyn Fn(&[f64; 3]) -> f64| {
        let mut values: Vec<_> = rounds.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let median = |side: usize| sorted(&|times| times[side])[ROUNDS / 2];
    let ratio = |side: usize| {
        let ratios = sorted(&|times| times[side] / times[0]);
        let (least, most) = (ratios[0], ratios[ROUNDS - 1]);
        format!("{:.2} ({least:.2}-{most:.2})", ratios[ROUNDS / 2])
    };
    println!(
        "{what:<38}{:>9.2}{:>8.2}  {:<18}{:>8.2}  {:<18}",
        median(0),
        median(1),
        ratio(1),
        median(2),
        ratio(2)
    );
}
