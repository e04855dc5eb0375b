//! Digests of layers that were found sound.

use std::os::unix::fs::FileExt;

use registered::registered;

use super::damages::payload;
use super::{Stage, blobs};
use crate::check::check;
use crate::support::containerd::{Containerd, IMAGE};
use crate::support::daemon::Split;
use crate::support::{run, tree, unchanged, until};

/// The next check needs neither containerd nor content that containerd has dropped.
#[registered(crate::Test)]
fn what_was_sound_needs_no_containerd() {
    let stage = Stage::begin_beside();
    let without = ["--deep", "--containerd-address", "/none"];
    assert_eq!(check(&stage.split, &without).0, 2);
    stage.has_sound_layers();
    let (code, said, complaint) = check(&stage.split, &without);
    assert_eq!(code, 0, "{said}{complaint}");
    assert!(said.contains("5 of them sound"), "{said}");
    // It outlives the daemon, and a copy of the layer with all that counts.
    stage.split.client().cleanup().unwrap();
    let top = &stage.layers[1];
    let copy = top.with_file_name("copy");
    run(std::process::Command::new("cp")
        .arg("-a")
        .args([top, &copy]));
    std::fs::remove_dir_all(top).unwrap();
    std::fs::rename(&copy, top).unwrap();
    assert_eq!(check(&stage.split, &without).0, 0);

    // Damage is found all the same, and described where there is content.
    payload(top).write_all_at(b"?", 5).unwrap();
    let before = tree(top);
    let (code, _, complaint) = check(&stage.split, &without);
    assert_eq!(code, 2);
    assert!(
        complaint.contains("check that containerd is running"),
        "{complaint}"
    );
    let (code, said, _) = stage.check(&["--deep"]);
    assert_eq!(code, 1);
    assert!(said.contains("has other bytes, from 5 on"), "{said}");
    stage.containerd.ctr(&["content", "rm", &blobs(&stage)[1]]);
    let (code, said, _) = stage.check(&["--deep"]);
    assert_eq!(code, 1);
    assert!(
        said.contains("has changed since it was found sound"),
        "{said}"
    );
    assert!(said.contains("5 layers compared"), "{said}");
    assert!(said.contains("4 of them sound"), "{said}");
    unchanged(top, &before);
}

/// With --record-digests, damage is found without containerd's content from the unpack on.
#[registered(crate::Test)]
fn a_daemon_records_the_digests_of_what_is_unpacked() {
    let split = Split::start(&["--record-digests"]);
    let containerd = Containerd::start(split.daemon.address());
    containerd.import();
    until("a digest of each layer", || digests(&split) == 5);
    let deep = ["--deep", "--containerd-address", "/none"];
    let (code, said, complaint) = check(&split, &deep);
    assert_eq!(code, 0, "{said}{complaint}");
    assert!(said.contains("5 of them sound"), "{said}");
    // A layer that is removed before its turn leaves no trace.
    containerd.ctr(&["images", "rm", "--sync", IMAGE]);
    until("the end of the layers", || {
        split.client().list_pages(&[]).unwrap().concat().is_empty()
    });
    assert_eq!(digests(&split), 0);
    assert!(
        !split.daemon.log().contains("record the digest"),
        "{}",
        split.daemon.log()
    );
}

/// How many digests the database has.
fn digests(split: &Split) -> i64 {
    let database = rusqlite::Connection::open(split.root().join("metadata.db")).unwrap();
    let count = "SELECT count(*) FROM digest";
    database.query_row(count, [], |row| row.get(0)).unwrap()
}

/// A layer that has healed, or that a repair goes on with, is compared again.
#[registered(crate::Test)]
fn a_changed_layer_loses_its_digest() {
    let mut stage = Stage::begin_beside();
    stage.has_sound_layers();
    assert_eq!(digests(&stage.split), 5);
    payload(&stage.layers[1]).write_all_at(b"?", 5).unwrap();
    assert_eq!(stage.check(&["--heal"]).0, 0);
    assert_eq!(digests(&stage.split), 4);
    stage.has_sound_layers();
    assert_eq!(digests(&stage.split), 5);
    // Longer than it was.
    payload(&stage.layers[1]).set_len(2_000_000).unwrap();
    stage.split.daemon.stop();
    assert_eq!(stage.check(&["--repair", "--yes"]).0, 0);
    assert_eq!(digests(&stage.split), 4);
}
