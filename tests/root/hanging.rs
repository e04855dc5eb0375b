//! Starts, stops and commands beside a writable disk that does not answer, and a start
//! beside a command that has the root's lock for a moment.

use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use grpcio::RpcStatusCode;
use registered::registered;
use rustix::fs::{FlockOperation, flock};

use crate::check::{check, is_clean};
use crate::content::layer;
use crate::support::client::{Client, Refusal};
use crate::support::daemon::{BINARY, Daemon, Split, is_empty, refused};
use crate::support::dead::Dead;
use crate::support::disk::Disk;
use crate::support::mounted::Mounted;
use crate::support::until;

/// A base layer, a layer on the writable volume, and containers, one of which has written.
fn populate(client: &Client) {
    layer(client, "base", "", |top| {
        fs::write(top.join("file"), "base").unwrap();
    });
    client.prepare("init-key", "base", &[]).unwrap();
    client.commit("init-key", "init", &[]).unwrap();
    client.prepare("gone", "base", &[]).unwrap();
    let mounted = Mounted::new(&client.prepare("web", "init", &[]).unwrap());
    fs::write(mounted.path().join("own"), "written").unwrap();
}

#[track_caller]
fn is_unavailable<T>(result: Result<T, Refusal>) {
    let Err((code, text)) = result else {
        panic!("it went well without the volume");
    };
    assert_eq!(code, RpcStatusCode::UNAVAILABLE, "{text}");
    assert!(text.contains("does not answer"), "{text}");
}

/// What a daemon serves, and what it refuses, while the writable volume does not answer.
fn serves_what_it_can(client: &Client) {
    let begun = Instant::now();
    is_unavailable(client.prepare("new", "base", &[]));
    is_unavailable(client.mounts("web"));
    is_unavailable(client.usage("web"));
    is_unavailable(client.commit("web", "layer", &[]));
    is_unavailable(client.view("new", "init", &[]));
    is_unavailable(client.cleanup());
    layer(client, "upper", "base", |_| ());
    client.view("view", "upper", &[]).unwrap();
    client.mounts("view").unwrap();
    client
        .update("web", &["labels.seen"], &[("seen", "yes")])
        .unwrap();
    client.remove("gone").unwrap();
    assert!(!client.exists("new"));
    assert!(begun.elapsed() < Duration::from_secs(10), "it has waited");
}

/// What has to hold once the volume has answered, without a restart.
fn is_used(split: &mut Split) {
    let client = split.client();
    until("the volume is used", || client.mounts("web").is_ok());
    let mounted = Mounted::new(&client.mounts("web").unwrap());
    assert_eq!(
        fs::read_to_string(mounted.path().join("own")).unwrap(),
        "written"
    );
    drop(mounted);
    client.prepare("new", "init", &[]).unwrap();
    client.cleanup().unwrap();
    assert!(is_empty(split.writable().join("trash")));
    let left = fs::read_dir(split.writable().join("snapshots")).unwrap();
    assert_eq!(left.count(), 3, "init, web and new");
    is_clean(split);
    split.daemon.stop();
    split.daemon.restart();
    is_clean(split);
}

#[registered(crate::Test)]
fn a_start_beside_a_frozen_disk() {
    let mut split = Split::start(&["--relocate", "never"]);
    populate(&split.client());
    split.daemon.stop();
    let frozen = split.writable.freeze();
    split.daemon.restart();
    serves_what_it_can(&split.client());
    drop(frozen);
    is_used(&mut split);
}

#[registered(crate::Test)]
fn a_start_beside_a_server_that_is_gone() {
    let mut split = Split::start(&["--relocate", "never"]);
    populate(&split.client());
    split.daemon.stop();
    let dead = Dead::mount(&split.writable.path());
    split.daemon.restart();
    serves_what_it_can(&split.client());
    says_that_it_does_not_answer(&split);
    drop(dead);
    is_used(&mut split);
}

fn says_that_it_does_not_answer(split: &Split) {
    let said = |name: &str| {
        let mut command = Command::new(BINARY);
        let output = command.arg(name).args(split.daemon.arguments()).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    for name in ["status", "doctor", "check"] {
        let said = said(name).replace('\n', " ");
        let words: Vec<_> = said.split_ascii_whitespace().collect();
        assert!(
            words.join(" ").contains("does not answer"),
            "{name}: {said}"
        );
    }
}

#[registered(crate::Test)]
fn a_first_start_and_a_stop_beside_a_server_that_is_gone() {
    let (image, writable) = (Disk::ext4(64), Disk::ext4(64));
    let dead = Dead::mount(&writable.path());
    let directories = [
        "--root-dir",
        &image.text(),
        "--writable-dir",
        &writable.text(),
    ];
    let mut flags = directories.map(str::to_owned).to_vec();
    flags.push("--require-mount".to_owned());
    let mut daemon = Daemon::start(&flags);
    let client = daemon.client();
    layer(&client, "base", "", |_| ());
    is_unavailable(client.prepare("web", "base", &[]));
    let begun = Instant::now();
    daemon.stop();
    assert!(begun.elapsed() < Duration::from_secs(20), "it has waited");
    daemon.restart();
    let client = daemon.client();
    is_unavailable(client.prepare("web", "base", &[]));
    drop(dead);
    // An error of the dead one may have been the answer, which only a restart gets over.
    until("the volume has answered", || {
        daemon.log().contains("has answered")
    });
    daemon.stop();
    daemon.restart();
    daemon.client().prepare("web", "base", &[]).unwrap();
}

/// While a volume hangs that the daemon has already taken into use.
#[registered(crate::Test)]
fn a_stop_while_requests_wait() {
    let mut split = Split::start(&[]);
    populate(&split.client());
    let dead = Dead::mount(&split.writable.path());
    let client = split.client();
    let waiting: Vec<_> = (0..8)
        .map(|number| client.begin_prepare(&format!("new-{number}"), "base", &[]))
        .collect();
    let begun = Instant::now();
    split.daemon.stop();
    assert!(begun.elapsed() < Duration::from_secs(30), "it has waited");
    drop(waiting);
    drop(dead);
    split.daemon.restart();
    let (code, said, complaint) = check(&split, &[]);
    assert_eq!(code, 0, "{said}{complaint}");
}

#[registered(crate::Test)]
fn a_start_waits_for_a_command_that_looks() {
    let mut split = Split::start(&[]);
    split.daemon.stop();
    let lock = fs::File::open(split.root().join("lock")).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    split.daemon.begin_restart();
    sleep(Duration::from_millis(500));
    assert!(split.daemon.is_running(), "{}", split.daemon.log());
    drop(lock);
    split.daemon.wait_until_serving();
    split.client().prepare("web", "", &[]).unwrap();

    // But not for one that works.
    split.daemon.stop();
    let lock = fs::File::open(split.root().join("lock")).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    let line = refused(split.daemon.arguments());
    assert!(line.contains("another snapshotter"), "{line}");
}
