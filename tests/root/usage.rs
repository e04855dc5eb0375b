//! Usage if files have to be counted: shared walks, given up walks, earlier
//! results.

use std::fs;
use std::thread::{scope, sleep};
use std::time::Duration;

use grpcio::RpcStatusCode;
use registered::registered;

use crate::support::daemon::{Split, is_empty};
use crate::support::filter::without_quotas;
use crate::support::mounted::upper_of;
use crate::support::until;

/// Enough for a walk to take a while. Nearly all are names of one inode.
const NAMES: usize = 60_000;

fn fill(split: &Split, key: &str) {
    let top = upper_of(&split.client().prepare(key, "", &[]).unwrap());
    fs::write(top.join("file"), "x").unwrap();
    for number in 0..NAMES {
        fs::hard_link(top.join("file"), top.join(number.to_string())).unwrap();
    }
}

/// How often the log contains these words.
fn said(split: &Split, words: &str) -> usize {
    split.daemon.log().matches(words).count()
}

fn figure(split: &Split, by: &str) -> u64 {
    let path = split.writable.path().join("figures.prom");
    let text = fs::read_to_string(path).unwrap_or_default();
    let name = format!("snapshotter_usages_total{{by=\"{by}\"}} ");
    let value = text.lines().find_map(|line| line.strip_prefix(&name));
    value.map_or(0, |value| value.parse().unwrap())
}

fn start(flags: &[&str]) -> Split {
    let mut split = Split::start(flags);
    let path = split.writable.path().join("figures.prom");
    let mut arguments = split.daemon.arguments().to_vec();
    arguments.extend(["--metrics-file".to_owned(), path.display().to_string()]);
    split.daemon.stop();
    split.daemon.set_arguments(arguments);
    split.daemon.restart();
    split
}

#[registered(crate::Test)]
fn all_who_ask_at_once_share_a_walk() {
    let mut split = start(&["--threads", "16"]);
    fill(&split, "web");
    scope(|scope| {
        let ask = || {
            let client = split.client();
            scope.spawn(move || {
                let usage = client.usage("web").unwrap();
                assert_eq!(usage.inodes, 2);
            })
        };
        let asking: Vec<_> = (0..12).map(|_| ask()).collect();
        asking.into_iter().for_each(|thread| thread.join().unwrap());
    });
    // The figures are also written at the stop.
    let count = |split: &Split| (figure(split, "walk"), figure(split, "shared-walk"));
    until("the figures are written", || {
        let (walks, shared) = count(&split);
        walks + shared == 12
    });
    let (walks, shared) = count(&split);
    assert!(walks <= 3, "{walks} walks, {shared} shared");
    split.daemon.stop();
}

#[registered(crate::Test)]
fn a_caller_that_leaves_ends_the_walk() {
    let split = Split::start(&[]);
    fill(&split, "web");
    let client = split.client();
    // A walk may end earlier.
    until("a walk is given up", || {
        let mut asked = client.begin_usage("web");
        sleep(Duration::from_millis(5));
        asked.cancel();
        drop(asked);
        sleep(Duration::from_millis(50));
        said(&split, "no request waits for it any more") > 0
    });
    assert_eq!(client.usage("web").unwrap().inodes, 2);
    // This is not logged as a failure.
    assert_eq!(
        said(&split, "WARN ] Usage") + said(&split, "ERROR] Usage"),
        0
    );
}

#[registered(crate::Test)]
fn a_figure_is_told_again_if_that_is_asked_for() {
    let split = start(&["--usage-max-age", "3600"]);
    let client = split.client();
    let top = upper_of(&client.prepare("web", "", &[]).unwrap());
    assert_eq!(client.usage("web").unwrap().inodes, 1);
    fs::write(top.join("file"), "x").unwrap();
    assert_eq!(client.usage("web").unwrap().inodes, 1);
    // The record of a layer is counted again.
    client.commit("web", "layer", &[]).unwrap();
    assert_eq!(client.usage("layer").unwrap().inodes, 2);
    until("the figures are written", || {
        figure(&split, "earlier-walk") == 1
    });
}

/// As far as that works without quotas: this kernel may have them or not.
#[registered(crate::Test)]
fn limits_that_cannot_be_kept_are_refused() {
    const FAILED_PRECONDITION: RpcStatusCode = RpcStatusCode::FAILED_PRECONDITION;
    const INVALID_ARGUMENT: RpcStatusCode = RpcStatusCode::INVALID_ARGUMENT;
    let split = Split::start(&[]);
    let client = split.client();
    let own = "containerd.io/snapshot/overlay-read-write-splitting.max-size";
    for (label, value, code, words) in [
        (own, "10G", FAILED_PRECONDITION, "tune2fs -O quota,project"),
        (
            "containerd.io/snapshot/max-size",
            "1048576",
            FAILED_PRECONDITION,
            "prjquota",
        ),
        (
            "containerd.io/snapshot/max-size",
            "10G",
            INVALID_ARGUMENT,
            "without a unit",
        ),
        (own, "ten", INVALID_ARGUMENT, "512Mi"),
    ] {
        let (found, text) = client.prepare("web", "", &[(label, value)]).unwrap_err();
        assert!(found == code && text.contains(words), "{found:?} {text}");
    }
    assert!(client.names(&[]).unwrap().is_empty());
    assert_eq!(
        fs::read_dir(split.writable().join("snapshots"))
            .unwrap()
            .count(),
        0
    );

    client.prepare("web", "", &[]).unwrap();
    let field = format!("labels.{own}");
    let (found, text) = client.update("web", &[&field], &[(own, "1G")]).unwrap_err();
    assert!(
        found == FAILED_PRECONDITION && text.contains("tune2fs"),
        "{text}"
    );
    client.update("web", &[&field], &[(own, "0")]).unwrap();
    client.update("web", &["labels.x"], &[("x", "y")]).unwrap();
}

#[registered(crate::Test)]
fn without_the_right_to_quotas_the_trash_is_emptied() {
    let split = without_quotas(|| Split::start(&[]));
    let client = split.client();
    let top = upper_of(&client.prepare("web", "", &[]).unwrap());
    fs::write(top.join("file"), "x").unwrap();
    client.remove("web").unwrap();
    client.cleanup().unwrap();
    assert!(is_empty(split.writable().join("trash")));
    assert_eq!(said(&split, "EPERM"), 1, "the start says it, once");
}
