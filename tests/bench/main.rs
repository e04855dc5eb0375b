//! The benchmark: `cargo test --release --test bench`, as root. It prints
//! tables and asserts nothing about time, because machines differ: compare the
//! ratios of one run. With a word of a table's name, as in `-- start`, it makes
//! only that table.

#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

mod commit;
#[path = "../vm/crash/fuse.rs"]
mod fuse;
mod heal;
mod slow;
mod start;

use std::time::Duration;

const ROUNDS: usize = 5;

fn main() {
    assert!(
        rustix::process::geteuid().is_root(),
        "the benchmark mounts disks: run it as root"
    );
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let tables: [(&str, fn()); 5] = [
        ("commit", commit::of_a_container),
        ("unpack", commit::of_an_unpacked_layer),
        ("start", start::with_snapshots),
        ("heal", heal::of_one_layer),
        ("slow", slow::with_slow_flushes),
    ];
    for (name, make) in tables {
        if wanted.is_empty() || wanted.iter().any(|word| word == name) {
            make();
        }
    }
}

fn median(mut measure: impl FnMut() -> Duration) -> f64 {
    let mut times: Vec<Duration> = (0..ROUNDS).map(|_| measure()).collect();
    times.sort();
    times[ROUNDS / 2].as_secs_f64() * 1e3
}
