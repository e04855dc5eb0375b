//! Comparisons report each kind of difference, and nothing else.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{CWD, Mode, Timespec, Timestamps, XattrFlags, mknodat, setxattr, utimensat};

use super::*;

const RULES: Rules = Rules {
    since: i64::MAX,
    is_lowest: false,
};

/// A tree with something of each kind; all its times are the same.
fn sample(top: &Path) {
    fs::create_dir_all(top.join("a/b")).unwrap();
    fs::write(top.join("a/file"), vec![7; (1 << 20) + 5]).unwrap();
    fs::write(top.join("a/b/one"), "linked").unwrap();
    fs::hard_link(top.join("a/b/one"), top.join("a/two")).unwrap();
    symlink("file", top.join("a/link")).unwrap();
    mknodat(CWD, top.join("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    setxattr(top.join("a/file"), "user.x", b"1", XattrFlags::empty()).unwrap();
    settle(top);
}

fn settle(top: &Path) {
    for path in [
        "a/b/one", "a/b", "a/file", "a/link", "a/two", "a", "pipe", "",
    ] {
        let time = Timespec {
            tv_sec: 1_700_000_000,
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        let path = top.join(path);
        // An entry that a test has removed has no times to set.
        let _ = utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW);
    }
}

fn compared(expected: &Path, found: &Path) -> Vec<String> {
    let cancel = AtomicBool::new(false);
    let open = |path| File::open(path).unwrap();
    let differences = compare_trees(open(expected), open(found), RULES, &cancel).unwrap();
    assert_eq!(differences.count, differences.first.len() as u64);
    differences.first
}

#[test]
fn each_change_is_seen_and_only_that() {
    type Change = fn(&Path);
    let table: &[(Change, &str)] = &[
        (
            |top| fs::write(top.join("a/file"), "").unwrap(),
            "\"/a/file\" has 0 bytes in place of 1048581",
        ),
        (
            |top| {
                let mut bytes = vec![7; (1 << 20) + 5];
                bytes[1 << 20] = 8;
                fs::write(top.join("a/file"), bytes).unwrap();
            },
            "\"/a/file\" has other bytes, from 1048576 on",
        ),
        (
            |top| {
                let mode = fs::Permissions::from_mode(0o4711);
                fs::set_permissions(top.join("pipe"), mode).unwrap();
            },
            "\"/pipe\" has mode 4711 in place of 400",
        ),
        (
            |top| rustix::fs::removexattr(top.join("a/file"), "user.x").unwrap(),
            "\"/a/file\" lacks the attribute \"user.x\"",
        ),
        (
            |top| setxattr(top.join("a/file"), "user.x", b"2", XattrFlags::empty()).unwrap(),
            "\"/a/file\" has another value of the attribute \"user.x\"",
        ),
        (
            |top| {
                fs::remove_file(top.join("a/two")).unwrap();
                fs::write(top.join("a/two"), "linked").unwrap();
            },
            "is a separate file in place of a hard link",
        ),
        (
            |top| fs::remove_dir_all(top.join("a/b")).unwrap(),
            "\"/a/b\" is missing",
        ),
        (
            |top| fs::create_dir(top.join("a/b/c")).unwrap(),
            "\"/a/b/c\" should not be there",
        ),
        (
            |top| fs::write(top.join("more"), "").unwrap(),
            "\"/more\" should not be there",
        ),
        (
            |top| {
                fs::remove_file(top.join("pipe")).unwrap();
                fs::write(top.join("pipe"), "").unwrap();
            },
            "\"/pipe\" is a file in the place of a pipe",
        ),
    ];
    let dir = tempfile::tempdir().unwrap();
    let expected = dir.path().join("expected");
    sample(&expected);
    for (number, (change, wrong)) in table.iter().enumerate() {
        let found = dir.path().join(number.to_string());
        sample(&found);
        assert_eq!(compared(&expected, &found), [""; 0]);
        change(&found);
        settle(&found);
        let differences = compared(&expected, &found);
        assert!(
            matches!(differences.as_slice(), [one] if one.contains(wrong)),
            "{wrong}: {differences:?}"
        );
    }
}

#[test]
fn names_of_one_file_in_place_of_two_are_seen() {
    let dir = tempfile::tempdir().unwrap();
    let [expected, found] = ["expected", "found"].map(|name| dir.path().join(name));
    for top in [&expected, &found] {
        fs::create_dir(top).unwrap();
        fs::write(top.join("one"), "same").unwrap();
    }
    fs::write(expected.join("two"), "same").unwrap();
    fs::hard_link(found.join("one"), found.join("two")).unwrap();
    let rules = Rules { since: 0, ..RULES };
    let cancel = AtomicBool::new(false);
    let open = |path| File::open(path).unwrap();
    let compare = |one, other| compare_trees(open(one), open(other), rules, &cancel);
    assert_eq!(compare(&expected, &found).unwrap().count, 1);
    assert_eq!(compare(&found, &expected).unwrap().count, 1);
    assert_eq!(compare(&found, &found).unwrap().count, 0);
}
