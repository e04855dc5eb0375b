//! Databases written by containerd's own Go package, and read by this program.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

// Shared with the tests that need root, each of which uses a part of it.
#[allow(dead_code)]
#[path = "support/fuzzing.rs"]
mod fuzzing;
#[path = "bolt/program.rs"]
mod program;
#[allow(dead_code)]
#[path = "support/random.rs"]
mod random;

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use fuzzing::{cases, spoil};
use overlay_read_write_splitting_snapshotter::commands::import::bolt::snapshots::{Contents, read};
use overlay_read_write_splitting_snapshotter::error::ErrorKind;
use program::{commit, prepare, remove, update, view, write};
use random::Seed;
use serde_json::{Value, json};

/// What this program reads, in the form in which the Go program prints it.
fn listing(contents: &Contents) -> Value {
    let snapshots: Vec<Value> = contents
        .snapshots
        .iter()
        .map(|snapshot| {
            let info = &snapshot.info;
            let usage = snapshot.usage.unwrap_or_default();
            let kind = info.kind.word();
            let labels = match info.labels.is_empty() {
                true => Value::Null,
                false => json!(info.labels),
            };
            json!({
                "id": snapshot.id.to_string(),
                "name": info.name,
                "parent": info.parent,
                "kind": format!("{}{}", kind[..1].to_uppercase(), &kind[1..]),
                "created": info.created.nanos(),
                "updated": info.updated.nanos(),
                "labels": labels,
                "size": usage.size_bytes,
                "inodes": usage.inodes,
            })
        })
        .collect();
    json!({"snapshots": snapshots, "sequence": contents.highest_id})
}

/// Fails unless both read the same.
#[track_caller]
fn same(path: &Path, mut theirs: Value) -> Contents {
    let contents = read(File::open(path).unwrap()).unwrap();
    if theirs["snapshots"].is_null() {
        theirs["snapshots"] = json!([]);
    }
    for snapshot in theirs["snapshots"].as_array_mut().unwrap() {
        // Go does not distinguish an empty map of labels from none.
        if snapshot["labels"] == json!({}) {
            snapshot["labels"] = Value::Null;
        }
    }
    let ours = listing(&contents);
    assert_eq!(ours["sequence"], theirs["sequence"]);
    let pairs = ours["snapshots"].as_array().unwrap().iter();
    for (one, other) in pairs.zip(theirs["snapshots"].as_array().unwrap()) {
        assert_eq!(one, other);
    }
    assert!(ours == theirs, "one of them finds more");
    contents
}

/// `count` layers, one third of them with big labels, some on others, and a few
/// containers. Some of them are removed again.
fn steps(count: usize) -> Vec<Value> {
    let mut steps = Vec::new();
    for number in 0..count {
        let parent = match number % 7 {
            0 => String::new(),
            _ => format!("sha256:{:08}", number - 1),
        };
        let key = format!("default/{number}/extract-{number} sha256:{number:08}");
        let labels = match number % 3 {
            0 => json!({"containerd.io/snapshot.ref": key, "big": "b".repeat(4000)}),
            1 => json!({"containerd.io/snapshot.ref": key}),
            _ => json!({}),
        };
        steps.push(prepare(&key, &parent, labels.clone()));
        let name = format!("sha256:{number:08}");
        let size = u64::try_from(number * 4096).unwrap();
        steps.push(commit(&key, &name, size, 3, labels));
        if number % 5 == 0 {
            steps.push(prepare(&format!("default/{number}/web"), &name, json!({})));
            steps.push(view(&format!("default/{number}/look"), &name));
        }
        if number % 10 == 0 {
            steps.push(update(
                &format!("default/{number}/web"),
                json!({"new": "label"}),
            ));
            steps.push(remove(&format!("default/{number}/look")));
        }
    }
    // The removals fill the free list, and pages are used again. Nothing stands
    // on these layers.
    let topmost = (0..count).filter(|number| number % 7 == 6 && number % 5 != 0);
    steps.extend(topmost.map(|number| remove(&format!("sha256:{number:08}"))));
    steps
}

#[test]
fn what_containerd_writes_is_read() {
    if !program::is_available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metadata.db");
    let empty = write(&path, &[], &[]);
    assert_eq!(same(&path, empty).snapshots, []);
    // Step by step, so that small buckets within pages grow out of them.
    let mut kept = Vec::new();
    for step in [
        prepare("é/1/first", "", json!({"a": "1", "b.c/d": "é\n"})),
        prepare("default/2/second", "", json!({})),
        commit("é/1/first", "base", 123_456_789_000, 300, json!({"x": "y"})),
        prepare("third", "base", json!({"dropped": ""})),
        view("fourth", "base"),
        update("third", json!({"z": "z".repeat(100_000)})),
        remove("default/2/second"),
    ] {
        kept.push(step.clone());
        let theirs = write(&path, &[step], &[]);
        same(&path, theirs);
    }
    let contents = read(File::open(&path).unwrap()).unwrap();
    assert_eq!(contents.snapshots.len(), 3);
    assert_eq!(contents.highest_id, 4);
    for size in ["1024", "4096", "16384", "65536"] {
        let path = dir.path().join(size);
        let theirs = write(&path, &kept, &["-page-size", size]);
        same(&path, theirs);
        let theirs = write(&path, &steps(300), &["-per-transaction", "40"]);
        same(&path, theirs);
    }
}

#[test]
fn five_thousand_snapshots_are_read() {
    if !program::is_available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metadata.db");
    let theirs = write(&path, &steps(5000), &["-per-transaction", "100"]);
    let begun = Instant::now();
    let contents = same(&path, theirs);
    assert!(
        contents.snapshots.len() > 5000,
        "{}",
        contents.snapshots.len()
    );
    assert!(begun.elapsed() < Duration::from_secs(20));
    // Removing nearly all leaves a file full of free pages.
    let mut names: Vec<_> = contents.snapshots.iter().map(|found| &found.info).collect();
    names.sort_by_key(|info| std::cmp::Reverse(info.created));
    let steps: Vec<_> = names
        .iter()
        .take(5000)
        .map(|info| remove(&info.name))
        .collect();
    let theirs = write(&path, &steps, &["-per-transaction", "1000"]);
    same(&path, theirs);
}

/// Reading any damaged file ends with a result, and soon.
#[test]
fn damaged_files_end_in_an_error() {
    if !program::is_available() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metadata.db");
    write(&path, &steps(60), &["-per-transaction", "20"]);
    let whole = fs::read(&path).unwrap();
    assert!(whole.len() > 50 * 4096, "{}", whole.len());
    let used = used_pages(&whole) * 4096;
    for length in (0..used).step_by(4096) {
        for length in [length, length + 1, length + 100, length + 4095] {
            let error = read(file(&whole[..length])).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DataLoss, "{}", error.chain());
        }
    }

    let seed = Seed::of("FUZZ_SEED");
    let mut random = seed.random(1);
    let (mut refused, mut read_on) = (0, 0);
    for _ in cases(1000) {
        let mut bytes = whole.clone();
        if random.is_one_in(4) {
            // Some pages come twice, in other places, or not at all.
            let mut pages: Vec<_> = bytes.chunks(4096).map(<[u8]>::to_vec).collect();
            spoil(&mut pages, &mut random, |random| {
                whole[random.index(whole.len() / 4096) * 4096..][..4096].to_vec()
            });
            bytes = pages.concat();
        }
        for _ in 0..=random.index(3) {
            let at = match random.is_one_in(2) {
                // Fields that say what a page is, or lead to other pages.
                true => random.index(used / 4096) * 4096 + random.index(200),
                false => random.index(used),
            };
            if let Some(byte) = bytes.get_mut(at) {
                *byte = u8::try_from(random.below(256)).unwrap();
            }
        }
        let begun = Instant::now();
        match read(file(&bytes)) {
            Ok(_) => read_on += 1,
            Err(error) => {
                refused += 1;
                assert_ne!(error.kind(), ErrorKind::Internal, "{}", error.chain());
            }
        }
        assert!(
            begun.elapsed() < Duration::from_secs(5),
            "it takes too long"
        );
    }
    assert!(refused > 100 && read_on > 100, "{refused} {read_on}");
}

/// The number of pages in the newer meta (`pgid`, at byte 56 of its page).
fn used_pages(bytes: &[u8]) -> usize {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let pages = number(56).max(number(4096 + 56));
    usize::try_from(pages).unwrap()
}

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}
