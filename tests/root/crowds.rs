//! Many requests at once that wait for a disk, for a walk or for their client, and the
//! other requests, which go on.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use futures_executor::block_on;
use futures_util::StreamExt;
use grpcio::RpcStatusCode;
use registered::registered;

use crate::content::layer;
use crate::support::client::{Client, finish};
use crate::support::daemon::{Split, is_empty};
use crate::support::disk::{Disk, subdirectory};
use crate::support::mounted::upper_of;
use crate::support::until;

/// More than the daemon has threads for requests that wait for one disk.
const MANY: usize = 240;

/// Asks for that many snapshots on a disk that does not answer, of which the daemon refuses
/// the most, and each further one at once. Calls `others` while many wait.
fn crowd(client: &Client, key: impl Fn(usize) -> String, volume: &str, others: impl Fn(usize)) {
    let ask = |number: usize| client.begin_prepare(&key(number), "base", &[]);
    let mut waiting: Vec<_> = (0..MANY).map(ask).collect();
    sleep(Duration::from_secs(1));
    others(1);
    let (refused, stuck) = (waiting.split_off(MANY / 2), waiting);
    for prepare in refused {
        is_refused(finish(prepare), volume);
    }
    let begun = Instant::now();
    is_refused(finish(ask(MANY)), volume);
    others(2);
    assert!(begun.elapsed() < Duration::from_secs(5), "{begun:?}");
    // They may wait for ever, so nobody waits for them here.
    drop(stuck);
}

fn is_refused(answer: Result<Vec<u8>, (RpcStatusCode, String)>, volume: &str) {
    let (code, text) = answer.unwrap_err();
    assert_eq!(code, RpcStatusCode::UNAVAILABLE, "{text}");
    assert!(text.starts_with("prepare snapshot"), "{text}");
    assert!(text.contains(volume), "{text}");
    assert!(text.contains("requests wait for it"), "{text}");
}

fn quick(what: &str, request: impl FnOnce()) {
    let begun = Instant::now();
    request();
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(5), "{what}: {took:?}");
}

#[registered(crate::Test)]
fn a_writable_disk_that_does_not_answer_keeps_no_layer_waiting() {
    let mut split = Split::start(&[]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("file"), "x").unwrap()
    });
    let frozen = split.writable.freeze();
    let key = |number: usize| format!("web {number}");
    crowd(&client, key, "the writable volume", |round| {
        quick("View", || {
            client.view(&format!("view {round}"), "base", &[]).unwrap();
        });
        quick("an unpack", || {
            let key = format!("default/1/extract-{round} x");
            client.prepare(&key, "base", &[]).unwrap();
            client.commit(&key, &format!("layer {round}"), &[]).unwrap();
        });
        quick("List", || drop(client.names(&[]).unwrap()));
    });
    drop(frozen);
    // Until those that have waited are answered, others are refused.
    until("a container", || {
        client.prepare("after", "base", &[]).is_ok()
    });
    // What was refused has left nothing.
    assert!(!client.exists(&key(MANY)));
    split.daemon.stop();
}

#[registered(crate::Test)]
fn an_image_disk_that_does_not_answer_keeps_no_container_waiting() {
    let (image, writable) = (Disk::ext4(256), Disk::ext4(256));
    let state_dir = subdirectory(&writable.path(), "state");
    let mut split = Split::on(image, writable, &["--state-dir", &state_dir]);
    let client = split.client();
    layer(&client, "base", "", |top| {
        fs::write(top.join("file"), "x").unwrap()
    });
    // What every container asks for is in the kernel's memory on a machine with containers.
    client.prepare("before", "base", &[]).unwrap();
    client.mounts("before").unwrap();
    let frozen = split.image.freeze();
    let key = |number: usize| format!("default/1/extract-{number} x");
    crowd(&client, key, "the image volume", |round| {
        quick("a container", || {
            let key = format!("web {round}");
            client.prepare(&key, "base", &[]).unwrap();
            client.mounts(&key).unwrap();
            client.remove(&key).unwrap();
        });
    });
    drop(frozen);
    until("an unpack", || {
        client.prepare(&key(MANY), "base", &[]).is_ok()
    });
    split.daemon.stop();
}

/// Removals that delete at once and walks share the threads for long work.
#[registered(crate::Test)]
fn a_cleanup_does_not_wait_for_other_long_work() {
    let (image, writable) = (Disk::ext4(256), Disk::ext4(256));
    let state_dir = subdirectory(&writable.path(), "state");
    let flags = ["--threads", "2", "--async-remove", "false"];
    let flags = [&flags[..], &["--state-dir", &state_dir]].concat();
    let split = Split::on(image, writable, &flags);
    let client = split.client();
    let key = |number: u32| format!("default/1/extract-{number} x");
    for number in 0..4 {
        let top = upper_of(&client.prepare(&key(number), "", &[]).unwrap());
        fs::write(top.join("file"), "x").unwrap();
    }
    let removed = split.writable().join("trash/removed");
    fs::create_dir_all(&removed).unwrap();
    let frozen = split.image.freeze();
    let removals: Vec<_> = (0..4)
        .map(|number| client.begin_remove(&key(number)))
        .collect();
    sleep(Duration::from_millis(300));
    quick("Cleanup", || {
        finish(client.begin_cleanup(Duration::from_secs(20))).unwrap();
    });
    assert!(is_empty(split.writable().join("trash")));
    drop(frozen);
    for removal in removals {
        finish(removal).unwrap();
    }
}

#[registered(crate::Test)]
fn clients_that_do_not_read_their_lists_hold_little_memory() {
    const SNAPSHOTS: usize = 300;
    let mut split = Split::start(&["--sync", "none"]);
    let client = split.client();
    layer(&client, "base", "", |_| {});
    let long = "x".repeat(4000);
    let names: Vec<_> = (0..10).map(|number| format!("label-{number}")).collect();
    let labels: Vec<_> = names
        .iter()
        .map(|name| (name.as_str(), long.as_str()))
        .collect();
    for number in 0..SNAPSHOTS {
        client
            .view(&format!("view {number}"), "base", &labels)
            .unwrap();
    }
    let before = split.daemon.resident_bytes();
    // Each of these answers has 12 MB. Clients of one connection would share its window.
    let clients: Vec<_> = (0..30).map(|_| split.client()).collect();
    let mut lists: Vec<_> = clients
        .iter()
        .map(|client| client.begin_list(&[]))
        .collect();
    for list in &mut lists {
        // The answer has begun, or it was given up.
        let _ = block_on(list.next());
    }
    let grown = split.daemon.resident_bytes().saturating_sub(before);
    assert!(grown < 150 << 20, "{grown}");
    // A client that reads gets everything.
    quick("List", || {
        assert_eq!(client.names(&[]).unwrap().len(), SNAPSHOTS + 1);
    });
    drop(lists);
    split.daemon.stop();
}
