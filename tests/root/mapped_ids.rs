//! Containers whose ids are mapped, by the kernel or by containerd.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};

use grpcio::RpcStatusCode;
use registered::registered;

use crate::content::layer;
use crate::support::client::Client;
use crate::support::containerd::{Containerd, IMAGE};
use crate::support::daemon::{Daemon, Split, command};
use crate::support::disk::Disk;
use crate::support::mounted::{Mounted, upper_of};

const IDS: [(&str, &str); 2] = [
    ("containerd.io/snapshot/uidmapping", "0:100000:65536"),
    ("containerd.io/snapshot/gidmapping", "0:100000:65536"),
];

fn is_mapped(mounts: &[overlay_read_write_splitting_snapshotter::proto::mount::Mount]) -> bool {
    mounts[0]
        .options
        .iter()
        .any(|option| option.starts_with("uidmap="))
}

fn base(client: &Client) {
    layer(client, "default/1/sha256:1", "", |top| {
        fs::create_dir(top.join("etc")).unwrap();
        fs::write(top.join("etc/file"), "x").unwrap();
    });
}

/// Without the capability "remap-ids", containerd copies the image, gives the copy
/// the mapped owners, and still asks for mapped ids.
#[registered(crate::Test)]
fn what_containerd_has_remapped_is_not_mapped_again() {
    let mut split = Split::start(&[]);
    let client = split.client();
    base(&client);
    for (number, name) in ["sha256:1-100000-100000", "sha256:9"]
        .into_iter()
        .enumerate()
    {
        let key = format!("default/2/{name}-remap");
        let name = format!("default/3/{name}");
        let mounts = client.prepare(&key, "default/1/sha256:1", &[]).unwrap();
        // The snapshot will be a layer.
        assert!(upper_of(&mounts).starts_with(split.root()), "{mounts:?}");
        {
            let mounted = Mounted::new(&mounts);
            for path in ["", "etc", "etc/file"] {
                chown(mounted.path().join(path), Some(100_000), Some(100_000)).unwrap();
            }
        }
        client.commit(&key, &name, &[]).unwrap();

        let web = format!("default/4/web-{number}");
        let mounts = client.prepare(&web, &name, &IDS).unwrap();
        assert!(!is_mapped(&mounts), "{mounts:?}");
        assert!(!is_mapped(
            &client.view(&format!("{web}-view"), &name, &IDS).unwrap()
        ));
        let top = Mounted::new(&mounts);
        for path in ["", "etc", "etc/file"] {
            let found = fs::metadata(top.path().join(path)).unwrap();
            assert_eq!((found.uid(), found.gid()), (100_000, 100_000), "{path:?}");
        }
        drop(top);
        // On the image itself, ids are mapped by the kernel, in the same
        // database.
        let plain = client
            .prepare(&format!("{web}-plain"), "default/1/sha256:1", &IDS)
            .unwrap();
        assert!(is_mapped(&plain));
        split.daemon.stop();
        split.daemon.restart();
        assert_eq!(split.client().mounts(&web).unwrap(), mounts);
        client.remove(&web).unwrap();
    }
}

/// An image cannot pretend to be a remapped one.
#[registered(crate::Test)]
fn an_image_of_another_owner_is_mapped() {
    let split = Split::start(&[]);
    let client = split.client();
    layer(&client, "default/1/sha256:1", "", |top| {
        chown(top, Some(100_000), Some(100_000)).unwrap();
    });
    assert!(is_mapped(
        &client
            .prepare("default/2/web", "default/1/sha256:1", &IDS)
            .unwrap()
    ));
}

#[registered(crate::Test)]
fn ids_that_cannot_be_mapped_are_refused() {
    // ext2 and ext3 cannot be id-mapped.
    let image = Disk::make(64, "ext3", &["-q", "-F", "-b", "4096"]);
    let writable = Disk::ext4(64);
    let daemon = Daemon::start(&command(&image, &writable, &[]));
    let client = daemon.client();
    base(&client);
    let parent = "default/1/sha256:1";
    client.prepare("web", parent, &[]).unwrap();
    client.update("web", &["labels"], &IDS).unwrap();
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    for (what, refused) in [
        ("prepare", client.prepare("other", parent, &IDS)),
        ("view", client.view("other", parent, &IDS)),
        ("mounts", client.mounts("web")),
    ] {
        let (code, text) = refused.unwrap_err();
        assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{what}: {text}");
        for part in ["ext3", release.trim(), "Linux 5.19", "\"remap-ids\""] {
            assert!(text.contains(part), "{what}: {part} is not in: {text}");
        }
    }
    assert!(!client.exists("other"));
    let snapshots = fs::read_dir(writable.path().join("writable/snapshots")).unwrap();
    assert_eq!(snapshots.count(), 1);
    // A layer that containerd has remapped needs no support of the kernel.
    client
        .prepare("default/2/sha256:9-remap", parent, &[])
        .unwrap();
    client
        .commit("default/2/sha256:9-remap", "default/3/sha256:9", &[])
        .unwrap();
    assert!(!is_mapped(
        &client.prepare("other", "default/3/sha256:9", &IDS).unwrap()
    ));
}

/// With a real containerd, and the options that 1.6 has for it.
#[registered(crate::Test)]
fn containerd_remaps_on_the_image_volume() {
    let split = Split::start(&[]);
    let containerd = Containerd::start(split.daemon.address());
    containerd.import();
    let map = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"];
    let script = "stat -c %u:%g / /etc /etc/motd; touch /etc/new; echo ok";
    let seen = containerd.try_run_with(&map, "short", script).unwrap();
    assert_eq!(seen, "0:0\n0:0\n0:0\nok\n");

    // The copy of the image stays as long as a container stands on it.
    let runc = containerd.subdirectory("runc");
    let run = ["run", "--detach", "--null-io", "--runc-root", &runc];
    let script = "trap 'exit 0' TERM; while :; do sleep 0.05; done";
    containerd.ctr(&[&run[..], &map, &[IMAGE, "web", "sh", "-ec", script]].concat());
    let remapped = split
        .client()
        .names(&["kind==committed,name~=-100000-100000$"])
        .unwrap();
    assert_eq!(remapped.len(), 1, "{remapped:?}");
    for entry in fs::read_dir(split.root().join("snapshots")).unwrap() {
        let path = entry.unwrap().path();
        // A layer on the writable volume would be a link.
        assert!(!path.is_symlink(), "{}", path.display());
    }
    containerd.stop("web");
}
