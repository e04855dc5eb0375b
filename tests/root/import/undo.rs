//! An import that is undone.

use std::fs;
use std::path::Path;

use registered::registered;
use serde_json::json;

use super::original::Original;
use super::{listing, reads, sample, sample_works, theirs};
use crate::program;
use crate::support::client::Client;
use crate::support::daemon::{Daemon, is_empty, refused};

#[registered(crate::Test)]
fn undone_it_is_as_it_was() {
    let mut original = sample();
    original.broken("default/7/broken", "default/1/base", "small");
    // A small layer does not move while another snapshot stands on it.
    original.container("default/8/on-it", "default/7/broken", "on it");
    let listed = original.finish();
    let before = original.trees();
    let original = undo_works(original, &before);
    // This also works after the daemon has run, as long as it has only answered
    // questions.
    original.import_all();
    let mut split = original.serve();
    let client = split.client();
    sample_works(&client);
    assert_eq!(listing(&client), theirs(&listed));
    client.cleanup().unwrap();
    split.daemon.stop();
    let original = Original::again(split);
    original.undo();
    original.is_as(&before);
    // The original goes on with its database.
    let steps = [program::prepare(
        "default/9/next",
        "default/3/upper",
        json!({}),
    )];
    let told = program::write(&original.database(), &steps, &[]);
    let mut expected = theirs(&listed);
    let id = &told["sequence"];
    let told = theirs(&told);
    expected.insert("default/9/next".to_owned(), told["default/9/next"].clone());
    assert_eq!(told, expected);
    // Another import, with what was made meanwhile.
    for part in ["fs", "work"] {
        fs::create_dir_all(original.writable().join(format!("snapshots/{id}/{part}"))).unwrap();
    }
    original.import_all();
    let split = original.serve();
    assert_eq!(listing(&split.client()), told);
}

#[track_caller]
fn undo_works(original: Original, before: &[crate::support::Tree; 2]) -> Original {
    original.import_all();
    original.undo();
    original.is_as(before);
    let (code, _, complaint) = original.import(&["--undo"]);
    assert_eq!(code, 2);
    assert!(complaint.contains("nothing was imported"), "{complaint}");
    original
}

#[registered(crate::Test)]
fn written_it_cannot_be_undone() {
    type Change = fn(&Client);
    let changes: [Change; 4] = [
        |client| {
            client.prepare("new", "", &[]).unwrap();
            client.remove("new").unwrap();
        },
        |client| client.remove("default/5/db").unwrap(),
        |client| {
            client
                .update("default/5/db", &["labels.a"], &[("a", "b")])
                .unwrap();
            client.update("default/5/db", &["labels.a"], &[]).unwrap();
        },
        |client| client.commit("default/5/db", "layer", &[]).unwrap(),
    ];
    for change in changes {
        let mut original = sample();
        original.finish();
        original.import_all();
        let mut split = original.serve();
        change(&split.client());
        split.daemon.stop();
        let original = Original::again(split);
        original.is_refused(&["--undo"], &["since the import"]);
        original.is_refused(&[], &["already"]);
        let split = original.serve();
        reads(&split.client(), "default/4/web", "own", "written by web");
    }
}

/// An original that was started during the import has the old file open, under
/// whatever name.
#[registered(crate::Test)]
fn the_original_went_on() {
    let mut original = sample();
    original.finish();
    original.import_all();
    let kept = original.root().join("metadata.db.bbolt");
    let whole = fs::read(&kept).unwrap();
    let holder = program::hold(&kept);
    original.is_refused(&["--undo"], &["metadata.db.bbolt is in use"]);
    drop(holder);
    let steps = [program::prepare("default/9/late", "", json!({}))];
    program::write(&kept, &steps, &[]);
    original.is_refused(
        &["--undo"],
        &["metadata.db.bbolt was written to after the import"],
    );
    fs::write(&kept, &whole).unwrap();
    original.undo();
    original.import_all();
    sample_works(&original.serve().client());
}

#[registered(crate::Test)]
fn a_state_directory_elsewhere() {
    let mut original = sample();
    let state = original.writable.path().join("state");
    original.flags = vec!["--state-dir".to_owned(), state.to_str().unwrap().to_owned()];
    original.finish();
    let before = original.trees();
    assert!(refused(&original.arguments()).contains("`import`"));
    original.import_all();
    assert!(!original.database().exists());
    original.is_refused(&[], &["already"]);
    let undo = |original: &Original| {
        original.undo();
        original.is_as(&before);
        assert!(is_empty(&state));
    };
    undo(&original);
    original.import_all();
    let mut daemon = Daemon::start(&original.arguments());
    sample_works(&daemon.client());
    daemon.stop();
    undo(&original);
    assert!(Path::new(&original.database()).exists());
}
