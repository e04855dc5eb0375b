//! The parts of tests: disks, a daemon on them, a client of it. Everything ends
//! when the value that represents it is dropped.

// Each test module uses only a part of it.
#![allow(dead_code)]

pub mod client;
pub mod containerd;
pub mod daemon;
pub mod dead;
pub mod disk;
pub mod filter;
pub mod fuse;
pub mod fuzzing;
pub mod image;
pub mod mounted;
pub mod random;
pub mod slow;
pub mod trees;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Runs a command to its end, and panics with its output if it fails.
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
    let path = path.as_ref();
    fs::symlink_metadata(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        .dev()
}

/// Waits until something holds, and fails if it does not within half a minute.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < Duration::from_secs(60), "never {what}");
        sleep(Duration::from_millis(2));
    }
}

/// A directory tree: each path with its type and mode, owner, and the content
/// of a file or a link.
pub type Tree = BTreeMap<PathBuf, (u32, u32, Vec<u8>)>;

/// Fails unless a directory tree is as it was, and prints the paths that
/// differ.
#[track_caller]
pub fn unchanged(top: impl AsRef<Path>, before: &Tree) {
    let after = tree(top);
    let differ = |path: &&PathBuf| before.get(*path) != after.get(*path);
    let mut paths: Vec<_> = before.keys().chain(after.keys()).filter(differ).collect();
    paths.sort();
    paths.dedup();
    assert!(paths.is_empty(), "changed: {paths:?}");
}

/// A directory tree as it is. `lock` is left out, because even a refused
/// command takes the root's lock, which creates this file.
pub fn tree(top: impl AsRef<Path>) -> Tree {
    let mut found = BTreeMap::new();
    let mut ahead = vec![top.as_ref().to_owned()];
    while let Some(path) = ahead.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        let kind = metadata.file_type();
        let content = if kind.is_symlink() {
            let target = fs::read_link(&path).unwrap();
            target.into_os_string().into_encoded_bytes()
        } else if kind.is_file() {
            fs::read(&path).unwrap()
        } else {
            Vec::new()
        };
        if kind.is_dir() {
            ahead.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
        if !path.ends_with("lock") {
            found.insert(path, (metadata.mode(), metadata.uid(), content));
        }
    }
    found
}
