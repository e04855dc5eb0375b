//! Tests that need root: real ext4 on loop devices, real overlay mounts, the
//! real daemon on its socket, real containerd.
//!
//! Without root they are ignored, and the last line has their number. With `CI`
//! set, nothing may be ignored: a missing root is a failure.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

mod bounds;
mod callers;
mod check;
mod connections;
mod containerd;
mod content;
mod crowds;
mod damage;
mod doctor;
mod figures;
mod flushes;
mod full;
mod fuzz;
mod guard;
mod hanging;
mod held;
mod histories;
mod import;
mod inode_numbers;
mod input;
mod intruders;
mod kills;
mod labels;
mod life;
mod lowers;
mod mapped_ids;
mod messages;
mod moves;
#[path = "../bolt/program.rs"]
mod program;
mod races;
mod rebase;
mod recovery;
mod refusals;
mod relocation;
mod rescue;
mod rollback;
mod status;
#[path = "../support/mod.rs"]
mod support;
mod twins;
mod usage;
mod volumes;
mod whiteouts;
mod wiped;
mod without_flags;

use libtest_mimic::{Arguments, Failed, Trial};

/// A test: its module, its name, and its function.
struct Test(&'static str, &'static str, fn());
inventory::collect!(Test);

fn main() {
    let mut arguments = Arguments::from_args();
    // Most tests wait most of the time.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    arguments.test_threads = arguments.test_threads.or(Some(4 * processors));
    let is_root = rustix::process::geteuid().is_root();
    if std::env::var_os("CI").is_some() {
        assert!(is_root, "these tests mount file systems: run them as root");
    }
    let mut trials: Vec<_> = inventory::iter::<Test>()
        .map(|&Test(module, name, test)| {
            let run = move || {
                test();
                Ok::<(), Failed>(())
            };
            let (_, module) = module.split_once("::").unwrap();
            Trial::test(format!("{module}::{name}"), run).with_ignored_flag(!is_root)
        })
        .collect();
    // The linker's order differs from build to build.
    trials.sort_by(|one, other| one.name().cmp(other.name()));
    libtest_mimic::run(&arguments, trials).exit();
}
