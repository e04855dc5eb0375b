//! How long Usage takes for a container with many files: a walk and a quota,
//! side by side.

use std::fs;
use std::time::{Duration, Instant};

use registered::registered;
use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::{Rig, upper, usage};
use crate::guest::setting;
use crate::support::client::Client;

/// A walk takes as long as many requests without one.
const ROUNDS: usize = 25;
const ROUNDS_WITH_WALK: usize = 5;
const FILES_OF_DIRECTORY: u32 = 1000;

#[registered(crate::quotas::Test)]
fn usage_by_quota_and_by_a_walk(rig: &mut Rig) {
    let files: u32 = setting("VM_FILES");
    let mut daemon = rig.start(&[]);
    let client = daemon.client();
    client.prepare("web", "base", &[]).unwrap();
    let top = upper(&client, "web");
    // Work that the disk, and the emulator, which translates code, do first.
    rustix::fs::sync();
    let _ = median(&client, ROUNDS);
    let few = median(&client, ROUNDS);
    for number in 0..files {
        let directory = top.join((number / FILES_OF_DIRECTORY).to_string());
        if number % FILES_OF_DIRECTORY == 0 {
            fs::create_dir(&directory).unwrap();
        }
        // No file is kept open, because an emulated machine has many to create.
        let path = directory.join(number.to_string());
        mknodat(CWD, &path, FileType::RegularFile, Mode::RUSR, 0).unwrap();
    }
    rustix::fs::sync();
    let (_, by_quota) = usage(&client, "web");
    let many = median(&client, ROUNDS);
    daemon.stop();
    daemon.set_arguments(rig.arguments(&["--quota", "off"]));
    daemon.restart();
    let client = daemon.client();
    let (_, by_walk) = usage(&client, "web");
    let walked = median(&client, ROUNDS_WITH_WALK);
    // Times are printed, not asserted, because machines differ. This shows that
    // the two differ.
    assert_eq!(by_quota, by_walk + 2, "<id> and work");
    let milliseconds = |taken: Duration| taken.as_secs_f64() * 1e3;
    rig.figures.push(format!(
        "Usage of a container, milliseconds, medians: {:.1} by quota with no file, {:.1} by \
         quota with {files}, {:.1} by a walk",
        milliseconds(few),
        milliseconds(many),
        milliseconds(walked)
    ));
}

fn median(client: &Client, rounds: usize) -> Duration {
    let mut taken: Vec<_> = (0..rounds)
        .map(|_| {
            let begun = Instant::now();
            client.usage("web").unwrap();
            begun.elapsed()
        })
        .collect();
    taken.sort();
    taken[rounds / 2]
}
