//! The benchmark: `cargo test --release --test bench`, as root. It prints
//! tables and asserts nothing about time, because machines differ: compare the
//! ratios of one run. With a word of a table's name, as in `-- start`, it makes
//! only that table. The table `slow` needs what
//! `tests/bench.sh --slow` prepares, and is left out without it.

#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

mod commit;
mod dirty;
mod heal;
mod images;
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
    let tables: [(&str, fn()); 6] = [
        ("commit", commit::of_a_container),
        ("unpack", commit::of_an_unpacked_layer),
        ("dirty", dirty::by_another_program),
        ("start", start::with_snapshots),
        ("heal", heal::of_one_layer),
        ("slow", slow::beside_the_built_in),
    ];
    for (name, make) in tables {
        let is_prepared = name != "slow" || std::env::var_os("COMPARE").is_some();
        if wanted.is_empty() && is_prepared || wanted.iter().any(|word| word == name) {
            make();
        }
    }
}

fn median(mut measure: impl FnMut() -> Duration) -> f64 {
    let mut times: Vec<Duration> = (0..ROUNDS).map(|_| measure()).collect();
    times.sort();
    times[ROUNDS / 2].as_secs_f64() * 1e3
}
