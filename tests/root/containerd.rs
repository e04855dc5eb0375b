//! From end to end: a real containerd with the daemon as its snapshotter, an
//! image of five layers, and running containers.

mod damaged;
mod healing;
mod killed;
mod lowers;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use registered::registered;
use rustix::process::Signal;

use crate::support::containerd::{Containerd, IMAGE, Listed, archive, wait_for};
use crate::support::daemon::{Split, is_empty};
use crate::support::disk::Disk;
use crate::support::{device, run};

/// The committed snapshots from the image's first layer to its last.
fn layers(containerd: &Containerd) -> Vec<String> {
    let snapshots = containerd.snapshots();
    let mut layers = Vec::new();
    let mut parent = String::new();
    let is_next = |listed: &&Listed, parent: &str| {
        listed.parent == parent && listed.kind == "Committed" && listed.key.starts_with("sha256:")
    };
    while let Some(layer) = snapshots.iter().find(|listed| is_next(listed, &parent)) {
        parent.clone_from(&layer.key);
        layers.push(layer.key.clone());
    }
    layers
}

/// Everything below a directory, without following links.
fn paths_below(directory: &Path) -> Vec<PathBuf> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.symlink_metadata().unwrap().is_dir() {
            paths.extend(paths_below(&path));
        }
        paths.push(path);
    }
    paths
}

fn is_whiteout(path: PathBuf) -> bool {
    let metadata = fs::symlink_metadata(path).unwrap();
    metadata.file_type().is_char_device() && metadata.rdev() == 0
}

/// Everything that is left of snapshots, removed or not.
fn left(split: &Split) -> Vec<PathBuf> {
    [split.root(), split.writable()]
        .iter()
        .flat_map(|volume| [volume.join("snapshots"), volume.join("trash")])
        .flat_map(|directory| fs::read_dir(directory).unwrap())
        .map(|entry| entry.unwrap().path())
        .collect()
}

#[registered(crate::Test)]
fn an_image_and_its_container_are_on_two_disks() {
    let split = Split::start(&[]);
    let containerd = Containerd::start(split.daemon.address());
    containerd.import();
    split.image.sync();
    let free = (split.image.free(), split.writable.free());
    containerd.start_container(
        "web",
        "head -c 4194304 /dev/zero >/new
         echo changed >/etc/motd
         rm /etc/hostname
         touch /done",
    );
    let overlay = containerd.overlay("web");
    let upper = overlay.upper.unwrap();
    wait_for("end of the container's work", || {
        upper.join("done").symlink_metadata()
    });

    // The view of the container: deleted by a layer, hidden by an opaque
    // directory, changed and deleted by the container.
    let seen = containerd.exec(
        "web",
        "ls -d /etc/obsolete.conf /srv/old /opt/data/passing.txt /etc/hostname 2>/dev/null |
             wc -l
         ls /opt/app
         cat /etc/motd
         wc -c </new
         cat /opt/tool/second",
    );
    assert_eq!(
        seen,
        "0\nonly.txt\nchanged\n4194304\n#!/bin/sh\necho one file, two names\n"
    );

    // The view of the host.
    let (image, writable) = (device(split.image.path()), device(split.writable.path()));
    let lowers: Vec<_> = overlay.lowers.into_iter().rev().collect();
    let of_each_layer = [
        "bin/busybox",
        "opt/data/payload",
        "etc/obsolete.conf",
        "opt/app/only.txt",
        "etc/motd",
    ];
    assert_eq!(lowers.len(), of_each_layer.len());
    for (lower, file) in lowers.iter().zip(of_each_layer) {
        assert_eq!(device(lower.join(file)), image, "{file}");
    }
    assert!(is_whiteout(lowers[2].join("etc/obsolete.conf")));
    assert_eq!(
        fs::read_to_string(lowers[4].join("etc/motd")).unwrap(),
        "motd of layer 5\n"
    );
    for file in ["new", "etc/motd", "etc/hostname"] {
        assert_eq!(device(upper.join(file)), writable, "{file}");
    }
    assert!(is_whiteout(upper.join("etc/hostname")));
    for path in paths_below(&split.root().join("snapshots")) {
        assert_eq!(device(&path), image, "{}", path.display());
        assert!(!path.ends_with("fs/new"), "{}", path.display());
    }
    for path in paths_below(&split.writable().join("snapshots")) {
        assert!(!path.ends_with("bin/busybox"), "{}", path.display());
    }
    split.image.sync();
    split.writable.sync();
    // The database is on the image disk in this test, and grows a little.
    assert!(split.image.free() + (256 << 10) > free.0);
    assert!(split.writable.free() + (4 << 20) <= free.1);

    containerd.stop("web");
    containerd.remove("web");
    containerd.collect_garbage();
    assert!(is_empty(split.writable().join("snapshots")));
    assert_eq!(layers(&containerd).len(), 5);
}

/// Size and inodes, in a line of `ctr snapshot usage`.
fn usage(containerd: &Containerd, key: &str) -> (u64, u64) {
    let text = containerd.ctr(&["snapshot", "usage", "-b", key]);
    let fields: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!((fields.len(), fields[0]), (3, key));
    (fields[1].parse().unwrap(), fields[2].parse().unwrap())
}

/// Names in the archive that `ctr snapshot diff` gives.
fn diff(containerd: &Containerd, key: &str) -> BTreeSet<String> {
    let plain = "application/vnd.oci.image.layer.v1.tar";
    let output = containerd.ctr_output(&["snapshot", "diff", "--media-type", plain, key]);
    assert!(output.status.success(), "{output:?}");
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), output.stdout).unwrap();
    let names = run(Command::new("tar").arg("-tf").arg(file.path()));
    names.lines().map(str::to_owned).collect()
}

/// Mounts with the command that `ctr` prints. The end of the containerd
/// unmounts it.
fn mount_printed(command: &str) {
    run(Command::new("sh").args(["-ec", command]));
}

#[registered(crate::Test)]
fn every_snapshot_command_of_ctr_works() {
    let split = Split::start(&[]);
    let containerd = Containerd::start(split.daemon.address());
    containerd.import();
    containerd.start_container("web", "echo new >/new");
    let layers = layers(&containerd);
    let top = layers.last().unwrap().as_str();

    // list, tree, info, label
    assert_eq!(layers.len(), 5);
    let listed = |key: &str| containerd.snapshot(key);
    let expected = |key: &str, parent: &str, kind: &str| {
        Some(Listed {
            key: key.to_owned(),
            parent: parent.to_owned(),
            kind: kind.to_owned(),
        })
    };
    assert_eq!(listed("web"), expected("web", top, "Active"));
    let tree = containerd.ctr(&["snapshot", "tree"]);
    let indents: Vec<_> = tree.lines().map(|line| line.find("\\_")).collect();
    assert_eq!(
        indents,
        [None, Some(2), Some(4), Some(6), Some(8), Some(10)]
    );
    assert!(tree.trim_end().ends_with("\\_ web"), "{tree}");
    let info = |key: &str| containerd.ctr(&["snapshot", "info", key]);
    assert!(info("web").contains(&format!("\"Parent\": \"{top}\"")));
    assert!(info(top).contains("\"Kind\": \"Committed\""));
    containerd.ctr(&["snapshot", "label", "web", "example.com/some.label=value"]);
    assert!(info("web").contains("\"example.com/some.label\": \"value\""));
    containerd.ctr(&["snapshot", "label", "web", "example.com/some.label="]);
    assert!(!info("web").contains("some.label"));

    // usage: exactly what was written
    let before = usage(&containerd, "web");
    containerd.exec("web", "head -c 1048576 /dev/zero >/more");
    split.writable.sync();
    let after = usage(&containerd, "web");
    assert_eq!((after.0 - before.0, after.1 - before.1), (1 << 20, 1));
    let payload = usage(&containerd, &layers[1]);
    assert!((1 << 20..2 << 20).contains(&payload.0), "{payload:?}");

    // diff, of a running container
    containerd.exec("web", "echo changed >/etc/motd; rm /etc/hostname");
    let changes = diff(&containerd, "web");
    for name in ["new", "more", "etc/motd", "etc/.wh.hostname"] {
        assert!(changes.contains(name), "{name}: {changes:?}");
    }
    assert!(!changes.contains("bin/busybox"));

    // commit, of a container's snapshot
    let active = containerd.overlay("web");
    containerd.stop("web");
    containerd.ctr(&["snapshot", "commit", "web-layer", "web"]);
    assert_eq!(listed("web"), None);
    let committed = expected("web-layer", top, "Committed");
    assert_eq!(listed("web-layer"), committed);
    assert_eq!(diff(&containerd, "web-layer"), changes);
    containerd.remove("web");
    containerd.collect_garbage();
    assert_eq!(listed("web-layer"), committed);

    // prepare, and a container on that
    let target = containerd.subdirectory("prepared");
    let mount = containerd.ctr(&[
        "snapshot",
        "prepare",
        "--target",
        &target,
        "next",
        "web-layer",
    ]);
    assert_eq!(listed("next"), expected("next", "web-layer", "Active"));
    let next = containerd.overlay("next");
    assert_eq!(next.lowers[1..], active.lowers);
    // The image disk has a link to the layer, whose bytes are still where they
    // were written.
    let home = next.lowers[0].parent().unwrap();
    assert_eq!(
        home.parent(),
        Some(split.root().join("snapshots").as_path())
    );
    assert_eq!(
        fs::canonicalize(home.join("fs")).unwrap(),
        fs::canonicalize(active.upper.unwrap()).unwrap()
    );
    mount_printed(&mount);
    let seen = containerd.run_on(
        &target,
        "next",
        "cat /new /etc/motd; ls /etc/hostname 2>/dev/null || echo gone; rm /new; echo 2 >/second",
    );
    assert_eq!(seen, "new\nchanged\ngone\n");
    let upper = next.upper.unwrap();
    assert!(is_whiteout(upper.join("new")));
    assert_eq!(device(upper.join("second")), device(split.writable.path()));
    run(Command::new("umount").arg(&target));

    // view: `ctr` does not protect a view from garbage collection, which runs
    // soon after anything was removed, and so has to be over
    containerd.collect_garbage();
    let target = containerd.subdirectory("viewed");
    let mount = containerd.ctr(&["snapshot", "view", "--target", &target, "view", "web-layer"]);
    assert_eq!(listed("view"), expected("view", "web-layer", "View"));
    assert_eq!(containerd.overlay("view").upper, None);
    mount_printed(&mount);
    let target = Path::new(&target);
    assert_eq!(fs::read_to_string(target.join("new")).unwrap(), "new\n");
    assert!(!target.join("second").exists());
    assert!(
        fs::write(target.join("written"), "").is_err(),
        "a view is read-only"
    );
    run(Command::new("umount").arg(target));

    // rm
    let refused = containerd.try_ctr(&["snapshot", "rm", "web-layer"]);
    assert!(refused.unwrap_err().contains("failed precondition"));
    containerd.ctr(&["snapshot", "rm", "view", "next"]);
    containerd.ctr(&["snapshot", "rm", "web-layer"]);
    containerd.collect_garbage();
    assert_eq!(containerd.snapshots().len(), 5);
    assert!(fs::symlink_metadata(home).is_err());
    assert!(is_empty(split.writable().join("snapshots")));
    assert!(is_empty(split.writable().join("trash")));
}

/// How much the block device of a disk has written so far: requests and sectors
/// (`stat` in sysfs, fields 5 and 7; Documentation/block/stat.rst). A request
/// without sectors makes the device flush its cache.
fn written(disk: &Disk) -> (u64, u64) {
    let text = fs::read_to_string(format!("/sys/block/{}/stat", disk.block_name())).unwrap();
    let field = |number: usize| text.split_whitespace().nth(number - 1).unwrap();
    (field(5).parse().unwrap(), field(7).parse().unwrap())
}

#[registered(crate::Test)]
fn fifty_containers_leave_the_image_disk_asleep() {
    const CONTAINERS: u64 = 50;
    // ext4 leaves parts of a new file system to be written later, by a thread
    // of the kernel, unless these options are set.
    let at_once = "lazy_itable_init=0,lazy_journal_init=0";
    let image = Disk::make(
        256,
        "ext4",
        &["-q", "-F", "-m", "0", "-b", "4096", "-E", at_once],
    );
    let writable = Disk::ext4(256);
    let state = format!("{}/state", writable.text());
    let split = Split::on(image, writable, &["--state-dir", &state]);
    let containerd = Containerd::start(split.daemon.address());
    containerd.import();
    split.image.sync();
    let (requests, sectors) = written(&split.image);
    assert!(sectors > 2 * (1 << 20) / 512, "an import is seen");
    let (_, writable_sectors) = written(&split.writable);

    for number in 0..CONTAINERS {
        let id = format!("sleeper-{number}");
        let seen = containerd.run(&id, "echo $$ >/written; cat /opt/app/only.txt /written");
        assert_eq!(seen, "the only file here\n1\n");
    }
    containerd.collect_garbage();
    assert!(is_empty(split.writable().join("snapshots")));
    split.image.sync();
    split.writable.sync();
    let (requests_after, sectors_after) = written(&split.image);
    assert_eq!(sectors_after, sectors);
    // Any sync(2) on this machine, and the one above, flushes this disk as
    // well, but no container has caused it.
    assert!(requests_after - requests < CONTAINERS / 2);
    assert!(written(&split.writable).1 > writable_sectors);
}

/// A container that counts in a file, and the file as the host sees it.
fn start_counter(containerd: &Containerd, id: &str) -> PathBuf {
    containerd.start_container(
        id,
        "i=0; while :; do i=$((i + 1)); echo $i >/count; sleep 0.02; done",
    );
    containerd.overlay(id).upper.unwrap().join("count")
}

fn wait_until_counting(count: &Path) {
    // The file may be empty at this moment, or not exist yet.
    let read = || fs::read_to_string(count).ok()?.trim().parse::<u64>().ok();
    let from = wait_for("count", || read().ok_or("no number"));
    wait_for("further count", || {
        read().filter(|count| *count > from + 2).ok_or(from)
    });
}

#[registered(crate::Test)]
fn containers_outlive_a_restart_of_the_daemon() {
    let mut split = Split::start(&[]);
    let containerd = Containerd::start(split.daemon.address());
    containerd.import();
    let count = start_counter(&containerd, "counter");
    wait_until_counting(&count);
    for (is_killed, id) in [(false, "after-term"), (true, "after-kill")] {
        if is_killed {
            split.daemon.kill();
        } else {
            split.daemon.stop();
        }
        wait_until_counting(&count);
        containerd.exec("counter", &format!("echo while down >/{id}"));
        let said = containerd.try_run("refused", "true").unwrap_err();
        assert!(said.contains("unavailable"), "{said}");
        split.daemon.restart();
        wait_until_counting(&count);
        assert_eq!(
            containerd.exec("counter", &format!("cat /{id}")),
            "while down\n"
        );
        // containerd tries to connect at growing intervals.
        wait_for("answer of the daemon", || {
            containerd.try_ctr(&["snapshot", "info", "counter"])
        });
        assert_eq!(containerd.run(id, "cat /etc/motd"), "motd of layer 5\n");
    }
    containerd.stop("counter");
    containerd.remove("counter");
    containerd.collect_garbage();
    assert!(is_empty(split.writable().join("snapshots")));
    assert_eq!(
        containerd.run("last", "cat /opt/app/only.txt"),
        "the only file here\n"
    );
}

#[registered(crate::Test)]
fn containers_outlive_a_restart_of_containerd() {
    let split = Split::start(&[]);
    let mut containerd = Containerd::start(split.daemon.address());
    containerd.import();
    let count = start_counter(&containerd, "counter");
    for (signal, id) in [(Signal::TERM, "after-term"), (Signal::KILL, "after-kill")] {
        wait_until_counting(&count);
        containerd.restart(signal);
        wait_until_counting(&count);
        assert_eq!(
            containerd.exec("counter", "cat /etc/hostname"),
            "split-test\n"
        );
        assert_eq!(containerd.run(id, "cat /etc/motd"), "motd of layer 5\n");
    }
    containerd.stop("counter");
    containerd.remove("counter");
    containerd.collect_garbage();
    assert!(is_empty(split.writable().join("snapshots")));
    assert_eq!(layers(&containerd).len(), 5);
}

#[registered(crate::Test)]
fn removing_everything_gives_the_space_back() {
    // The database is elsewhere, because it would grow on one of the disks.
    let state = tempfile::tempdir().unwrap();
    let split = Split::start(&["--state-dir", state.path().to_str().unwrap()]);
    let containerd = Containerd::start(split.daemon.address());
    let free = || {
        split.image.sync();
        split.writable.sync();
        (split.image.free(), split.writable.free())
    };
    let before = free();
    containerd.import();
    containerd.start_container("web", "true");
    containerd.exec("web", "head -c 8388608 /dev/zero >/big");
    let full = free();
    let archive_bytes = fs::metadata(archive()).unwrap().len();
    assert!(full.0 + archive_bytes / 2 < before.0);
    assert!(full.1 + (8 << 20) <= before.1);

    containerd.stop("web");
    containerd.remove("web");
    containerd.ctr(&["image", "rm", "--sync", IMAGE]);
    assert_eq!(containerd.snapshots(), []);
    assert!(left(&split).is_empty(), "{:?}", left(&split));
    assert_eq!(free(), before);
}
