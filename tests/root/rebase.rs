//! Parallel unpacking: layers are prepared without parents and committed onto
//! their parents later, in any order.

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

/// The label by which containerd 2.3 and later name a late parent.
const PARENT: &str = "containerd.io/snapshot/parent-chain-id";

/// Applies layer 1, 2 or 3 as containerd does onto an overlay mount: directly
/// into its upper directory, with deletions as whiteouts (containerd
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
            delete(upper, &["deleted"]);
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

/// Unpacks the same layers in sequence, each through a mount on the one before.
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

    // The order in which the layers are prepared and filled. They are committed
    // from the base upwards, as containerd does.
    for (round, order) in [[1, 2, 3], [3, 2, 1], [2, 3, 1]].into_iter().enumerate() {
        let key = |number: usize| format!("default/{round}/extract-{number} layer");
        let name = |number: usize| format!("rebased-{round}-{number}");
        for number in order {
            let labels = &[(PARENT, "layer")][usize::from(number == 1)..];
            let mounts = client.prepare(&key(number), "", labels).unwrap();
            let kind = if number == 1 { "bind" } else { "overlay" };
            assert_eq!(mounts[0].type_, kind);
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

/// Makes whiteouts, as containerd does for the deletions of a layer on an overlay.
fn delete(upper: &Path, names: &[&str]) {
    for name in names {
        let mode = Mode::from_raw_mode(0);
        mknodat(CWD, upper.join(name), FileType::CharacterDevice, mode, 0).unwrap();
    }
}

#[registered(crate::Test)]
fn only_layers_with_a_parent_to_come_get_an_overlay_over_nothing() {
    let split = Split::start(&[]);
    let client = split.client();
    let kind = |mounts: Vec<overlay_read_write_splitting_snapshotter::proto::mount::Mount>| {
        mounts[0].type_.clone()
    };
    let reference = ("containerd.io/snapshot.ref", "sha256:2");
    let parent = (PARENT, "sha256:1");
    let prepare = |key: &str, labels: &[(&str, &str)]| {
        let kind_then = kind(client.prepare(key, "", labels).unwrap());
        assert_eq!(kind(client.mounts(key).unwrap()), kind_then, "{key}");
        kind_then
    };
    assert_eq!(prepare("web", &[]), "bind");
    assert_eq!(prepare("web-2", &[parent]), "bind");
    assert_eq!(prepare("extract-1", &[]), "bind");
    assert_eq!(prepare("by-label", &[reference]), "bind");
    assert_eq!(prepare("extract-2", &[parent]), "overlay");
    assert_eq!(prepare("by-label-2", &[reference, parent]), "overlay");
    let view = client.view("extract-view", "", &[parent]).unwrap();
    assert_eq!(kind(view), "bind");
}

/// containerd 2.2 does not name the parent in a label.
#[registered(crate::Test)]
fn no_deletion_is_lost_where_parents_are_not_announced() {
    let mut split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("old"), "x").unwrap()
    });

    client.prepare("default/1/extract-a", "", &[]).unwrap();
    client.prepare("default/1/extract-b", "", &[]).unwrap();
    for key in ["default/1/extract-a", "default/1/extract-b"] {
        let (code, text) = client.commit_onto(key, "top", "base", &[]).unwrap_err();
        assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION);
        assert!(text.contains("pull the image again"), "{text}");
        assert_eq!(client.mounts(key).unwrap()[0].type_, "bind");
        client.remove(key).unwrap();
    }
    assert!(!client.exists("top"));
    split.daemon.stop();
    split.daemon.restart();

    // From then on, the same calls succeed.
    let client = split.client();
    let mounts = client.prepare("default/2/extract-top", "", &[]).unwrap();
    assert_eq!(mounts[0].type_, "overlay");
    delete(&upper_of(&mounts), &["old"]);
    client
        .commit_onto("default/2/extract-top", "top", "base", &[])
        .unwrap();
    let view = client.view("view", "top", &[]).unwrap();
    assert!(!Mounted::new(&view).path().join("old").exists());

    // The whiteouts of a first layer leave no trace.
    let mounts = client.prepare("default/3/extract-first", "", &[]).unwrap();
    let upper = upper_of(&mounts);
    fs::create_dir_all(upper.join("a/b")).unwrap();
    fs::write(upper.join("a/b/kept"), "x").unwrap();
    delete(&upper, &["gone", "a/gone", "a/b/gone"]);
    let usage = client.usage("default/3/extract-first").unwrap();
    client
        .commit("default/3/extract-first", "first", &[])
        .unwrap();
    assert_eq!(client.usage("first").unwrap().inodes, usage.inodes - 3);
    let found: Vec<_> = files(&upper).into_keys().collect();
    assert_eq!(found, ["", "a", "a/b", "a/b/kept"].map(Path::new));
}

/// In a user namespace containerd writes no whiteouts (containerd
/// `core/diff/apply/apply_linux.go`).
#[registered(crate::Test)]
fn a_parent_named_late_is_refused_in_a_user_namespace() {
    let split = Split::in_user_namespace();
    let client = split.client();
    client.prepare("extract-1", "", &[]).unwrap();
    client.commit("extract-1", "base", &[]).unwrap();
    for (key, labels) in [("extract-2", &[(PARENT, "base")][..]), ("extract-3", &[])] {
        client.prepare(key, "", labels).unwrap();
        let (code, text) = client.commit_onto(key, "top", "base", &[]).unwrap_err();
        assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION);
        assert!(text.contains("\"rebase\""), "{text}");
        client.commit(key, &format!("{key} alone"), &[]).unwrap();
    }
    client.prepare("extract-4", "base", &[]).unwrap();
    client.commit_onto("extract-4", "top", "base", &[]).unwrap();
}

#[registered(crate::Test)]
fn a_parent_named_late_obeys_the_rules() {
    let split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |_| ());
    layer(&client, "other", "", |_| ());
    client.prepare("running", "base", &[]).unwrap();
    client
        .prepare("extract-1", "", &[(PARENT, "base")])
        .unwrap();
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
