//! Work that a container, a removal, or a disk that does not answer can make large or
//! slow, and what has to go on meanwhile.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use grpcio::RpcStatusCode;
use registered::registered;
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, mkdirat, open, openat};

use crate::check::is_clean;
use crate::content::layer;
use crate::support::client::finish;
use crate::support::daemon::{Split, is_empty};
use crate::support::disk::Disk;
use crate::support::mounted::upper_of;
use crate::support::{run, until};

const LOWERS: &str = "containerd.io/snapshot/overlay-custom-add-lower.paths";

/// Two disks, and a daemon that is started through another command.
fn start_by(starter: &[&str], flags: &[&str]) -> Split {
    Split::start_by(starter, Disk::ext4(256), Disk::ext4(256), flags)
}

/// Makes that many directories, each in the one before, with a file in each.
fn nest(top: &Path, levels: u32) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let mut at: OwnedFd = open(top, flags, Mode::empty()).unwrap();
    for _ in 0..levels {
        openat(&at, c"file", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
        mkdirat(&at, c"d", Mode::RWXU).unwrap();
        at = openat(&at, c"d", flags, Mode::empty()).unwrap();
    }
}

#[registered(crate::Test)]
fn deep_trees_need_few_descriptors() {
    const LEVELS: u32 = 4090;
    let few = ["prlimit", "--nofile=256:256", "--"];
    let mut split = start_by(&few, &["--relocate-after", "0", "--async-remove", "false"]);
    let client = split.client();
    for key in ["a", "b", "c", "d"] {
        nest(&upper_of(&client.prepare(key, "", &[]).unwrap()), LEVELS);
    }
    scope(|scope| {
        for key in ["a", "b", "c", "d"] {
            let client = split.client();
            scope.spawn(move || {
                let usage = client.usage(key).unwrap();
                assert_eq!(usage.inodes, i64::from(2 * LEVELS + 1), "{key}");
            });
        }
    });
    client.commit("a", "layer", &[]).unwrap();
    until("the layer is moved", || {
        split
            .daemon
            .log()
            .contains("\"layer\" moved to the image volume")
    });
    for key in ["b", "c", "layer"] {
        client.remove(key).unwrap();
    }
    until("what was removed is deleted", || {
        is_empty(split.root().join("trash")) && is_empty(split.writable().join("trash"))
    });
    let log = split.daemon.log();
    assert!(!log.contains("Too many open files"), "{log}");
    split.daemon.stop();
}

/// A container may create as many deep directories as its disk has inodes.
#[registered(crate::Test)]
fn many_deep_directories_need_no_memory_to_be_deleted() {
    // They are in the first directory that is too deep to be emptied where it is.
    const DIRECTORIES: u32 = 60_000;
    const LEVELS: usize = 46;
    let disk = Disk::make(4000, "xfs", &["-q"]);
    let split = Split::on(Disk::ext4(64), disk, &[]);
    let client = split.client();
    let upper = upper_of(&client.prepare("web", "", &[]).unwrap());
    let deep = upper.join(["d"; LEVELS].join("/"));
    fs::create_dir_all(&deep).unwrap();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    let top = open(&deep, flags, Mode::empty()).unwrap();
    for number in 0..DIRECTORIES {
        let name = format!("{number}");
        mkdirat(&top, &*name, Mode::RWXU).unwrap();
        mkdirat(&top, format!("{name}/d"), Mode::RWXU).unwrap();
    }
    drop(top);
    client.remove("web").unwrap();
    let before = split.daemon.resident_bytes();
    let mut most = before;
    scope(|scope| {
        let cleanup = scope.spawn(|| split.client().cleanup().unwrap());
        while !cleanup.is_finished() {
            most = most.max(split.daemon.resident_bytes());
            sleep(Duration::from_millis(2));
        }
    });
    assert!(is_empty(split.writable().join("trash")));
    let grown = most - before;
    assert!(grown < 1 << 20, "{grown}");
}

#[registered(crate::Test)]
fn a_removal_at_once_deletes_its_own_and_keeps_no_other_request_waiting() {
    let split = Split::start(&["--threads", "2", "--async-remove", "false"]);
    let client = split.client();
    for key in ["a", "b", "c", "d"] {
        let top = upper_of(&client.prepare(key, "", &[]).unwrap());
        fs::write(top.join("file"), key).unwrap();
    }
    let other = split.writable().join("trash/other");
    fs::create_dir_all(&other).unwrap();
    client.remove("a").unwrap();
    let left: Vec<_> = fs::read_dir(other.parent().unwrap()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(other.is_dir());

    let frozen = split.writable.freeze();
    let removals = ["b", "c", "d"].map(|key| client.begin_remove(key));
    sleep(Duration::from_millis(300));
    let begun = Instant::now();
    client.prepare("default/1/extract-1 x", "", &[]).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10), "{begun:?}");
    drop(frozen);
    for removal in removals {
        finish(removal).unwrap();
    }
    client.cleanup().unwrap();
    assert!(is_empty(split.writable().join("trash")));
}

#[registered(crate::Test)]
fn a_cleanup_behind_another_waits_for_it_without_a_thread() {
    // Two of the workers do long work.
    let split = Split::start(&["--threads", "4"]);
    let client = split.client();
    let key = "default/1/extract-1 x";
    client.prepare(key, "", &[]).unwrap();
    let top = upper_of(&client.prepare("web", "", &[]).unwrap());
    fs::write(top.join("file"), "x").unwrap();
    client.remove("web").unwrap();
    let frozen = split.writable.freeze();
    let long = Duration::from_secs(100);
    let first = client.begin_cleanup(long);
    sleep(Duration::from_millis(300));
    let others = [long, Duration::from_secs(1), long].map(|limit| client.begin_cleanup(limit));
    let [second, short, third] = others;
    let begun = Instant::now();
    let (code, _) = finish(short).unwrap_err();
    assert_eq!(code, RpcStatusCode::DEADLINE_EXCEEDED);
    // Counting is long work, too.
    client.usage(key).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10));
    drop(frozen);
    for cleanup in [first, second, third] {
        finish(cleanup).unwrap();
    }
    assert!(is_empty(split.writable().join("trash")));
}

#[registered(crate::Test)]
fn host_directories_on_a_dead_disk_keep_no_other_request_waiting() {
    let (dead, alive) = (Disk::ext4(64), tempfile::tempdir().unwrap());
    let allowed = [dead.text(), alive.path().display().to_string()];
    let flags = ["--allow-lower", &allowed[0], "--allow-lower", &allowed[1]];
    let split = Split::start(&flags);
    let client = split.client();
    client.prepare("before", "", &[]).unwrap();
    let frozen = dead.freeze();
    // Creating a missing directory there waits for the disk.
    let ask = |number: u32| {
        let path = format!("{}/{number}", dead.text());
        client.begin_prepare(&format!("dead {number}"), "", &[(LOWERS, &path)])
    };
    let mut waiting: Vec<_> = (0..16).map(ask).collect();
    sleep(Duration::from_millis(300));
    let begun = Instant::now();
    client.prepare("plain", "", &[]).unwrap();
    client.remove("before").unwrap();
    let path = format!("{}/x", allowed[1]);
    client.prepare("alive", "", &[(LOWERS, &path)]).unwrap();
    client.mounts("alive").unwrap();
    client
        .update("plain", &["labels.x"], &[("x", "y")])
        .unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{begun:?}");

    waiting.extend((16..32).map(ask));
    sleep(Duration::from_millis(300));
    let (code, text) = finish(ask(32)).unwrap_err();
    assert_eq!(code, RpcStatusCode::UNAVAILABLE);
    assert!(text.contains("--allow-lower"), "{text}");
    client.prepare("still plain", "", &[]).unwrap();
    drop(frozen);
    for prepare in waiting {
        finish(prepare).unwrap();
    }
    assert!(!client.exists("dead 32"));
    assert!(!dead.path().join("32").exists());
}

#[registered(crate::Test)]
fn a_layer_that_does_not_fit_is_not_copied() {
    const SIZE: usize = 48 << 20;
    let (image, writable) = (Disk::ext4(64), Disk::ext4(256));
    let state_dir = format!("{}/state", writable.text());
    let flags = ["--relocate-after", "0", "--state-dir", &state_dir];
    let filler = File::create(image.path().join("filler")).unwrap();
    fallocate(&filler, FallocateFlags::empty(), 0, 32 << 20).unwrap();
    let split = Split::on(image, writable, &flags);
    let client = split.client();
    let commit = |key: &str, bytes: usize| {
        let top = upper_of(&client.prepare(key, "", &[]).unwrap());
        fs::write(top.join("data"), vec![9; bytes]).unwrap();
        client.commit(key, &format!("layer {key}"), &[]).unwrap();
    };
    commit("large", SIZE);
    until("it is said", || {
        let log = split.daemon.log();
        log.contains("\"layer large\" stays on the writable volume")
    });
    // A smaller layer does not wait for it.
    commit("small", 2 << 20);
    until("the small one is moved", || {
        split
            .daemon
            .log()
            .contains("\"layer small\" moved to the image volume")
    });
    split.image.sync();
    let before = split.image.writes();
    for _ in 0..20 {
        client.cleanup().unwrap();
        sleep(Duration::from_millis(20));
    }
    split.image.sync();
    let written = split.image.writes() - before;
    // A single copy would be more than that.
    assert!(written < 200, "{written} writes");
    let log = split.daemon.log();
    let said = log.matches("stays on the writable volume").count();
    assert_eq!(said, 1, "{log}");

    drop(filler);
    fs::remove_file(split.image.path().join("filler")).unwrap();
    // Room that another program makes is seen within a minute, that of a layer at once.
    client.remove("layer small").unwrap();
    client.cleanup().unwrap();
    until("the large one is moved", || {
        split
            .daemon
            .log()
            .contains("\"layer large\" moved to the image volume")
    });
}

#[registered(crate::Test)]
fn directories_that_do_not_say_what_their_entries_are() {
    let mut split = Split::start(&[]);
    layer(&split.client(), "base", "", |top| {
        fs::write(top.join("file"), "x").unwrap();
    });
    split.daemon.stop();
    let disk = Disk::make(64, "ext4", &["-q", "-F", "-O", "^filetype"]);
    run(Command::new("cp")
        .arg("-a")
        .arg(split.root())
        .arg(disk.path()));
    let mut arguments = split.daemon.arguments().to_vec();
    arguments[1] = format!("{}/root", disk.text());
    split.daemon.set_arguments(arguments);
    is_clean(&split);
}
