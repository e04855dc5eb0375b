//! Parallel unpacking: layers are prepared on nothing and committed onto their
//! parents later, in any order.

use std::fs;
use std::path::Path;

use grpcio::RpcStatusCode;
use registered::registered;
use rustix::fs::{CWD, FileType, Mode, XattrFlags, lsetxattr, mknodat};

use crate::content::layer;
use crate::support::client::Client;
use crate::support::daemon::Split;
use crate::support::mounted::{Mounted, upper_of};
use crate::support::trees::files;

/// Applies layer 1, 2 or 3 the way containerd does onto an overlay mount: right
/// into its upper directory, deletions as whiteouts (containerd
/// `pkg/archive/tar_opts_linux.go`, `OverlayConvertWhiteout`).
fn apply(number: usize, upper: &Path) {
    let write = |name: &str, content: &str| fs::write(upper.join(name), content).unwrap();
    match number {
        1 => {
            fs::create_dir_all(upper.join("dir/below")).unwrap();
            fs::create_dir_all(upper.join("kept")).unwrap();
            write("dir/old", "old");
            write("dir/below/older", "older");
            write("deleted", "to be deleted");
            write("kept/file", "one");
        }
        2 => {
            let mode = Mode::from_raw_mode(0);
            mknodat(
                CWD,
                upper.join("deleted"),
                FileType::CharacterDevice,
                mode,
                0,
            )
            .unwrap();
            fs::create_dir_all(upper.join("kept")).unwrap();
            write("kept/file", "two");
            write("added", "two");
        }
        _ => {
            fs::create_dir_all(upper.join("dir")).unwrap();
            let opaque = "trusted.overlay.opaque";
            lsetxattr(upper.join("dir"), opaque, b"y", XattrFlags::empty()).unwrap();
            write("dir/new", "new");
        }
    }
}

/// The same by hand, through a mount of each layer on the one before.
fn unpack_in_sequence(client: &Client) {
    layer(client, "seq-1", "", |top| apply(1, top));
    layer(client, "seq-2", "seq-1", |top| {
        fs::remove_file(top.join("deleted")).unwrap();
        fs::write(top.join("kept/file"), "two").unwrap();
        fs::write(top.join("added"), "two").unwrap();
    });
    layer(client, "seq-3", "seq-2", |top| {
        fs::remove_dir_all(top.join("dir")).unwrap();
        fs::create_dir(top.join("dir")).unwrap();
        fs::write(top.join("dir/new"), "new").unwrap();
    });
}

#[registered(crate::Test)]
fn any_order_of_unpacking_gives_the_same_image() {
    let split = Split::start(&[]);
    let client = split.client();
    unpack_in_sequence(&client);
    let view = client.view("view-seq", "seq-3", &[]).unwrap();
    let expected = files(&Mounted::new(&view).path());
    assert!(expected.contains_key(Path::new("dir/new")));
    assert!(!expected.contains_key(Path::new("dir/old")));
    assert!(!expected.contains_key(Path::new("deleted")));

    // In which order the layers are prepared and filled; committed they are
    // from the base upwards, as containerd does.
    for (round, order) in [[1, 2, 3], [3, 2, 1], [2, 3, 1]].into_iter().enumerate() {
        let key = |number: usize| format!("default/{round}/extract-{number} layer");
        let name = |number: usize| format!("rebased-{round}-{number}");
        for number in order {
            let mounts = client.prepare(&key(number), "", &[]).unwrap();
            assert_eq!(mounts[0].type_, "overlay");
            apply(number, &upper_of(&mounts));
        }
        client.commit(&key(1), &name(1), &[]).unwrap();
        client
            .commit_onto(&key(2), &name(2), &name(1), &[])
            .unwrap();
        client
            .commit_onto(&key(3), &name(3), &name(2), &[])
            .unwrap();
        let view = client
            .view(&format!("view-{round}"), &name(3), &[])
            .unwrap();
        let found = files(&Mounted::new(&view).path());
        assert!(
            found == expected,
            "{order:?}: {found:?} is not {expected:?}"
        );
    }
}

#[registered(crate::Test)]
fn only_unpacks_get_an_overlay_over_nothing() {
    let split = Split::start(&[]);
    let client = split.client();
    let kind = |mounts: Vec<overlay_read_write_splitting_snapshotter::proto::mount::Mount>| {
        mounts[0].type_.clone()
    };
    let reference = [("containerd.io/snapshot.ref", "sha256:1")];
    assert_eq!(kind(client.prepare("web", "", &[]).unwrap()), "bind");
    assert_eq!(
        kind(client.prepare("extract-1", "", &[]).unwrap()),
        "overlay"
    );
    assert_eq!(
        kind(client.prepare("by-label", "", &reference).unwrap()),
        "overlay"
    );
    assert_eq!(kind(client.view("extract-view", "", &[]).unwrap()), "bind");
    assert_eq!(kind(client.mounts("extract-1").unwrap()), "overlay");
}

#[registered(crate::Test)]
fn a_parent_named_late_obeys_the_rules() {
    let split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |_| ());
    layer(&client, "other", "", |_| ());
    client.prepare("running", "base", &[]).unwrap();
    client.prepare("extract-1", "", &[]).unwrap();
    client.prepare("extract-2", "base", &[]).unwrap();
    let code = |result: Result<(), (RpcStatusCode, String)>| result.unwrap_err().0;
    let onto = |key: &str, parent: &str| client.commit_onto(key, "new", parent, &[]);
    assert_eq!(code(onto("extract-1", "nowhere")), RpcStatusCode::NOT_FOUND);
    assert_eq!(
        code(onto("extract-1", "running")),
        RpcStatusCode::FAILED_PRECONDITION
    );
    assert_eq!(
        code(onto("extract-2", "other")),
        RpcStatusCode::INVALID_ARGUMENT
    );
    assert!(!client.exists("new"));
    onto("extract-2", "base").unwrap();
    assert_eq!(client.stat("new").unwrap().parent, "base");
}
