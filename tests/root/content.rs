//! Which byte is on which disk, and what containers see.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, chown};
use std::path::Path;

use grpcio::RpcStatusCode;
use registered::registered;

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Split, command, is_empty};
use crate::support::device;
use crate::support::disk::Disk;
use crate::support::mounted::{Mounted, upper_of};

/// Unpacks a layer: prepare, fill, commit.
pub fn layer(client: &Client, name: &str, parent: &str, fill: impl FnOnce(&Path)) {
    let key = format!("default/1/extract-{}", name.replace('/', "-"));
    let mounts = client.prepare(&key, parent, &[]).unwrap();
    fill(&Mounted::new(&mounts).path());
    client.commit(&key, name, &[]).unwrap();
}

#[registered(crate::Test)]
fn layers_and_writes_are_on_their_disks() {
    let split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("from-image"), "image").unwrap();
    });
    let mounts = client.prepare("default/2/web", "base", &[]).unwrap();
    let mounted = Mounted::new(&mounts);
    assert_eq!(
        fs::read_to_string(mounted.path().join("from-image")).unwrap(),
        "image"
    );
    fs::write(mounted.path().join("written"), "container").unwrap();
    fs::write(mounted.path().join("from-image"), "changed").unwrap();

    let (image, writable) = (device(split.image.path()), device(split.writable.path()));
    assert_ne!(image, writable);
    let layer = split.root().join("snapshots/1/fs/from-image");
    assert_eq!(device(&layer), image);
    assert_eq!(fs::read_to_string(&layer).unwrap(), "image");
    let upper = split.writable().join("snapshots/2/fs");
    assert_eq!(device(upper.join("written")), writable);
    assert_eq!(
        fs::read_to_string(upper.join("from-image")).unwrap(),
        "changed"
    );
    assert!(!split.root().join("snapshots/2").exists());
    assert!(!split.writable().join("snapshots/1").exists());
    assert_eq!(client.mounts("default/2/web").unwrap(), mounts);
}

#[registered(crate::Test)]
fn deletions_and_replacements_are_seen_through() {
    let split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::create_dir_all(top.join("dir/below")).unwrap();
        fs::write(top.join("dir/old"), "old").unwrap();
        fs::write(top.join("deleted"), "x").unwrap();
    });
    layer(&client, "upper", "base", |top| {
        fs::remove_file(top.join("deleted")).unwrap();
        fs::remove_dir_all(top.join("dir")).unwrap();
        fs::create_dir(top.join("dir")).unwrap();
        fs::write(top.join("dir/new"), "new").unwrap();
    });
    let whiteout = fs::symlink_metadata(split.root().join("snapshots/2/fs/deleted")).unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    for (key, mounts) in [
        ("web", client.prepare("web", "upper", &[]).unwrap()),
        ("view", client.view("view", "upper", &[]).unwrap()),
    ] {
        let mounted = Mounted::new(&mounts);
        assert!(!mounted.path().join("deleted").exists(), "{key}");
        let names: Vec<_> = fs::read_dir(mounted.path().join("dir"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["new"], "{key}");
    }
    let view = Mounted::new(&client.mounts("view").unwrap());
    assert!(
        fs::write(view.path().join("x"), "x").is_err(),
        "a view is read-only"
    );
}

#[registered(crate::Test)]
fn the_top_directory_keeps_its_owner() {
    let split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        chown(top, Some(7), Some(8)).unwrap()
    });
    client.prepare("web", "base", &[]).unwrap();
    let fs = split.writable().join("snapshots/2/fs").metadata().unwrap();
    assert_eq!((fs.uid(), fs.gid(), fs.mode() & 0o7777), (7, 8, 0o755));
    let work = split
        .writable()
        .join("snapshots/2/work")
        .metadata()
        .unwrap();
    assert_eq!(work.mode() & 0o7777, 0o711);
}

#[registered(crate::Test)]
fn views_take_no_directory() {
    let split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("a"), "a").unwrap()
    });
    layer(&client, "upper", "base", |top| {
        fs::write(top.join("b"), "b").unwrap()
    });
    let one = client.view("one", "base", &[]).unwrap();
    assert_eq!(
        one[0].source,
        format!("{}/snapshots/1/fs", split.root().display())
    );
    client.view("two", "upper", &[]).unwrap();
    let usage = client.usage("two").unwrap();
    assert_eq!((usage.size, usage.inodes), (0, 0));
    assert_eq!(
        fs::read_dir(split.root().join("snapshots"))
            .unwrap()
            .count(),
        2
    );
    assert!(is_empty(split.writable().join("snapshots")));

    let nothing = client.view("nothing", "", &[]).unwrap();
    assert_eq!(nothing[0].options, ["ro", "rbind"]);
    assert!(is_empty(Mounted::new(&nothing).path()));
    for key in ["one", "two", "nothing"] {
        client.remove(key).unwrap();
    }
    assert_eq!(
        fs::read_dir(split.root().join("snapshots"))
            .unwrap()
            .count(),
        2
    );
}

#[registered(crate::Test)]
fn chains_mount_up_to_400_layers() {
    // With --sync none, 400 flushes of a loop device are not part of this test.
    let mut split = Split::start(&["--sync", "none"]);
    split.restart_at_far_ids();
    let client = split.client();
    let mut parent = String::new();
    for number in 1..=400 {
        let (key, name) = (format!("extract-{number}"), format!("layer-{number}"));
        let upper = upper_of(&client.prepare(&key, &parent, &[]).unwrap());
        fs::write(upper.join(format!("file-{number}")), number.to_string()).unwrap();
        fs::write(upper.join("latest"), number.to_string()).unwrap();
        client.commit(&key, &name, &[]).unwrap();
        parent = name;
    }
    for length in [1, 2, 128, 400] {
        let mounts = client
            .prepare(&format!("web-{length}"), &format!("layer-{length}"), &[])
            .unwrap();
        let mounted = Mounted::new(&mounts);
        let read = |name: &str| fs::read_to_string(mounted.path().join(name)).unwrap();
        assert_eq!(read("latest"), length.to_string());
        assert_eq!(read("file-1"), "1");
        assert_eq!(fs::read_dir(mounted.path()).unwrap().count(), length + 1);
        fs::write(mounted.path().join("written"), "x").unwrap();
    }
}

#[registered(crate::Test)]
fn a_writable_snapshot_becomes_a_layer() {
    let split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("a"), "a").unwrap()
    });
    // Docker does this for every container that it creates.
    let mounts = client.prepare("moby/3/id-init-key", "base", &[]).unwrap();
    {
        let mounted = Mounted::new(&mounts);
        fs::create_dir(mounted.path().join("etc")).unwrap();
        fs::write(mounted.path().join("etc/hosts"), "hosts").unwrap();
    }
    client
        .commit("moby/3/id-init-key", "moby/4/id-init", &[])
        .unwrap();
    let link = split.root().join("snapshots/2");
    assert_eq!(
        fs::read_link(&link).unwrap(),
        split.writable().join("snapshots/2")
    );

    let mounts = client.prepare("moby/5/id", "moby/4/id-init", &[]).unwrap();
    let lowers = mounts[0]
        .options
        .iter()
        .find(|option| option.starts_with("lowerdir="))
        .unwrap();
    let root = split.root().display().to_string();
    assert_eq!(
        *lowers,
        format!("lowerdir={root}/snapshots/2/fs:{root}/snapshots/1/fs")
    );
    {
        let mounted = Mounted::new(&mounts);
        assert_eq!(
            fs::read_to_string(mounted.path().join("etc/hosts")).unwrap(),
            "hosts"
        );
        assert_eq!(fs::read_to_string(mounted.path().join("a")).unwrap(), "a");
        fs::write(mounted.path().join("etc/hosts"), "mine").unwrap();
    }
    let layer_file = split.writable().join("snapshots/2/fs/etc/hosts");
    assert_eq!(
        fs::read_to_string(layer_file).unwrap(),
        "hosts",
        "a layer is immutable"
    );

    let (code, _) = client.remove("moby/4/id-init").unwrap_err();
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION);
    client.remove("moby/5/id").unwrap();
    client.remove("moby/4/id-init").unwrap();
    assert!(link.symlink_metadata().is_err(), "its link is gone");
    client.cleanup().unwrap();
    assert!(is_empty(split.writable().join("snapshots")));
    assert!(is_empty(split.writable().join("trash")));
}

#[registered(crate::Test)]
fn a_rebased_unpack_keeps_its_deletions() {
    let split = Split::start(&[]);
    let client = split.client();
    // The upper layer is unpacked first, without a parent. It deletes files
    // that are not beneath it yet.
    let parent = [("containerd.io/snapshot/parent-chain-id", "base")];
    let mounts = client
        .prepare("default/1/extract-top", "", &parent)
        .unwrap();
    assert_eq!(mounts[0].type_, "overlay");
    assert!(
        mounts[0]
            .options
            .contains(&format!("lowerdir={}/empty", split.root().display()))
    );
    let upper = split.root().join("snapshots/1/fs");
    let mode = rustix::fs::Mode::from_raw_mode(0);
    let kind = rustix::fs::FileType::CharacterDevice;
    rustix::fs::mknodat(rustix::fs::CWD, upper.join("deleted"), kind, mode, 0).unwrap();
    layer(&client, "base", "", |top| {
        fs::write(top.join("deleted"), "x").unwrap();
        fs::write(top.join("kept"), "x").unwrap();
    });
    client
        .commit_onto("default/1/extract-top", "top", "base", &[])
        .unwrap();
    assert_eq!(client.stat("top").unwrap().parent, "base");
    let mounted = Mounted::new(&client.prepare("web", "top", &[]).unwrap());
    assert!(!mounted.path().join("deleted").exists());
    assert!(mounted.path().join("kept").exists());
}

#[registered(crate::Test)]
fn removal_gives_the_space_back() {
    for flags in [&[][..], &["--async-remove", "false"]] {
        let split = Split::start(flags);
        let client = split.client();
        split.image.sync();
        split.writable.sync();
        let before = (split.image.free(), split.writable.free());
        layer(&client, "base", "", |top| {
            fs::write(top.join("a"), vec![1; 8 << 20]).unwrap()
        });
        let mounts = client.prepare("web", "base", &[]).unwrap();
        fs::write(Mounted::new(&mounts).path().join("b"), vec![1; 8 << 20]).unwrap();
        client.remove("web").unwrap();
        client.remove("base").unwrap();
        if flags.is_empty() {
            assert!(
                !is_empty(split.root().join("trash")),
                "Remove deletes nothing"
            );
            client.cleanup().unwrap();
        }
        for volume in [split.root(), split.writable()] {
            assert!(is_empty(volume.join("snapshots")));
            assert!(is_empty(volume.join("trash")));
        }
        split.image.sync();
        split.writable.sync();
        // The database, its log and ext4's own blocks may have grown a little.
        assert!(split.image.free() + (6 << 20) > before.0);
        assert!(split.writable.free() + (1 << 20) > before.1);
    }
}

#[registered(crate::Test)]
fn usage_is_what_is_allocated() {
    let split = Split::start(&[]);
    let client = split.client();
    client.prepare("web", "", &[]).unwrap();
    let upper = split.writable().join("snapshots/1/fs");
    fs::write(upper.join("data"), vec![1; 1 << 20]).unwrap();
    fs::hard_link(upper.join("data"), upper.join("same")).unwrap();
    fs::File::create(upper.join("sparse"))
        .unwrap()
        .set_len(1 << 30)
        .unwrap();
    split.writable.sync();
    let paths = [upper.clone(), upper.join("data"), upper.join("sparse")];
    let blocks: u64 = paths
        .iter()
        .map(|path| path.metadata().unwrap().blocks())
        .sum();
    let usage = client.usage("web").unwrap();
    assert_eq!((usage.size as u64, usage.inodes), (blocks * 512, 3));
    client.commit("web", "layer", &[]).unwrap();
    fs::write(upper.join("later"), vec![1; 1 << 20]).unwrap();
    assert_eq!(client.usage("layer").unwrap(), usage, "recorded by commit");
}

#[registered(crate::Test)]
fn lists_come_in_pages_of_100() {
    let split = Split::start(&["--sync", "none"]);
    let client = split.client();
    assert!(client.list_pages(&[]).unwrap().is_empty());
    for number in 0..250 {
        let label = (number % 2).to_string();
        client
            .prepare(&format!("s{number:03}"), "", &[("parity", &label)])
            .unwrap();
    }
    let pages = client.list_pages(&[]).unwrap();
    let lengths: Vec<_> = pages.iter().map(Vec::len).collect();
    assert_eq!(lengths, [100, 100, 50]);
    let names: Vec<_> = pages.into_iter().flatten().map(|info| info.name).collect();
    let expected: Vec<_> = (0..250).map(|number| format!("s{number:03}")).collect();
    assert_eq!(names, expected);
    assert_eq!(client.names(&["labels.parity==1"]).unwrap().len(), 125);
    assert_eq!(
        client.names(&["name==s001", "name==s002"]).unwrap(),
        ["s001", "s002"]
    );
    assert_eq!(
        client.names(&["kind==active,name~=^s00[12]$"]).unwrap(),
        ["s001", "s002"]
    );
    assert_eq!(client.names(&["kind==committed"]).unwrap().len(), 0);
    let (code, text) = client.names(&["name=="]).unwrap_err();
    assert_eq!(code, RpcStatusCode::INVALID_ARGUMENT, "{text}");
}

#[registered(crate::Test)]
fn upperdir_labels_tell_the_true_path() {
    const LABEL: &str = "containerd.io/snapshot/overlay.upperdir";
    let split = Split::start(&["--upperdir-label"]);
    let client = split.client();
    layer(&client, "base", "", |_| ());
    client.prepare("web", "base", &[]).unwrap();
    client.view("view", "base", &[]).unwrap();
    client.prepare("writable", "base", &[]).unwrap();
    client.commit("writable", "other", &[]).unwrap();
    let (root, writable) = (split.root(), split.writable());
    let expected = [
        ("base", Some(root.join("snapshots/1/fs"))),
        ("other", Some(root.join("snapshots/4/fs"))),
        ("view", None),
        ("web", Some(writable.join("snapshots/2/fs"))),
    ];
    let listed = client.list_pages(&[]).unwrap().concat();
    for ((name, path), listed) in expected.into_iter().zip(listed) {
        let path = path.map(|path| path.to_str().unwrap().to_owned());
        assert_eq!(listed.name, name);
        let updated = client.update(name, &["labels.x"], &[("x", "1")]).unwrap();
        for info in [listed, updated, client.stat(name).unwrap()] {
            assert_eq!(info.labels.get(LABEL), path.as_ref(), "{name}");
        }
    }
}

#[registered(crate::Test)]
fn id_mapped_snapshots_belong_to_the_mapped_root() {
    let split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |_| ());
    let uid = ("containerd.io/snapshot/uidmapping", "0:100000:65536");
    let gid = ("containerd.io/snapshot/gidmapping", "0:200000:65536");
    let mounts = client.prepare("web", "base", &[uid, gid]).unwrap();
    assert_eq!(
        mounts[0].options[..2],
        ["uidmap=0:100000:65536", "gidmap=0:200000:65536"]
    );
    // Repeated, because the kernel then has the answers in memory.
    for _ in 0..3 {
        assert_eq!(client.mounts("web").unwrap(), mounts);
    }
    let fs = split.writable().join("snapshots/2/fs").metadata().unwrap();
    assert_eq!((fs.uid(), fs.gid()), (100_000, 200_000));
    for (uid, gid) in [
        ("0:1:0", "0:1:1"),
        ("nonsense", "0:1:1"),
        ("1:5:1", "0:5:1"),
        ("", "0:1:1"),
    ] {
        let bad = [
            ("containerd.io/snapshot/uidmapping", uid),
            ("containerd.io/snapshot/gidmapping", gid),
        ];
        let (code, text) = client.prepare("bad", "base", &bad).unwrap_err();
        assert_eq!(code, RpcStatusCode::INVALID_ARGUMENT, "{uid} {gid}: {text}");
    }
    assert!(!client.exists("bad"));
    assert_eq!(
        split
            .writable()
            .join("snapshots")
            .read_dir()
            .unwrap()
            .count(),
        1
    );
}

#[registered(crate::Test)]
fn modes_do_not_depend_on_the_umask() {
    let (image, writable) = (Disk::ext4(64), Disk::ext4(64));
    let starter = ["sh", "-c", "umask 077; exec \"$0\" \"$@\""];
    let daemon = Daemon::start_by(&starter, &command(&image, &writable, &[]), &[]);
    let client = daemon.client();
    layer(&client, "base", "", |_| ());
    client.prepare("web", "base", &[]).unwrap();
    let mode = |path: std::path::PathBuf| path.metadata().unwrap().mode() & 0o7777;
    assert_eq!(mode(image.path().join("root/snapshots/1/fs")), 0o755);
    assert_eq!(mode(writable.path().join("writable/snapshots/2/fs")), 0o755);
    assert_eq!(
        mode(writable.path().join("writable/snapshots/2/work")),
        0o711
    );
    assert_eq!(mode(image.path().join("root/snapshots")), 0o700);
    assert_eq!(mode(image.path().join("root/metadata.db")), 0o600);
}

/// In a user namespace, overlayfs may not use `trusted.*` attributes (Linux
/// 5.11).
#[registered(crate::Test)]
fn a_user_namespace_gets_its_own_attributes() {
    let split = Split::in_user_namespace();
    let client = split.client();
    client.prepare("extract-1", "", &[]).unwrap();
    client.commit("extract-1", "base", &[]).unwrap();
    let mounts = client.prepare("web", "base", &[]).unwrap();
    assert!(
        mounts[0].options.iter().any(|option| option == "userxattr"),
        "{mounts:?}"
    );
}
