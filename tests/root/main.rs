//! Tests that need root: real ext4 on loop devices, real overlay mounts, the
//! real daemon over its socket, real containerd.
//!
//! Without root they are ignored, and the closing line says how many. With
//! `CI` set, nothing may be left out: a missing root is a failure.

// A test tells by its panic.
#![allow(clippy::unwrap_used)]

mod callers;
mod check;
mod connections;
mod containerd;
mod content;
mod damage;
mod doctor;
mod figures;
mod full;
mod fuzz;
mod guard;
mod import;
mod input;
mod intruders;
mod kills;
mod life;
mod lowers;
mod messages;
#[path = "../bolt/program.rs"]
mod program;
mod races;
mod rebase;
mod recovery;
mod refusals;
mod relocation;
mod rescue;
mod status;
mod support;
mod usage;
mod volumes;

use libtest_mimic::{Arguments, Failed, Trial};

type Test = (&'static str, fn());

fn main() {
    let arguments = Arguments::from_args();
    let is_root = rustix::process::geteuid().is_root();
    if std::env::var_os("CI").is_some() {
        assert!(is_root, "these tests mount file systems: run them as root");
    }
    let modules: &[(&str, &[Test])] = &[
        ("content", content::TESTS),
        ("input", input::TESTS),
        ("messages", messages::TESTS),
        ("fuzz", fuzz::TESTS),
        ("connections", connections::TESTS),
        ("intruders", intruders::TESTS),
        ("refusals", refusals::TESTS),
        ("life", life::TESTS),
        ("volumes", volumes::TESTS),
        ("full", full::TESTS),
        ("recovery", recovery::TESTS),
        ("callers", callers::TESTS),
        ("check", check::TESTS),
        ("status", status::TESTS),
        ("doctor", doctor::TESTS),
        ("rescue", rescue::TESTS),
        ("damage", damage::TESTS),
        ("import", import::TESTS),
        ("guard", guard::TESTS),
        ("figures", figures::TESTS),
        ("usage", usage::TESTS),
        ("races", races::TESTS),
        ("kills", kills::TESTS),
        ("lowers", lowers::TESTS),
        ("rebase", rebase::TESTS),
        ("relocation", relocation::TESTS),
        ("containerd", containerd::TESTS),
    ];
    let trials = modules
        .iter()
        .flat_map(|(module, tests)| tests.iter().map(move |test| (module, *test)))
        .map(|(module, (name, test))| {
            let run = move || {
                test();
                Ok::<(), Failed>(())
            };
            Trial::test(format!("{module}::{name}"), run).with_ignored_flag(!is_root)
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit();
}
