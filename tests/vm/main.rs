//! What no test can do to the machine it runs on: cut its power, break its
//! disks. A virtual machine with Debian's kernel has the daemon in it.
//!
//! ```text
//! cargo test --locked --test vm                          all of it
//! cargo test --locked --test vm -- power:: --cuts 200    more power cuts
//! cargo test --locked --test vm -- power:: --seed 17     the same load again
//! cargo test --locked --test vm -- figures --files 200000 --nocapture
//! ```
//!
//! This binary is also the first process in that machine, see [`guest`].

// A test tells by its panic.
#![allow(clippy::unwrap_used)]

mod content;
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

use std::time::{SystemTime, UNIX_EPOCH};

use libtest_mimic::{Arguments, Failed, Trial};

/// What the command line may set, beyond libtest's own arguments.
#[derive(Clone, Copy)]
pub struct Options {
    /// `--cuts`: how often the power is cut.
    pub cuts: u32,
    /// `--seed`: of everything that is random here but time.
    pub seed: u64,
    /// `--files`: how many a container has whose usage is timed.
    pub files: u32,
}

fn main() {
    if std::process::id() == 1 {
        guest::main();
    }
    let (options, rest) = options(std::env::args());
    let mut arguments = Arguments::from_iter(rest);
    // Each machine takes all processors there are.
    arguments.test_threads = Some(1);
    assert!(
        rustix::process::geteuid().is_root(),
        "these tests mount disks of virtual machines: run them as root"
    );
    let mut trials = vec![
        trial("power::nothing_acknowledged_is_lost", move || {
            power::nothing_acknowledged_is_lost(options);
        }),
        trial("power-control::without_flush_layers_are_lost", move || {
            power::without_flush_layers_are_lost(options);
        }),
    ];
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
    // The linker's order is not the same each time.
    trials.sort_by(|one, other| one.name().cmp(other.name()));
    libtest_mimic::run(&arguments, trials).exit();
}

fn trial(name: impl Into<String>, test: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        test();
        Ok::<(), Failed>(())
    })
}

/// Takes our own options out of the arguments; libtest's are left.
fn options(arguments: impl Iterator<Item = String>) -> (Options, Vec<String>) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut options = Options {
        cuts: 15,
        seed: now.as_secs(),
        files: 2_000,
    };
    let mut rest = Vec::new();
    let mut arguments = arguments.flat_map(|argument| match argument.split_once('=') {
        Some((flag @ ("--cuts" | "--seed" | "--files"), value)) => {
            vec![flag.to_owned(), value.to_owned()]
        }
        _ => vec![argument],
    });
    while let Some(argument) = arguments.next() {
        let mut number = || {
            let value = arguments.next().unwrap_or_default();
            value
                .parse()
                .unwrap_or_else(|_| panic!("{argument} takes a number, not {value:?}"))
        };
        match argument.as_str() {
            "--cuts" => options.cuts = u32::try_from(number()).unwrap(),
            "--seed" => options.seed = number(),
            "--files" => options.files = u32::try_from(number()).unwrap(),
            _ => rest.push(argument),
        }
    }
    (options, rest)
}
