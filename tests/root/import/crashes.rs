//! Imports and undoings that are interrupted.

use std::fs;
use std::path::Path;

use registered::registered;

use super::original::Original;
use super::{sample, sample_works};
use crate::check::is_clean;
use crate::support::Tree;
use crate::support::daemon::{is_empty, refused};

/// The steps of an import, and whether the new database is in use after each.
const STEPS: [(&str, bool); 11] = [
    ("import-begun", false),
    ("import-drafted", false),
    ("import-recorded", false),
    ("probe-mounted", false),
    ("import-marked", false),
    ("import-set-aside", false),
    ("import-entered", false),
    ("import-linked", false),
    ("import-kept", false),
    ("import-exchanged", true),
    ("import-complete", true),
];

/// The steps of an undoing, and whether the old database is in use after each.
const UNDO_STEPS: [(&str, bool); 7] = [
    ("undo-linked", false),
    ("undo-exchanged", true),
    ("undo-unlinked", true),
    ("undo-put-back", true),
    ("undo-noted", true),
    ("undo-unmarked", true),
    ("undo-forgotten", true),
];

/// One snapshot of each kind: also an unmoved layer, and, on both volumes,
/// snapshots that cannot be taken over.
fn mixed() -> (Original, [Tree; 2]) {
    let mut original = sample();
    original.broken("default/7/broken", "default/1/base", "small");
    original.layer("default/8/lost", "", "lost");
    fs::remove_file(original.last_on_image().join("top")).unwrap();
    original.layer("default/9/upon", "default/8/lost", "upon");
    original.container("default/10/stuck", "default/9/upon", "stuck");
    original.finish();
    let before = original.trees();
    (original, before)
}

#[track_caller]
fn dies(original: &Original, flags: &[&str], step: &str) {
    let (code, said, complaint) = original.import_dying_at(flags, Some(step));
    assert_eq!(code, -1, "{step}: {said}{complaint}");
}

#[track_caller]
fn imports(original: &Original) {
    let (code, said, complaint) = original.import(&[]);
    assert_eq!(code, 1, "{said}{complaint}");
    assert!(said.contains("left out 3"), "{said}");
}

/// Everything but the removal of the draft was done: the next run removes the
/// draft, and does nothing else.
#[track_caller]
fn finishes(original: &Original) {
    original.is_refused(&["--dry-run"], &["already"]);
    let [mut image, mut writable] = original.trees();
    let said = original.import_all();
    assert!(said.contains("is finished now"), "{said}");
    let drafts = |path: &Path| path.iter().any(|part| part == "metadata.db.import");
    image.retain(|path, _| !drafts(path));
    writable.retain(|path, _| !drafts(path));
    original.is_as(&[image, writable]);
    original.is_refused(&[], &["already"]);
}

/// Whether the original finds its whole database.
fn is_originals(original: &Original, before: &[Tree; 2]) -> bool {
    fs::read(original.database()).is_ok_and(|now| now == before[0][&original.database()].2)
}

#[track_caller]
fn serves_all(original: Original) {
    let split = original.serve();
    sample_works(&split.client());
    is_clean(&split);
    for (top, id) in [(split.root(), 11), (split.writable(), 12)] {
        assert!(top.join(format!("left-out/{id}/fs")).is_dir(), "{id}");
    }
}

#[registered(crate::Test)]
fn killed_at_every_step() {
    let (original, before) = mixed();
    for (step, is_done) in STEPS {
        dies(&original, &[], step);
        if is_done {
            finishes(&original);
        } else {
            assert!(is_originals(&original, &before), "{step}");
            assert!(
                refused(&original.arguments()).contains("`import`"),
                "{step}"
            );
            original.is_refused(&["--dry-run"], &["interrupted"]);
        }
        original.undo();
        original.is_as(&before);
        original.is_refused(&["--undo"], &["nothing was imported"]);
        if !is_done {
            dies(&original, &[], step);
            imports(&original);
            original.undo();
            original.is_as(&before);
        }
    }
    // The undoing of the interrupted import is interrupted, too.
    for (step, _) in UNDO_STEPS.into_iter().skip(2) {
        dies(&original, &[], "import-kept");
        dies(&original, &[], step);
        assert!(is_originals(&original, &before), "{step}");
        imports(&original);
        original.undo();
        original.is_as(&before);
    }
    dies(&original, &[], "import-exchanged");
    serves_all(original);
}

#[registered(crate::Test)]
fn undoing_killed_at_every_step() {
    let (original, before) = mixed();
    for (step, is_undone) in UNDO_STEPS {
        imports(&original);
        dies(&original, &["--undo"], step);
        assert_eq!(is_originals(&original, &before), is_undone, "{step}");
        if is_undone {
            assert!(
                refused(&original.arguments()).contains("`import`"),
                "{step}"
            );
            original.is_refused(&["--dry-run"], &["interrupted"]);
        }
        original.undo();
        original.is_as(&before);
        imports(&original);
        dies(&original, &["--undo"], step);
        if is_undone {
            imports(&original);
        } else {
            original.is_refused(&[], &["already"]);
        }
        original.undo();
        original.is_as(&before);
    }
    // What was set aside does not count as a stray at a start in between.
    imports(&original);
    dies(&original, &["--undo"], "undo-linked");
    let mut split = original.serve();
    sample_works(&split.client());
    split.client().cleanup().unwrap();
    split.daemon.stop();
    let original = Original::again(split);
    original.undo();
    original.is_as(&before);
    imports(&original);
    serves_all(original);
}

#[registered(crate::Test)]
fn killed_with_databases_in_two_places() {
    let (mut original, before) = mixed();
    let state = original.writable.path().join("state");
    original.flags = vec!["--state-dir".to_owned(), state.to_str().unwrap().to_owned()];
    let target = state.join("metadata.db");
    let back = |step: &str| {
        original.undo();
        original.is_as(&before);
        assert!(is_empty(&state), "{step}");
    };
    for (step, is_done) in STEPS {
        dies(&original, &[], step);
        // Between the two last steps, both files exist.
        let is_originals_there = step != "import-complete";
        assert_eq!(original.database().exists(), is_originals_there, "{step}");
        if is_originals_there {
            assert!(
                refused(&original.arguments()).contains("`import`"),
                "{step}"
            );
            imports(&original);
        } else {
            finishes(&original);
        }
        assert!(target.exists(), "{step}");
        back(step);
        dies(&original, &[], step);
        assert_eq!(target.exists(), is_done, "{step}");
        back(step);
    }
    for (step, is_undone) in UNDO_STEPS {
        imports(&original);
        dies(&original, &["--undo"], step);
        assert_eq!(is_originals(&original, &before), is_undone, "{step}");
        back(step);
        imports(&original);
        dies(&original, &["--undo"], step);
        match is_undone {
            true => imports(&original),
            false => original.is_refused(&[], &["already"]),
        }
        back(step);
    }

    // Only a database that this root's import has left there is accepted.
    dies(&original, &[], "import-exchanged");
    let of_root = original.root().join("state");
    let recorded = fs::read_to_string(&of_root).unwrap();
    let (first, _) = recorded.split_once("identity").unwrap();
    let change = |statement: &str| {
        let database = rusqlite::Connection::open(&target).unwrap();
        database.execute(statement, []).unwrap();
    };
    let is_left_alone = || {
        original.is_refused(&[], &["there already", "--state-dir"]);
        original.is_refused(&["--undo"], &["--state-dir"]);
    };
    fs::write(&of_root, format!("{first}identity {}\n", "0".repeat(32))).unwrap();
    is_left_alone();
    fs::write(&of_root, &recorded).unwrap();
    change("INSERT INTO fact (name, value) VALUES ('in_use', 'yes')");
    is_left_alone();
    change("DELETE FROM fact WHERE name = 'in_use'");
    let unwritten = fs::read(&target).unwrap();
    change("UPDATE snapshot SET updated_ns = updated_ns + 1 WHERE id = 5");
    is_left_alone();
    fs::write(&target, unwritten).unwrap();
    back("exchanged");
}

/// An unfinished import is finished on the same disk, or not at all.
#[registered(crate::Test)]
fn cut_short_it_waits_for_its_own_disk() {
    let (mut original, before) = mixed();
    let elsewhere = original.writable.path().join("elsewhere");
    let half_done = [
        ("import-marked", &[][..]),
        ("import-linked", &[]),
        ("undo-exchanged", &["--undo"]),
        ("undo-unlinked", &["--undo"]),
        ("undo-noted", &["--undo"]),
    ];
    for (step, flags) in half_done {
        if !flags.is_empty() {
            imports(&original);
        }
        dies(&original, flags, step);
        for command in [&[][..], &["--undo"]] {
            // Another directory, both missing and with the original's data.
            for is_made in [false, true] {
                if is_made {
                    fs::create_dir_all(elsewhere.join("snapshots/1/fs")).unwrap();
                }
                original.other_writable = Some(elsewhere.clone());
                let own = original.writable();
                original.is_refused(command, &["give --writable-dir", own.to_str().unwrap()]);
                original.other_writable = None;
            }
            fs::remove_dir_all(&elsewhere).unwrap();
            if step == "undo-noted" {
                continue;
            }
            let half_done = original.trees();
            original.writable.unmount();
            let (code, _, complaint) = original.import(command);
            assert_eq!(code, 2, "{step}: {complaint}");
            assert!(complaint.contains("mount the disk"), "{step}: {complaint}");
            assert!(is_empty(original.writable.path()), "{step}");
            original.writable.mount();
            original.is_as(&half_done);
        }
        original.undo();
        original.is_as(&before);
    }
    // The same holds for the state directory, which has the record of what is
    // unfinished.
    for step in ["import-recorded", "import-marked", "import-kept"] {
        dies(&original, &[], step);
        let other = original.writable.path().join("state");
        original.flags = vec!["--state-dir".to_owned(), other.to_str().unwrap().to_owned()];
        let own = original.database();
        for command in [&[][..], &["--undo"], &["--dry-run"]] {
            original.is_refused(command, &["--state-dir", own.to_str().unwrap()]);
        }
        original.flags.clear();
        let (snapshots, away) = (
            original.root().join("snapshots"),
            original.root().join("away"),
        );
        if step == "import-kept" {
            fs::rename(&snapshots, &away).unwrap();
            original.is_refused(&["--undo"], &["snapshots is missing", "mount"]);
            fs::rename(&away, &snapshots).unwrap();
        }
        original.undo();
        original.is_as(&before);
    }
    imports(&original);
    serves_all(original);
}

#[registered(crate::Test)]
fn a_full_disk() {
    let (mut original, before) = mixed();
    original.image.fill();
    original.is_refused(&[], &["No space left"]);
    original.image.make_room();
    imports(&original);
    original.image.fill();
    original.undo();
    original.image.make_room();
    original.is_as(&before);
    // The refusal comes with advice even if nothing could be given back.
    imports(&original);
    original.image.fill();
    for number in [1, 2] {
        let ballast = format!("metadata.db.ballast-{number}");
        fs::remove_file(original.root().join(ballast)).unwrap();
    }
    original.image.fill();
    let (code, _, complaint) = original.import(&["--undo"]);
    assert_eq!(code, 2, "{complaint}");
    assert!(complaint.contains("make a few MiB of room"), "{complaint}");
    original.image.make_room();
    original.undo();
    original.is_as(&before);
    let state = original.writable.path().join("state");
    original.flags = vec!["--state-dir".to_owned(), state.to_str().unwrap().to_owned()];
    original.writable.fill();
    original.is_refused(&[], &["No space left"]);
    original.writable.make_room();
    imports(&original);
    original.image.fill();
    original.undo();
    original.is_as(&before);
}
