//! The writable volume comes and goes while the daemon runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use grpcio::RpcStatusCode;
use registered::registered;
use rustix::mount::{UnmountFlags, mount_bind, unmount};

use crate::content::layer;
use crate::support::client::{Client, Refusal, finish};
use crate::support::daemon::{Split, is_empty, refused};
use crate::support::disk::Disk;
use crate::support::mounted::Mounted;
use crate::support::{run, tree, unchanged};

/// Fails unless the request is refused because the volume is not there, with
/// the path and what to do.
#[track_caller]
fn is_missing<T>(result: Result<T, Refusal>, path: &Path) {
    let Err((code, text)) = result else {
        panic!("it went well without the volume");
    };
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{text}");
    assert!(text.contains(path.to_str().unwrap()), "{text}");
    assert!(text.contains("mount the disk"), "{text}");
}

/// Makes a base layer, a layer on the writable volume, and a container on it.
fn populate(client: &Client) {
    layer(client, "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    client.prepare("init-key", "base", &[]).unwrap();
    client.commit("init-key", "init", &[]).unwrap();
    client.prepare("web", "init", &[]).unwrap();
}

/// Checks what has to work, and what has to be refused, without the volume.
fn serves_what_it_can(client: &Client, writable: &Path, round: &str) {
    is_missing(client.prepare("new", "base", &[]), writable);
    is_missing(client.prepare("new", "", &[]), writable);
    is_missing(client.mounts("web"), writable);
    is_missing(client.usage("web"), writable);
    is_missing(client.commit("web", "layer", &[]), writable);
    // The view stands on a layer whose bytes are on the writable volume.
    is_missing(client.view("new", "init", &[]), writable);
    is_missing(client.prepare("extract-new", "init", &[]), writable);
    assert!(!client.exists("new") && !client.exists("extract-new"));

    let (upper, view) = (format!("upper-{round}"), format!("view-{round}"));
    layer(client, &upper, "base", |top| {
        fs::write(top.join("file"), "upper").unwrap();
    });
    let mounts = client.view(&view, &upper, &[]).unwrap();
    let mounted = Mounted::new(&mounts);
    assert_eq!(
        fs::read_to_string(mounted.path().join("file")).unwrap(),
        "upper"
    );
    assert_eq!(client.mounts(&view).unwrap(), mounts);
    client.view("nothing", "", &[]).unwrap();
    for name in ["base", "init", "web", &upper, &view, "nothing"] {
        client.stat(name).unwrap();
        client
            .update(name, &["labels.seen"], &[("seen", round)])
            .unwrap();
    }
    assert_eq!(client.names(&["labels.seen"]).unwrap().len(), 6);
    client.usage("base").unwrap();
    client.usage("init").unwrap();
    drop(mounted);
    for name in [view.as_str(), "nothing", &upper] {
        client.remove(name).unwrap();
    }
}

#[registered(crate::Test)]
fn unmounted_while_running() {
    let mut split = Split::start(&[]);
    let client = split.client();
    populate(&client);
    client.prepare("gone", "base", &[]).unwrap();
    // Its only layer is on the writable volume.
    let view = client.view("overthere", "init", &[]).unwrap();
    let pid = split.daemon.pid();
    for round in ["first", "second"] {
        for _ in 0..3 {
            assert_eq!(client.mounts("overthere").unwrap(), view);
        }
        // Fails if the daemon keeps anything on it open.
        split.writable.unmount();
        assert!(is_empty(split.writable.path()));
        is_missing(client.mounts("overthere"), &split.writable());
        serves_what_it_can(&client, &split.writable(), round);
        if round == "first" {
            // Its bytes are deleted when they can be reached.
            client.remove("gone").unwrap();
        }
        is_missing(client.cleanup(), &split.writable());
        assert!(is_empty(split.root().join("trash")), "this much it can do");
        assert!(is_empty(split.writable.path()), "the mount point is bare");

        split.writable.mount();
        let mounts = client.mounts("web").unwrap();
        let mounted = Mounted::new(&mounts);
        fs::write(mounted.path().join(round), "written").unwrap();
        drop(mounted);
        client.prepare("new", "init", &[]).unwrap();
        client.remove("new").unwrap();
        client.cleanup().unwrap();
        assert!(is_empty(split.writable().join("trash")));
        let left = fs::read_dir(split.writable().join("snapshots")).unwrap();
        assert_eq!(left.count(), 2, "init and web");
    }
    assert!(split.daemon.is_running() && split.daemon.pid() == pid);
}

#[registered(crate::Test)]
fn missing_at_start() {
    let mut split = Split::start(&[]);
    populate(&split.client());
    split.daemon.stop();
    split.writable.unmount();
    split.daemon.restart();
    let log = split.daemon.log();
    assert!(log.contains("containers cannot be started"), "{log}");
    assert!(log.contains(split.writable().to_str().unwrap()), "{log}");
    let client = split.client();
    serves_what_it_can(&client, &split.writable(), "late");
    assert!(is_empty(split.writable.path()), "the mount point is bare");
    split.writable.mount();
    let mounted = Mounted::new(&client.mounts("web").unwrap());
    assert_eq!(
        fs::read_to_string(mounted.path().join("file")).unwrap(),
        "base"
    );
    client.prepare("new", "init", &[]).unwrap();
    client.commit("new", "layer", &[]).unwrap();
    client.cleanup().unwrap();
}

#[registered(crate::Test)]
fn another_disk_in_its_place() {
    let split = Split::start(&[]);
    let client = split.client();
    populate(&client);
    // Another snapshotter's volume, and a disk with only the directory.
    let other = Split::start(&[]);
    let blank = Disk::ext4(64);
    fs::create_dir(blank.path().join("writable")).unwrap();
    for disk in [&other.writable, &blank] {
        let before = tree(disk.path().join("writable"));
        mount_bind(disk.path(), split.writable.path()).unwrap();
        is_missing(client.prepare("new", "base", &[]), &split.writable());
        is_missing(client.mounts("web"), &split.writable());
        is_missing(client.cleanup(), &split.writable());
        unmount(split.writable.path(), UnmountFlags::empty()).unwrap();
        unchanged(disk.path().join("writable"), &before);
        client.mounts("web").unwrap();
    }
    client.prepare("new", "base", &[]).unwrap();
}

#[registered(crate::Test)]
fn read_only() {
    let split = Split::start(&[]);
    let client = split.client();
    populate(&client);
    split.writable.remount("ro");
    let (code, text) = client.prepare("new", "base", &[]).unwrap_err();
    assert_eq!(code, RpcStatusCode::FAILED_PRECONDITION, "{text}");
    assert!(text.contains(split.writable().to_str().unwrap()), "{text}");
    assert!(text.contains("Read-only"), "{text}");
    assert!(!client.exists("new"));
    client.view("view", "init", &[]).unwrap();
    // A removal deletes the row; the bytes follow later.
    client.remove("web").unwrap();
    split.writable.remount("rw");
    client.prepare("new", "base", &[]).unwrap();
    client.cleanup().unwrap();
    let left = fs::read_dir(split.writable().join("snapshots")).unwrap();
    assert_eq!(left.count(), 2, "init and new");
}

#[registered(crate::Test)]
fn the_root_by_another_name() {
    let disk = Disk::ext4(64);
    let (root, link) = (disk.path().join("root"), disk.path().join("link"));
    fs::create_dir(&root).unwrap();
    std::os::unix::fs::symlink(&root, &link).unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let text = refused(&[
        "--root-dir".to_owned(),
        path(&root),
        "--writable-dir".to_owned(),
        path(&link),
    ]);
    assert!(text.contains("by another name"), "{text}");
    assert!(!root.join(".volume").exists());
}

/// Another program's files are not the snapshot's, wherever they are mounted.
#[registered(crate::Test)]
fn what_is_mounted_in_a_removed_snapshot() {
    let split = Split::start(&[]);
    let client = split.client();
    client.prepare("web", "", &[]).unwrap();
    let (elsewhere, file) = (tempfile::tempdir().unwrap(), "precious");
    fs::write(elsewhere.path().join(file), "x").unwrap();
    let below = split.writable().join("snapshots/1/fs/below");
    fs::create_dir(&below).unwrap();
    mount_bind(elsewhere.path(), &below).unwrap();
    client.usage("web").unwrap();
    client.remove("web").unwrap();
    let (code, text) = client.cleanup().unwrap_err();
    assert_eq!(code, RpcStatusCode::INTERNAL, "{text}");
    assert!(elsewhere.path().join(file).exists());
    unmount(
        split.writable().join("trash/1/fs/below"),
        UnmountFlags::empty(),
    )
    .unwrap();
    client.cleanup().unwrap();
    assert!(is_empty(split.writable().join("trash")));
    assert!(elsewhere.path().join(file).exists());
}

/// A removal that read each directory above such an entry again a few times would
/// take longer than the age of the universe.
#[registered(crate::Test)]
fn what_cannot_be_deleted_is_tried_once_however_deep() {
    let split = Split::start(&[]);
    let client = split.client();
    client.prepare("web", "", &[]).unwrap();
    client.prepare("other", "", &[]).unwrap();
    let levels = |number: usize| (0..number).map(|_| "d").collect::<PathBuf>();
    let upper = split.writable().join("snapshots/1/fs");
    let (mounted, beside) = (
        upper.join(levels(100)),
        upper.join(levels(50)).join("beside"),
    );
    fs::create_dir_all(&mounted).unwrap();
    fs::write(&beside, "x").unwrap();
    // An immutable directory, where the removal moves deep entries to the top.
    let immutable = split.writable().join("snapshots/2/fs").join(levels(140));
    fs::create_dir_all(&immutable).unwrap();
    for directory in immutable.ancestors().take(20) {
        run(Command::new("chattr").arg("+i").arg(directory));
    }
    mount_bind(&upper, &mounted).unwrap();
    client.remove("web").unwrap();
    client.remove("other").unwrap();
    let (_, text) = client.cleanup().unwrap_err();
    assert!(
        text.contains("1 entries cannot be deleted, the first one is \"d\""),
        "{text}"
    );
    // The deep entries were moved to the top of the trash.
    let trash = split.writable().join("trash");
    let found = run(Command::new("find")
        .arg(&trash)
        .args(["-xdev", "-name", "beside"]));
    assert_eq!(found, "");
    assert!(!trash.join("2").exists());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let point = mounts
        .split_ascii_whitespace()
        .find(|word| Path::new(word).starts_with(&trash))
        .unwrap();
    unmount(point, UnmountFlags::empty()).unwrap();
    client.cleanup().unwrap();
    assert!(is_empty(split.writable().join("trash")));
}

/// While requests wait for the writable disk, an existing container can be asked
/// for its mounts, and every snapshot can be queried.
#[registered(crate::Test)]
fn a_disk_that_hangs() {
    let split = Split::start(&[]);
    let client = split.client();
    populate(&client);
    let mounts = client.mounts("web").unwrap();
    let frozen = split.writable.freeze();
    let waiting: Vec<_> = (0..40)
        .map(|number| client.begin_prepare(&format!("new-{number}"), "init", &[]))
        .collect();
    let another = split.client();
    for _ in 0..100 {
        assert_eq!(another.mounts("web").unwrap(), mounts);
        assert_eq!(another.stat("web").unwrap().parent, "init");
    }
    assert!(!another.exists("new-0"), "the disk did not hang");
    drop(frozen);
    for prepared in waiting {
        finish(prepared).unwrap();
    }
    assert!(another.exists("new-0"));
}
