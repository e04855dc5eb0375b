//! Tests that no machine can do to itself: cutting its power, breaking its
//! disks. They run the daemon in a virtual machine.
//!
//! ```text
//! cargo test --locked --test vm                          all of it
//! cargo test --locked --test vm -- --machine qemu        in emulated machines
//! cargo test --locked --test vm -- power:: --cuts 1000   more power cuts
//! cargo test --locked --test vm -- power:: --seed 17     the same load again
//! cargo test --locked --test vm -- crash:: --states 5000  more crash states
//! cargo test --locked --test vm -- figures --files 200000 --nocapture
//! ```
//!
//! The machines run user-mode Linux, or Debian's kernel under qemu, see [`machine`].
//!
//! This binary is also the first process in the machine, see [`guest`].

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

mod content;
mod crash;
mod faults;
mod faulty;
mod guest;
mod initramfs;
mod load;
mod machine;
mod model;
mod power;
mod quotas;
#[path = "../support/mod.rs"]
mod support;
mod verify;

use std::collections::BTreeMap;
use std::num::NonZero;
use std::thread::available_parallelism;
use std::time::{SystemTime, UNIX_EPOCH};

use libtest_mimic::{Arguments, Failed, Trial};
use machine::Driver;

/// Options of the command line beyond libtest's own.
#[derive(Clone, Copy)]
pub struct Options {
    /// `--machine`: how machines are run.
    pub driver: &'static Driver,
    /// `--cuts`: how often the power is cut.
    pub cuts: u32,
    /// `--seed`: the seed of everything that is random here, except times.
    pub seed: u64,
    /// `--files`: how many files the container has whose usage is timed.
    pub files: u32,
    /// `--states`: how many crash states are looked at.
    pub states: usize,
}

fn main() {
    if std::process::id() == 1 {
        guest::main();
    }
    let (options, rest) = options(std::env::args());
    let mut arguments = Arguments::from_iter(rest);
    let processors = available_parallelism().map_or(1, NonZero::get);
    let at_once = (options.driver.at_once)(processors);
    arguments.test_threads = arguments.test_threads.or(Some(at_once));
    assert!(
        rustix::process::geteuid().is_root(),
        "these tests mount disks of virtual machines: run them as root"
    );
    let mut trials: Vec<_> = (0..power::SERIES)
        .map(|number| {
            let name = format!("power::nothing_acknowledged_is_lost::{number}");
            trial(name, move || {
                power::nothing_acknowledged_is_lost(options, number);
            })
        })
        .collect();
    trials.push(trial(
        "power-control::without_flush_layers_are_lost",
        move || power::without_flush_layers_are_lost(options),
    ));
    trials.extend(crash::CASES.iter().map(|case| {
        trial(format!("crash::{}", case.name), move || {
            crash::run(case, options);
        })
    }));
    trials.extend(
        inventory::iter::<faults::Test>().map(|&faults::Test(module, name, _)| {
            let (_, module) = module.split_once("::").unwrap();
            trial(format!("{module}::{name}"), || faults::run_in_machine(name))
        }),
    );
    trials.extend(quotas::all().map(|(file_system, topic)| {
        let run = move || quotas::run_in_machine(file_system, topic, options);
        trial(format!("quotas::{file_system}::{topic}"), run)
    }));
    // The linker's order differs from build to build.
    trials.sort_by(|one, other| one.name().cmp(other.name()));
    libtest_mimic::run(&arguments, trials).exit();
}

fn trial(name: impl Into<String>, test: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        test();
        Ok::<(), Failed>(())
    })
}

/// Removes this binary's own options from the arguments; libtest's are left.
fn options(arguments: impl Iterator<Item = String>) -> (Options, Vec<String>) {
    const OWN: [&str; 5] = ["--machine", "--cuts", "--seed", "--files", "--states"];
    let mut own = BTreeMap::new();
    let mut rest = Vec::new();
    let mut arguments = arguments.flat_map(|argument| match argument.split_once('=') {
        Some((flag, value)) if OWN.contains(&flag) => vec![flag.to_owned(), value.to_owned()],
        _ => vec![argument],
    });
    while let Some(argument) = arguments.next() {
        if OWN.contains(&argument.as_str()) {
            own.insert(argument, arguments.next().unwrap_or_default());
        } else {
            rest.push(argument);
        }
    }
    let number = |flag: &str| -> Option<u64> {
        let value = own.get(flag)?;
        let number = value.parse();
        Some(number.unwrap_or_else(|_| panic!("{flag} takes a number, not {value:?}")))
    };
    let small = |flag, default| number(flag).map_or(default, |given| given.try_into().unwrap());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let driver = machine::choose_driver(own.get("--machine").map(String::as_str));
    let options = Options {
        driver,
        cuts: small("--cuts", driver.cuts),
        seed: number("--seed").unwrap_or(now.as_secs()),
        files: small("--files", 2_000),
        states: number("--states").map_or(1_600, |given| given.try_into().unwrap()),
    };
    (options, rest)
}
