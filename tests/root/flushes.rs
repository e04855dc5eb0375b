//! How often a disk is flushed for a request: a flush takes longer than everything else
//! in it.

use std::fs;
use std::os::unix::fs::symlink;
use std::thread::sleep;
use std::time::{Duration, Instant};

use registered::registered;

use crate::support::client::Client;
use crate::support::daemon::{Daemon, Split};
use crate::support::mounted::upper_of;
use crate::support::slow::{SlowDisks, Speed};
use crate::support::until;

/// The requests that change something, and whose answers callers wait for.
#[derive(Clone, Copy, Debug)]
enum Request {
    Prepare,
    View,
    Update,
    Remove,
}

const ALL: [Request; 4] = [
    Request::Prepare,
    Request::View,
    Request::Update,
    Request::Remove,
];

impl Request {
    fn send(self, client: &Client, number: usize) {
        match self {
            Request::Prepare => {
                drop(
                    client
                        .prepare(&format!("new-{number}"), "base", &[])
                        .unwrap(),
                );
            }
            Request::View => drop(client.view(&format!("view-{number}"), "base", &[]).unwrap()),
            Request::Update => {
                let value = number.to_string();
                let labels = [("number", value.as_str())];
                client.update("base", &["labels.number"], &labels).unwrap();
            }
            Request::Remove => client.remove(&format!("old-{number}")).unwrap(),
        }
    }
}

fn start() -> Split {
    let split = Split::start(&["--sync", "none"]);
    // The journals are written only when a flush asks for it, not periodically.
    for disk in [&split.image, &split.writable] {
        disk.remount("commit=3600");
    }
    let client = split.client();
    client.prepare("extract", "", &[]).unwrap();
    client.commit("extract", "base", &[]).unwrap();
    until("the log has its size", || {
        let log = fs::metadata(split.root().join("metadata.db-wal")).unwrap();
        log.len() == 4 << 20
    });
    split
}

fn flushes(split: &Split) -> u64 {
    split.image.flushes() + split.writable.flushes()
}

/// Fails unless the disk is flushed exactly once for the request.
fn is_flushed_once(split: &Split, client: &Client, request: Request, number: usize, when: &str) {
    let before = flushes(split);
    request.send(client, number);
    let flushed = flushes(split) - before;
    assert_eq!(flushed, 1, "{request:?}, {when}");
}

#[registered(crate::Test)]
fn the_first_request_after_a_start_has_one() {
    let mut split = start();
    let mut number = 0;
    for (end, how) in [
        (Daemon::stop as fn(&mut Daemon), "a stop"),
        (Daemon::kill as fn(&mut Daemon), "a kill"),
    ] {
        for request in ALL {
            number += 1;
            let client = split.client();
            client
                .prepare(&format!("old-{number}"), "base", &[])
                .unwrap();
            end(&mut split.daemon);
            split.daemon.restart();
            let client = split.client();
            client.stat("base").unwrap();
            sleep(Duration::from_millis(50));
            let when = format!("the first after {how}");
            is_flushed_once(&split, &client, request, number, &when);
        }
    }
}

#[registered(crate::Test)]
fn every_later_request_has_one() {
    let split = start();
    let client = split.client();
    for request in ALL {
        let removed = matches!(request, Request::Remove);
        if removed {
            for number in 0..1000 {
                client
                    .prepare(&format!("old-{number}"), "base", &[])
                    .unwrap();
            }
        }
        let before = flushes(&split);
        for number in 0..1000 {
            // The thread that moves the log may be working.
            if [49, 999].contains(&number) {
                sleep(Duration::from_millis(200));
                let when = format!("number {}", number + 1);
                is_flushed_once(&split, &client, request, number, &when);
            } else {
                request.send(&client, number);
            }
        }
        let all = flushes(&split) - before;
        println!("{request:?}: {all} flushes of 1000 requests");
        assert!(all < 1300, "{request:?}: {all} flushes of 1000 requests");
    }
}

#[registered(crate::Test)]
fn a_commit_does_not_wait_for_what_others_have_written() {
    let disks = SlowDisks::new(512, Speed::default());
    let [image, writable] = disks.format(&["-q", "-F", "-m", "0", "-b", "4096"]);
    let strangers_file = image.path().join("of-another-program");
    let split = Split::on(image, writable, &[]);
    let client = split.client();
    // 20 MiB a second: a flush of all of it takes ten seconds.
    fs::write(&strangers_file, vec![1; 200 << 20]).unwrap();
    disks.set_speed(Speed {
        flush: Duration::from_millis(5),
        mebibyte: Duration::from_millis(50),
    });
    let mut slowest = Duration::ZERO;
    for layer in ["first", "second"] {
        let key = format!("extract {layer}");
        let labels = [("containerd.io/snapshot.ref", layer)];
        let upper = upper_of(&client.prepare(&key, "", &labels).unwrap());
        for number in 0..50 {
            fs::write(upper.join(number.to_string()), vec![2; 10_000]).unwrap();
        }
        symlink("0", upper.join("link")).unwrap();
        // The thread that flushes while a layer is unpacked must not be in the way.
        sleep(Duration::from_millis(1500));
        let begun = Instant::now();
        client.commit(&key, layer, &[]).unwrap();
        slowest = slowest.max(begun.elapsed());
    }
    disks.set_speed(Speed::default());
    println!("the slowest commit took {} ms", slowest.as_millis());
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
}
