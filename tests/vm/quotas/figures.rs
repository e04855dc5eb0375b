//! What Usage takes of a container with many files: a walk and a quota, side by
//! side.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use super::{Rig, Test, upper, usage};
use crate::guest::setting;
use crate::support::client::Client;

pub const TESTS: &[Test] = &[("usage_by_quota_and_by_a_walk", usage_by_quota_and_by_a_walk)];

const ROUNDS: usize = 5;
const FILES_OF_DIRECTORY: u32 = 1000;

fn usage_by_quota_and_by_a_walk(rig: &mut Rig) {
    let files: u32 = setting("VM_FILES");
    let mut daemon = rig.start(&[]);
    let client = daemon.client();
    client.prepare("web", "base", &[]).unwrap();
    let top = upper(&client, "web");
    let few = median(&client);
    for number in 0..files {
        let directory = top.join((number / FILES_OF_DIRECTORY).to_string());
        if number % FILES_OF_DIRECTORY == 0 {
            fs::create_dir(&directory).unwrap();
        }
        File::create(directory.join(number.to_string())).unwrap();
    }
    let (_, by_quota) = usage(&client, "web");
    let many = median(&client);
    daemon.stop();
    daemon.set_arguments(rig.arguments(&["--quota", "off"]));
    daemon.restart();
    let client = daemon.client();
    let (_, by_walk) = usage(&client, "web");
    let walked = median(&client);
    // Times are told, not asserted: machines differ. This tells the two apart.
    assert_eq!(by_quota, by_walk + 2, "<id> and work");
    let milliseconds = |taken: Duration| taken.as_secs_f64() * 1e3;
    rig.figures.push(format!(
        "Usage of a container, median of {ROUNDS}, milliseconds: {:.2} by quota with no file, \
         {:.2} by quota with {files}, {:.2} by a walk",
        milliseconds(few),
        milliseconds(many),
        milliseconds(walked)
    ));
}

fn median(client: &Client) -> Duration {
    let mut taken: Vec<_> = (0..ROUNDS)
        .map(|_| {
            let begun = Instant::now();
            client.usage("web").unwrap();
            begun.elapsed()
        })
        .collect();
    taken.sort();
    taken[ROUNDS / 2]
}
