//! What the tests are made of: disks, a daemon on them, a client of it.
//! Everything ends with the value that stands for it.

// Each test module uses a part of it.
#![allow(dead_code)]

pub mod client;
pub mod containerd;
pub mod daemon;
pub mod disk;
pub mod mounted;
pub mod trees;

use std::path::Path;
use std::process::Command;

/// Runs a command to its end, and fails with what it said if it failed.
pub fn run(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The device number of the file system that a path is on, as `stat -c %d`.
pub fn device(path: impl AsRef<Path>) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let path = path.as_ref();
    std::fs::symlink_metadata(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .dev()
}
