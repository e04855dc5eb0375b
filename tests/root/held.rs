//! What a mount keeps on the writable volume: layers that do not move while a program
//! may write into them, and leftover directories that a mount still shows.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use registered::registered;
use rustix::mount::{UnmountFlags, mount_bind, unmount};

use crate::content::layer;
use crate::support::client::Client;
use crate::support::containerd::AtEnd;
use crate::support::daemon::{BINARY, Split};
use crate::support::disk::Disk;
use crate::support::mounted::Mounted;
use crate::support::{run, until};

fn is_home(root: &Path, id: u64) -> bool {
    fs::symlink_metadata(root.join(format!("snapshots/{id}"))).is_ok_and(|found| found.is_dir())
}

/// Prepares `key`, writes that many MiB, and commits it as `name`.
fn built(client: &Client, key: &str, parent: &str, name: &str, mebibytes: usize) {
    let mounted = Mounted::new(&client.prepare(key, parent, &[]).unwrap());
    fs::write(mounted.path().join(name), vec![7; mebibytes << 20]).unwrap();
    drop(mounted);
    client.commit(key, name, &[]).unwrap();
}

/// Checks that the layer stays where it is as long as its upper directory is mounted
/// at `top`.
fn check_waits(split: &Split, id: u64, top: &Path, unmount: impl FnOnce()) {
    let client = split.client();
    until("it is put off", || {
        split.daemon.log().contains("is put off")
    });
    for number in 0..3 {
        let key = format!("other-{number}");
        client.prepare(&key, "", &[]).unwrap();
        client.remove(&key).unwrap();
        fs::write(top.join(&key), "still writing").unwrap();
        sleep(Duration::from_millis(100));
    }
    assert!(!is_home(&split.root(), id));
    unmount();
    until("it is home", || {
        client.cleanup().unwrap();
        is_home(&split.root(), id)
    });
    let moved = split.root().join(format!("snapshots/{id}/fs/other-2"));
    assert_eq!(fs::read_to_string(moved).unwrap(), "still writing");
}

const AT_ONCE: [&str; 2] = ["--relocate-after", "0"];

/// A snapshot without a parent is a bind mount.
#[registered(crate::Test)]
fn a_layer_committed_under_a_bind_mount_waits() {
    let split = Split::start(&AT_ONCE);
    let client = split.client();
    let mounted = Mounted::new(&client.prepare("key", "", &[]).unwrap());
    fs::write(mounted.path().join("data"), vec![1; 2 << 20]).unwrap();
    client.commit("key", "layer", &[]).unwrap();
    let top = mounted.path();
    check_waits(&split, 1, &top, || drop(mounted));
}

/// A bind mount of a part of the snapshot's directory, as of a container's volume.
#[registered(crate::Test)]
fn a_layer_waits_for_a_mount_of_a_directory_in_it() {
    let split = Split::start(&AT_ONCE);
    let client = split.client();
    client.prepare("key", "", &[]).unwrap();
    let within = split.writable().join("snapshots/1/fs/within");
    fs::create_dir(&within).unwrap();
    fs::write(within.join("data"), vec![1; 2 << 20]).unwrap();
    let point = tempfile::tempdir().unwrap();
    mount_bind(&within, point.path()).unwrap();
    client.commit("key", "layer", &[]).unwrap();
    until("it is put off", || {
        split.daemon.log().contains("is put off")
    });
    fs::write(point.path().join("late"), "late").unwrap();
    assert!(!is_home(&split.root(), 1));
    unmount(point.path(), UnmountFlags::DETACH).unwrap();
    until("it is home", || {
        client.cleanup().unwrap();
        is_home(&split.root(), 1)
    });
    assert!(split.root().join("snapshots/1/fs/within/late").exists());
}

/// The daemon may be started with another name of the same directory, by a link or by a
/// bind mount, while a container runs.
#[registered(crate::Test)]
fn a_layer_mounted_by_another_name_waits() {
    for is_link in [true, false] {
        let mut split = Split::start(&AT_ONCE);
        let client = split.client();
        layer(&client, "image", "", |top| {
            fs::write(top.join("a"), "a").unwrap()
        });
        let mounted = Mounted::new(&client.prepare("web", "image", &[]).unwrap());
        fs::write(mounted.path().join("mine"), vec![2; 2 << 20]).unwrap();
        split.daemon.stop();
        let other = tempfile::tempdir().unwrap();
        let name = other.path().join("name");
        if is_link {
            symlink(split.writable.path(), &name).unwrap();
        } else {
            fs::create_dir(&name).unwrap();
            mount_bind(split.writable.path(), &name).unwrap();
        }
        let mut arguments = split.daemon.arguments().to_vec();
        arguments[3] = format!("{}/writable", name.display());
        split.daemon.set_arguments(arguments);
        split.daemon.restart();
        split.client().commit("web", "top", &[]).unwrap();
        let top = mounted.path();
        check_waits(&split, 2, &top, || drop(mounted));
        split.daemon.kill();
        if !is_link {
            unmount(&name, UnmountFlags::DETACH).unwrap();
        }
    }
}

/// BuildKit keeps a view of each layer that it has built.
#[registered(crate::Test)]
fn views_that_are_not_mounted_hold_nothing() {
    let split = Split::start(&["--relocate-after", "1"]);
    let client = split.client();
    layer(&client, "image", "", |top| {
        fs::write(top.join("a"), "a").unwrap()
    });
    for number in 0..3 {
        let name = format!("build-{number}");
        built(&client, &format!("run-{number}"), "image", &name, 30);
        client.view(&format!("{name}-view"), &name, &[]).unwrap();
        client.prepare(&format!("{name}-idle"), &name, &[]).unwrap();
    }
    let old = split.writable().join("snapshots");
    let left = || {
        let names = fs::read_dir(&old).unwrap();
        let names = names.map(|entry| entry.unwrap().path());
        names
            .filter(|path| path.join("fs").read_dir().unwrap().count() > 0)
            .count()
    };
    until("all are home", || {
        split
            .daemon
            .log()
            .matches("moved to the image volume")
            .count()
            == 3
    });
    let begun = Instant::now();
    while left() > 0 {
        let limit = Duration::from_secs(60);
        assert!(begun.elapsed() < limit, "{}", status(&split));
        // Other tests' mounts may hold them for a while.
        client.cleanup().unwrap();
        sleep(Duration::from_millis(100));
    }
    let view = Mounted::new(&client.mounts("build-2-view").unwrap());
    assert_eq!(
        fs::read(view.path().join("build-2")).unwrap().len(),
        30 << 20
    );
}

/// Long lists of layers are mounted by names without the root. The upper directory proves
/// that the layers are another snapshotter's; without that proof they may be ours.
#[registered(crate::Test)]
fn another_snapshotters_layers_hold_nothing() {
    for (upper, holds) in [("snapshots/9/fs", false), ("upper", true)] {
        let other = Disk::ext4(64);
        for name in ["snapshots/1/fs", "snapshots/2/fs", "work", "shown", upper] {
            fs::create_dir_all(other.path().join(name)).unwrap();
        }
        let script = "cd \"$1/snapshots\" && mount -t overlay overlay \
            -o lowerdir=2/fs:1/fs,upperdir=\"$1/$2\",workdir=\"$1/work\" \"$1/shown\"";
        run(Command::new("sh").args(["-c", script, "sh", &other.text(), upper]));
        let shown = other.path().join("shown");
        let _unmount = AtEnd(|| unmount(&shown, UnmountFlags::DETACH).unwrap());

        let split = Split::start(&["--relocate-after", "0"]);
        let client = split.client();
        built(&client, "run", "", "layer", 2);
        let old = split.writable().join("snapshots/1");
        until("it is home", || is_home(&split.root(), 1));
        // Beyond the time after which mounts that are not there yet do not count.
        sleep(Duration::from_secs(12));
        client.cleanup().unwrap();
        if holds {
            assert!(old.exists());
        } else {
            until("nothing is left", || {
                client.cleanup().unwrap();
                !old.exists()
            });
        }
    }
}

/// Overlays with the numbers of our snapshots in their paths: in a user's own namespace,
/// where a path that leads nowhere proves nothing, and in a container with a containerd of
/// its own.
#[registered(crate::Test)]
fn numbers_in_other_namespaces_hold_nothing() {
    let user = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let user = [
        &user[..],
        &["unshare", "--user", "--map-root-user", "--mount"],
    ]
    .concat();
    let container = ["unshare", "--mount", "--propagation=private"].to_vec();
    for (starter, then) in [(user, "mount -t tmpfs tmpfs /mnt"), (container, "true")] {
        let script = "mount -t tmpfs tmpfs /mnt && mkdir -p /mnt/snapshots/1/fs /mnt/snapshots/1/work \
                /mnt/lower /mnt/shown && mount -t overlay overlay -o \
                lowerdir=/mnt/lower,upperdir=/mnt/snapshots/1/fs,workdir=/mnt/snapshots/1/work \
                /mnt/shown && $0 && echo ready; exec sleep 300";
        let mut command = Command::new(starter[0]);
        command.args(&starter[1..]).args(["sh", "-c", script, then]);
        let _namespace = Namespace::begin(&mut command, Vec::new());
        let split = Split::start(&["--relocate-after", "0"]);
        let client = split.client();
        built(&client, "run", "", "layer", 2);
        until("it is home", || is_home(&split.root(), 1));
        until("nothing is left", || {
            client.cleanup().unwrap();
            !split.writable().join("snapshots/1").exists()
        });
    }
}

/// A mount namespace in which these directories are mounted in places of their own, until
/// the value is dropped. The mount points are removed together with the mounts.
struct Namespace {
    child: Child,
    _places: Vec<tempfile::TempDir>,
}

impl Namespace {
    fn new(shown: &[PathBuf]) -> Namespace {
        // A terminal obeys the first character.
        let place = || tempfile::Builder::new().prefix("\u{1b}[31mred").tempdir();
        let places: Vec<_> = shown.iter().map(|_| place().unwrap()).collect();
        let script = "while [ $# -gt 0 ]; do mount --bind \"$1\" \"$2\" || exit; shift 2; done
            echo ready; exec sleep 300";
        let mut command = Command::new("unshare");
        let pairs = shown.iter().zip(&places);
        command
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                script,
                "sh",
            ])
            .args(pairs.flat_map(|(from, to)| [from.as_path(), to.path()]));
        Namespace::begin(&mut command, places)
    }

    /// Runs a command that says "ready" when it has mounted everything.
    fn begin(command: &mut Command, places: Vec<tempfile::TempDir>) -> Namespace {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        Namespace {
            child,
            _places: places,
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn status(split: &Split) -> serde_json::Value {
    let shown = Command::new(BINARY)
        .args(["status", "--json"])
        .args(split.daemon.arguments())
        .output()
        .unwrap();
    serde_json::from_slice(&shown.stdout).unwrap()
}

/// A container and two kinds of views hold the old directory. Later mounts show the
/// moved layer and hold nothing.
#[registered(crate::Test)]
fn a_mount_holds_what_it_shows_until_it_ends() {
    let split = Split::start(&["--relocate-after", "1"]);
    let client = split.client();
    built(&client, "one", "", "first", 2);
    built(&client, "two", "first", "second", 2);
    let bound = Mounted::new(&client.view("of-one", "first", &[]).unwrap());
    let view = Mounted::new(&client.view("of-two", "second", &[]).unwrap());
    let container = Mounted::new(&client.prepare("web", "second", &[]).unwrap());
    let old = |id: u64| split.writable().join(format!("snapshots/{id}/fs"));
    until("both are home", || {
        is_home(&split.root(), 1) && is_home(&split.root(), 2)
    });
    // Longer than mounts that were under way at the move count.
    sleep(Duration::from_secs(11));
    client.cleanup().unwrap();
    let later = Mounted::new(&client.view("later", "second", &[]).unwrap());
    let namespace = Namespace::new(&[bound.path(), view.path(), container.path()]);
    let whole = |top: PathBuf, name: &str| fs::read(top.join(name)).unwrap().len() == 2 << 20;
    assert!(whole(bound.path(), "first") && whole(view.path(), "first"));
    let shown = status(&split);
    assert!(shown["held_bytes"].as_u64().unwrap() >= 4 << 20, "{shown}");
    let points = &shown["held"][0]["mounted_at"];
    let point = |mounted: &Mounted| mounted.path().to_str().unwrap().to_owned();
    let points: Vec<_> = points.as_array().unwrap().iter().collect();
    assert!(points.iter().any(|at| **at == *point(&view)), "{shown}");
    let printed = Command::new(BINARY)
        .arg("status")
        .args(split.daemon.arguments())
        .output()
        .unwrap();
    let printed = String::from_utf8(printed.stdout).unwrap();
    assert!(printed.contains("\\u{1b}[31mred"), "{printed:?}");
    assert!(!printed.contains('\u{1b}'), "{printed:?}");

    // The snapshot is removed, but still mounted in a namespace of another
    // process.
    drop((bound, view));
    for key in ["of-one", "of-two"] {
        client.remove(key).unwrap();
    }
    drop(container);
    client.remove("web").unwrap();
    client.cleanup().unwrap();
    sleep(Duration::from_secs(1));
    assert!(old(1).join("first").exists() && old(2).join("second").exists());
    drop(namespace);
    until("nothing is left", || {
        client.cleanup().unwrap();
        !old(1).exists() && !old(2).exists()
    });
    assert!(whole(later.path(), "first") && whole(later.path(), "second"));
    assert_eq!(status(&split)["held_bytes"], 0);
}

/// A Remove waits for no other disk than that of the snapshot.
#[registered(crate::Test)]
fn a_removal_does_not_wait_for_leftovers_on_a_frozen_disk() {
    let split = Split::start(&["--relocate-after", "1"]);
    let client = split.client();
    layer(&client, "spare", "", |top| {
        fs::write(top.join("a"), "a").unwrap()
    });
    built(&client, "key", "", "layer", 2);
    let view = Mounted::new(&client.view("view", "layer", &[]).unwrap());
    until("it is home", || is_home(&split.root(), 2));
    let old = split.writable().join("snapshots/2");
    assert!(old.exists());
    drop(view);
    let frozen = split.writable.freeze();
    let begun = Instant::now();
    client.remove("view").unwrap();
    // The thread is waiting for the disk by then.
    sleep(Duration::from_secs(1));
    client.remove("layer").unwrap();
    client.remove("spare").unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10));
    drop(frozen);
    until("nothing is left", || !old.exists());
}
