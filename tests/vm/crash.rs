//! Every crash that a load could meet. Everything that reaches the two disks is
//! recorded, in one order for both, together with the requests and answers. The disks
//! are then given the contents that they may have had after a crash, at each flush and
//! at a sample of moments in between. A daemon is started on each: everything that was
//! acknowledged by then has to be there, whole, and nothing may be half there.
//!
//! The random power cuts of [`crate::power`] show what a real kernel loses. Here every
//! flush is covered, disks lose whatever they were not asked to flush, and the two
//! disks lose it independently.
//!
//! Most of this runs on the host. Limits need project quotas, which the host's kernel
//! may lack, so they are changed in a machine of user-mode Linux, where a state takes
//! several times as long. Without user-mode Linux, the same load runs on the host
//! without limits.

mod disks;
mod explore;
mod record;
mod states;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::Duration;

use crate::Options;
use crate::guest::{IMAGE_DEVICE, Outlet, WRITABLE_DEVICE, setting};
use crate::machine;
use disks::{BYTES, Disks, EXT4, EXT4_WITH_QUOTAS, Format, IMAGE, WRITABLE};

/// A load and the states to look at.
pub struct Case {
    pub name: &'static str,
    /// Whether the database is on the writable disk rather than on the image
    /// disk.
    has_state_dir: bool,
    /// Whether containers have limits.
    has_limits: bool,
    sync: &'static str,
    /// The flush that this daemon leaves out; empty for none.
    left_out: &'static str,
    /// For a control: what is expected to be wrong. Without controls that fail,
    /// the other cases would prove nothing.
    wrong: Option<&'static str>,
}

/// The database in both places, because a flush of it also flushes the names on its
/// disk; and controls that leave out important flushes.
pub const CASES: [Case; 8] = [
    Case {
        name: "database_on_image",
        has_state_dir: false,
        has_limits: false,
        sync: "commit",
        left_out: "",
        wrong: None,
    },
    Case {
        name: "database_on_writable",
        ..control("", "commit", "", None)
    },
    Case {
        name: "limits",
        has_limits: true,
        ..control("", "commit", "", None)
    },
    // No layer is flushed with all else on its volume.
    control("layers_flushed_alone", "commit", "volume", None),
    control("control_without_sync", "none", "", Some("is damaged")),
    control(
        "control_row_after_trash",
        "commit",
        "row",
        Some("is there again"),
    ),
    control(
        "control_copy_after_exchange",
        "commit",
        "copy",
        Some("is damaged"),
    ),
    control(
        "control_heal_before_flush",
        "commit",
        "heal",
        Some("is damaged"),
    ),
];

const fn control(
    name: &'static str,
    sync: &'static str,
    left_out: &'static str,
    wrong: Option<&'static str>,
) -> Case {
    Case {
        name,
        has_state_dir: true,
        has_limits: false,
        sync,
        left_out,
        wrong,
    }
}

impl Case {
    /// How many of `all` states this case looks at.
    fn states(&self, all: usize) -> usize {
        match self.wrong {
            // In a machine, each state takes seconds.
            None if self.has_limits => all / 10,
            None if !self.left_out.is_empty() => all / 5,
            None => all * 2 / 5,
            Some(_) => 400,
        }
    }

    /// The arguments with the daemon's directories.
    fn places(&self, disks: &Disks) -> Vec<String> {
        let at = |disk, name| format!("{}/{name}", disks.path(disk).display());
        let mut places = vec![
            "--root-dir".to_owned(),
            at(IMAGE, "root"),
            "--writable-dir".to_owned(),
            at(WRITABLE, "writable"),
        ];
        if self.has_state_dir {
            places.extend(["--state-dir".to_owned(), at(WRITABLE, "state")]);
        }
        places
    }

    /// Runs the case, and returns a line about it. Panics if its states are not
    /// as expected. The disks of the first wrong state are written to these
    /// files.
    fn run(&self, format: &'static Format, seed: u64, states: usize, files: [&Path; 2]) -> String {
        let explored = explore::explore(self, format, seed, self.states(states), files);
        let Some(words) = self.wrong else {
            let findings = explored.findings.join("\n");
            assert!(findings.is_empty(), "{}\n{findings}", explored.summary);
            return explored.summary;
        };
        let found = explored.findings.iter().find(|one| one.contains(words));
        match found {
            Some(found) => format!("{}; for example: {found}", explored.summary),
            None => panic!(
                "{}: no state of which {words:?} is said, but {:?}",
                explored.summary,
                explored.findings.first()
            ),
        }
    }
}

/// Runs a case in a machine, or on the host.
pub fn run(case: &Case, options: Options) {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("crash-{}", case.name));
    let files = ["image.raw", "writable.raw"].map(|name| kept.join(name));
    let is_in_machine = case.has_limits && options.driver.name == "uml";
    let outcome = catch_unwind(AssertUnwindSafe(|| match is_in_machine {
        true => run_in_machine(case, options, &kept),
        false => {
            if case.has_limits {
                eprintln!("crash::limits: without any, as there is no user-mode Linux");
            }
            fs::create_dir_all(&kept).unwrap();
            let files = files.each_ref().map(|file| file.as_path());
            vec![case.run(&EXT4, options.seed, options.states, files)]
        }
    }));
    match outcome {
        Ok(lines) => lines
            .iter()
            .for_each(|line| println!("crash::{}: {line}", case.name)),
        Err(panic) => {
            eprintln!(
                "the disks of the first wrong state are in {}",
                kept.display()
            );
            resume_unwind(panic);
        }
    }
}

fn run_in_machine(case: &Case, options: Options, kept: &Path) -> Vec<String> {
    let disks = machine::Disks::new(BYTES as u64 >> 20);
    let settings = [
        ("VM_WORK", "crash".to_owned()),
        ("VM_CASE", case.name.to_owned()),
        ("VM_SEED", options.seed.to_string()),
        ("VM_STATES", options.states.to_string()),
    ];
    // A second for each state, on a busy machine: there is one at each flush, of which a
    // load has some hundreds, and the sample in between.
    let longer = Duration::from_secs(600 + case.states(options.states) as u64);
    let machine = disks.boot(&settings).give_longer(longer);
    catch_unwind(AssertUnwindSafe(|| machine.finish())).unwrap_or_else(|panic| {
        fs::create_dir_all(kept).unwrap();
        for file in disks.files() {
            fs::copy(&file, kept.join(file.file_name().unwrap())).unwrap();
        }
        resume_unwind(panic)
    })
}

/// Runs the case in the machine.
pub fn run_as_guest(outlet: &Outlet) {
    let name: String = setting("VM_CASE");
    let case = CASES.iter().find(|case| case.name == name).unwrap();
    // The machine's own disks receive the state that is to be kept.
    let files = [Path::new(IMAGE_DEVICE), Path::new(WRITABLE_DEVICE)];
    let line = case.run(
        &EXT4_WITH_QUOTAS,
        setting("VM_SEED"),
        setting("VM_STATES"),
        files,
    );
    outlet.line(&line);
}
